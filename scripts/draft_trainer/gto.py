"""Group tree optimization: a trained head is tuned for the trees that decoding will build.

Ordinary training looks at one path, decoding verifies a tree. Here the trees behind groups of
neighbouring prefixes are built as a server of a given load builds them, and the target says what
each is worth. A prefix whose tree is worth more than those of its neighbours makes the path that
is accepted in it likelier. The worth of the tree that the reference builds there is taken off
before, so that it counts how much the head has gained and not how easy the text is.

    R_i = r(tree of the head) - r(tree of the reference)
    A_i = (R_i - mean of the group) / (its deviation + 1e-6)
    s_i = (p(path_i) / p_reference(path_i)) ^ (1 / length)
    loss = token loss - 0.5 * mean of min(s_i A_i, clip(s_i, 0.8, 1.2) A_i)

Source: Hu et al., "Bridging Draft Policy Misalignment: Group Tree Optimization for Speculative
Decoding" (arXiv 2509.22134): sizes of groups, the weight 0.5, the smooth maximum as reward. The
width of the clip and the 1e-6 are not known from there. Reward `priced`, and trees by a policy in
place of one shape, are this project's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .distill import ROW_TOKENS, DraftTask
from .draft_model import Head
from .evaluate import TreeShape
from .gto_trees import Chooser, Judged, Load, Trees, judge
from .loop import BatchResult
from .one_pass import OnePassDraft
from .rows import Row, Rows
from .target_model import Target

LOSS_WEIGHT = 0.5
CLIP = 0.2  # as is common for clipped surrogates
DELTA = 1e-6
# By how much tuning is slower than training: 5e-6 after 1e-4 in the paper.
RATE_FACTOR = 1 / 20
REWARDS = ("smooth", "expected", "priced", "none")
NUM_EVALUATED = 8  # held-out rows whose trees are judged
GROUPS_EVALUATED = 4  # of the prefixes of each


@dataclass(frozen=True)
class GtoSettings:
    """How a head is tuned.

    Attributes:
        reward: "smooth", the smooth maximum over paths of the expected accepted length;
            "expected", the expected accepted tokens; "priced", these less what the tree's rows cost
            at the price that the policy has found; "none", no tree is worth anything: the token
            loss alone, for comparison.
        debias: the worth of the reference's trees is taken off.
    """

    load: Load
    envelope: TreeShape
    group_size: int = 8
    num_groups: int = 16
    reward: str = "smooth"
    debias: bool = True


class Text:
    """A row, laid out for drafting behind many of its prefixes."""

    def __init__(self, target: Target, store: Rows, row: Row) -> None:
        tokens = torch.tensor([row.tokens[:ROW_TOKENS]])
        states = store.states(row)[: tokens.shape[1] - 1]
        size = target.shape.hidden_size
        with torch.no_grad():
            self.committed = target(tokens).cache
            self.embeds = target.model.embed_tokens(tokens[:, 1:]).float()
        self.features = states[None, :, :-size].float()
        self.states = states.to(target.lm_head.weight.dtype)
        # A root is the token one ahead of its base, and the target's state of it is known.
        self.bases = torch.arange(max(row.answer_start - 1, 0), len(states) - 1)


def draw_groups(
    bases: torch.Tensor, size: int, count: int, draw: np.random.Generator
) -> list[torch.Tensor]:
    """Return up to `count` disjoint groups of `size` neighbouring bases each."""
    offset = int(draw.integers(len(bases) % size + 1))
    groups = bases[offset:].split(size)
    groups = [group for group in groups if len(group) == size]
    return [groups[i] for i in draw.permutation(len(groups))[:count]]


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Return rewards [groups, size] by how far they are from the mean of their group."""
    spread = rewards.std(dim=1, keepdim=True, unbiased=False)
    return (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + DELTA)


def surrogate(log_ratios: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Return the mean of the clipped surrogates, to be made large; both arguments [n]."""
    ratios = log_ratios.exp()
    clipped = ratios.clamp(1.0 - CLIP, 1.0 + CLIP)
    return torch.minimum(ratios * advantage, clipped * advantage).mean()


def path_log_probs(
    draft: Head,
    target: Target,
    text: Text,
    bases: torch.Tensor,
    paths: torch.Tensor,
    path_lens: torch.Tensor,
) -> torch.Tensor:
    """Return [P], the mean log probability of the tokens of each path, fed one after the other.

    Args:
        bases: [P]. paths, path_lens: as `Judged` has them; an empty path gives 0.
    """
    with torch.no_grad():
        fed = target.model.embed_tokens(paths).float()
    ids = torch.searchsorted(draft.vocabulary, paths).clamp(max=len(draft.vocabulary) - 1)
    depth = int(path_lens.max())
    total = torch.zeros(len(paths))
    unrolled = draft.unroll(
        text.embeds, text.features, bases[None], lambda step: fed[None, :, step - 1], depth
    )
    for step, (hidden, _) in zip(range(depth), unrolled, strict=True):
        scores = draft.logits(hidden[0]).log_softmax(-1)
        total = total + scores.gather(1, ids[:, step, None])[:, 0] * (step < path_lens)
    return total / path_lens.clamp(min=1)


def choose_and_judge(
    chooser: Chooser, draft: Head, target: Target, text: Text, bases: torch.Tensor
) -> tuple[Trees, Judged]:
    """Return the trees behind prefixes [P] of a text and what the target says of them."""
    trees = chooser.choose(draft, target, text.embeds, text.features, bases)
    judged = judge(target, text.committed, text.states[bases + 1], bases, trees)
    chooser.learn(trees, judged)
    return trees, judged


class Served(NamedTuple):
    """Means over the trees of a text; accepted tokens are without the bonus token."""

    expected: float  # accepted tokens where they are sampled at temperature 1
    greedy: float  # accepted tokens of greedy decoding
    num_rows: float  # verified, the root's among them


def served_trees(
    draft: Head, target: Target, store: Rows, rows: list[Row], settings: GtoSettings
) -> list[Served]:
    """Return what the target accepts of the trees that a server verifies, for each row.

    Rows too short for a group are left out.
    """
    draw, found = np.random.default_rng(0), []
    chooser = Chooser(settings.load, settings.envelope)
    for row in rows:
        text, accepted = Text(target, store, row), []
        for bases in draw_groups(text.bases, settings.group_size, GROUPS_EVALUATED, draw):
            trees, judged = choose_and_judge(chooser, draft, target, text, bases)
            expected = [reward.expected for reward in judged.rewards]
            lens, num_rows = judged.path_lens.tolist(), trees.num_rows.tolist()
            accepted += zip(expected, lens, num_rows, strict=True)
        if accepted:
            found.append(Served(*np.mean(accepted, axis=0).tolist()))
    return found


class GtoTask(DraftTask):
    """Tuning on the rows of a store; see the top of this file.

    Args:
        draft: starts as the reference.
        reference: frozen.
    """

    name = "gto"

    def __init__(
        self,
        draft: Head,
        reference: Head,
        target: Target,
        store: Rows,
        is_held_out: Callable[[Row], bool],
        batch_tokens: int,
        num_heldout_rows: int,
        save: Callable[[], None],
        settings: GtoSettings,
    ) -> None:
        super().__init__(draft, target, store, is_held_out, batch_tokens, num_heldout_rows, save)
        if isinstance(draft, OnePassDraft) and settings.envelope.num_steps > draft.num_steps:
            raise ValueError(f"trees of this head have {draft.num_steps} layers at most")
        self._reference = reference.requires_grad_(False)
        self._settings = settings
        self._own, self._other = (Chooser(settings.load, settings.envelope) for _ in range(2))

    def batch(self, first_window: int, progress: float) -> BatchResult:
        """Train on a few rows as before, and on the trees behind prefixes of one of them."""
        result = super().batch(first_window, progress)
        if self._settings.reward == "none":
            return result
        draw = np.random.default_rng((result.num_windows, first_window))
        row = self._train_rows[int(draw.integers(len(self._train_rows)))]
        return BatchResult(
            result.loss - LOSS_WEIGHT * self.gain(row, draw), result.num_windows, result.num_tokens
        )

    def gain(self, row: Row, draw: np.random.Generator) -> torch.Tensor:
        """Return the surrogate over groups of a row's prefixes; 0 for a row too short for one."""
        settings, text = self._settings, Text(self._target, self._store, row)
        groups = draw_groups(text.bases, settings.group_size, settings.num_groups, draw)
        if not groups:
            return torch.zeros(())
        rewards, judged = [], []
        for bases in groups:
            trees, own = choose_and_judge(self._own, self.model, self._target, text, bases)
            reward = self._reward(trees, own)
            if settings.debias:
                other = self._other, self._reference
                reward -= self._reward(*choose_and_judge(*other, self._target, text, bases))
            rewards.append(reward)
            judged.append(own)
        advantage = advantages(torch.stack(rewards)).flatten()
        depth = max(each.paths.shape[1] for each in judged)
        pad = torch.nn.functional.pad
        paths = torch.cat([pad(each.paths, (0, depth - each.paths.shape[1])) for each in judged])
        accepted = torch.cat(groups), paths, torch.cat([each.path_lens for each in judged])
        if not accepted[2].any():
            return torch.zeros(())
        log_probs = path_log_probs(self.model, self._target, text, *accepted)
        with torch.no_grad():
            before = path_log_probs(self._reference, self._target, text, *accepted)
        return surrogate(log_probs - before, advantage)

    def evaluate(self) -> dict[str, float]:
        """Return held-out numbers, among them what the target accepts of trees as served."""
        values = super().evaluate()
        rows = self._heldout_rows[:NUM_EVALUATED]
        found = served_trees(self.model, self._target, self._store, rows, self._settings)
        expected = [trees.expected for trees in found]
        return values | ({"tree_accepted": float(np.mean(expected))} if expected else {})

    def _reward(self, trees: Trees, judged: Judged) -> torch.Tensor:
        """Return [P] float32, what each tree is worth."""
        if self._settings.reward == "smooth":
            return torch.tensor([reward.draft_tree_reward for reward in judged.rewards])
        expected = torch.tensor([reward.expected for reward in judged.rewards])
        if self._settings.reward == "expected":
            return expected
        verify = torch.from_numpy(self._own.costs.verify)
        time = verify[trees.num_rows - 1] - verify[0]
        return expected - self._own.price(len(expected)) * time
