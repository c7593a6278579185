"""The trees that a server would verify, and what the target says of their nodes."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel, step_units
from cast_sglang.costs.profiles import load_profile
from cast_sglang.ops import loops
from cast_sglang.policy.build import PolicySettings, build_policy
from cast_sglang.policy.decider import Decider, StepFacts
from cast_sglang.trace.reward import TreeReward, tree_reward
from cast_sglang.tree import DraftTree

from .draft_model import Head
from .evaluate import TreeShape
from .layers import LayerCache, repeat_heads, rope_tables
from .target_model import Target


@dataclass(frozen=True)
class Load:
    """What decides how large trees get: a device, by its profile, and how busy it is."""

    profile: Path
    batch_size: int
    context: int  # tokens of a request


class Trees(NamedTuple):
    """Trees behind P prefixes of one text, N rows each, the root in row 0."""

    tokens: torch.Tensor  # [P, N - 1] int64
    parent_rows: torch.Tensor  # [P, N - 1] int64, -1 for a row that holds no node
    widths: list[int]  # nodes expanded in each layer

    @property
    def num_rows(self) -> torch.Tensor:
        """[P] int64, rows that hold something."""
        return 1 + (self.parent_rows >= 0).sum(1)


class Judged(NamedTuple):
    """What the target says of trees."""

    rewards: list[TreeReward]
    paths: torch.Tensor  # [P, D] int64, tokens of the path that greedy decoding accepts, then 0
    path_lens: torch.Tensor  # [P] int64


class Chooser:
    """Chooses trees as policy `auto` does on a server of this load.

    The prefixes of one call are decided for together, as the requests of one batch are, and rows
    are shared out among them. The policy's price and what it expects of further layers are learned
    from call to call.

    Args:
        envelope: the largest tree.
    """

    def __init__(self, load: Load, envelope: TreeShape) -> None:
        steps, topk, rows = envelope.num_steps, envelope.topk, envelope.num_draft_tokens
        limits = Limits(
            max_batch_size=load.batch_size,
            max_context=load.context + rows,
            max_verify_rows=rows,
            max_width=topk,
            max_extend_rows=min(steps + 1, rows),
        )
        self.costs = CostModel(load_profile(load.profile), limits).step_costs(
            load.batch_size, load.context
        )
        sizes = tuple(range(2, rows + 1))
        policy = build_policy("auto", PolicySettings(sizes, steps, rows, extends_by_accepted=True))
        policy.takes_turns = False  # every step is to have the policy's own tree
        self._decider = Decider(policy, max_missing=0, topk=topk, is_ragged=True, shares_out=True)
        self._envelope = envelope

    def price(self, num_prefixes: int) -> float:
        """Return the accepted tokens asked per target pass, as calls of this size have reached."""
        return self._decider.price(num_prefixes)

    @torch.no_grad()
    def choose(
        self,
        draft: Head,
        target: Target,
        embeds: torch.Tensor,
        features: torch.Tensor,
        bases: torch.Tensor,
    ) -> Trees:
        """Grow trees behind P prefixes and cut them to what is worth its time.

        Args:
            embeds, features: of the whole text, as `Head.drafting` takes them.
            bases: [P] int64, the last committed slots.
        """
        shape, decider, vocabulary = self._envelope, self._decider, draft.vocabulary
        facts = StepFacts(
            batch_size=len(bases),
            costs=self.costs,
            weights=None,
            missing_rows=0,
            max_layers=shape.num_steps,
            max_rows=shape.num_draft_tokens,
        )
        decider.begin_step(facts)  # drafted in any case: plain decoding has no tree to learn from
        drafting = draft.drafting(embeds, features, bases)

        def children(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            best = logits.float().softmax(-1).topk(shape.topk)
            return vocabulary[best.indices], best.values.contiguous()

        tree = DraftTree(*children(drafting.first()), shape.num_steps, loops)
        widths: list[int] = []
        while tree.num_layers < tree.max_layers:
            frontier = tree.frontier()
            width = decider.width(frontier.scores)
            if width is None:
                break
            nodes = target.model.embed_tokens(frontier.tokens[:, :width]).float()
            logits = drafting.next(nodes, frontier.parents[:, :width])
            chances = tree.grow(frontier, width, *children(logits))
            decider.expanded(frontier.scores, chances)
            widths.append(width)
        ranked = tree.ranked(shape.num_draft_tokens - 1)
        rows = decider.rows(ranked.scores)
        num_rows = None if rows.num_rows is None else torch.from_numpy(rows.num_rows)
        selection = tree.select(ranked, rows.num_draft_tokens, num_rows)
        return Trees(selection.draft_tokens, selection.parent_rows, widths)

    def learn(self, trees: Trees, judged: Judged) -> None:
        """Take what the trees brought into the price."""
        accepted = sum(reward.expected for reward in judged.rewards) / len(judged.rewards)
        mean_rows = float(trees.num_rows.float().mean())
        units = step_units(self.costs, trees.widths, mean_rows, 1.0 + accepted)
        self._decider.end_step(len(judged.rewards), accepted, units)


@torch.no_grad()
def judge(
    target: Target,
    committed: list[LayerCache],
    root_states: torch.Tensor,
    bases: torch.Tensor,
    trees: Trees,
) -> Judged:
    """Return what the target says of trees, whose nodes it runs in one pass, as verify does.

    Args:
        committed: the target's keys and values of the text, T tokens.
        root_states: [P, state_size], the target's states of the roots.
        bases: [P] int64; the root of each is the token one ahead.
    """
    parents, tokens = trees.parent_rows, trees.tokens
    num_trees, num_nodes = tokens.shape
    sees = _ancestors(parents)
    depths = sees.sum(-1)
    node_logits = _run_nodes(target, committed, tokens, bases + 1, depths, sees)
    logits = torch.cat([target.logits(root_states)[:, None].float(), node_logits], dim=1)
    rows = torch.arange(num_trees)[:, None]
    is_node = parents >= 0
    above = parents.clamp(min=0)
    probs = logits.softmax(-1)[rows, above, tokens]
    rewards = [
        tree_reward(
            torch.arange(num_nodes)[held].numpy(), (above[i] - 1)[held].numpy(), row[held].numpy()
        )
        for i, (held, row) in enumerate(zip(is_node, probs, strict=True))
    ]
    best = logits.argmax(-1)
    at = torch.zeros(num_trees, dtype=torch.int64)
    lens = torch.zeros(num_trees, dtype=torch.int64)
    paths = torch.zeros(num_trees, int(depths.max()), dtype=torch.int64)
    for depth in range(paths.shape[1]):
        wanted = best[rows[:, 0], at][:, None]
        fits = is_node & (parents == at[:, None]) & (tokens == wanted) & (lens == depth)[:, None]
        goes_on = fits.any(1)
        paths[goes_on, depth] = wanted[goes_on, 0]
        lens += goes_on
        at = torch.where(goes_on, fits.int().argmax(1) + 1, at)
    return Judged(rewards, paths, lens)


def _ancestors(parent_rows: torch.Tensor) -> torch.Tensor:
    """Return [P, n, n] boolean, the nodes on the path to each node, itself included."""
    num_trees, num_nodes = parent_rows.shape
    sees = torch.zeros(num_trees, num_nodes, num_nodes, dtype=torch.bool)
    rows = torch.arange(num_trees)
    for node in range(num_nodes):
        parents = parent_rows[:, node]
        above = sees[rows, (parents - 1).clamp(min=0)]
        sees[:, node] = above & (parents > 0)[:, None]
        sees[:, node, node] = True
    return sees


def _run_nodes(
    target: Target,
    committed: list[LayerCache],
    tokens: torch.Tensor,
    roots: torch.Tensor,
    depths: torch.Tensor,
    sees: torch.Tensor,
) -> torch.Tensor:
    """Return logits [P, n, V] float32 of nodes that see their root's text and their ancestors.

    Args:
        tokens, depths: [P, n]; the root is at depth 0.
        roots: [P], positions in the text.
        sees: as `_ancestors` returns it.
    """
    shape, (num_trees, num_nodes) = target.shape, tokens.shape
    length = committed[0].keys.shape[2]
    prefix = torch.arange(length) <= roots[:, None]
    prefix = prefix[:, None].expand(-1, num_nodes, -1).flatten(0, 1)
    mask = torch.cat([prefix, torch.block_diag(*sees.float()).bool()], dim=1)
    rope = rope_tables((roots[:, None] + depths).flatten(), shape)
    x = target.model.embed_tokens(tokens.view(1, -1))
    for layer, cache in zip(target.model.layers, committed, strict=True):
        queries, own = layer.self_attn.project(layer.input_layernorm(x), rope)
        keys, values = (
            repeat_heads(torch.cat(pair, dim=2), shape.num_heads)
            for pair in zip(cache, own, strict=True)
        )
        heads = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        x = layer.finish(x, heads)
    logits = target.lm_head(target.model.norm(x))[0].float()
    return logits.view(num_trees, num_nodes, -1)
