"""What the pair is worth on held-out prompts: the accept length of a static tree, simulated.

The simulation is greedy and drafts as SGLang 0.5.23 does for `--speculative-num-steps 5
--speculative-eagle-topk 4 --speculative-num-draft-tokens 8`: `topk` nodes a layer, the
`num_draft_tokens - 1` candidates of highest path probability verified. Because decoding is greedy,
what verification accepts is known once the target's answer is, so the target need not run again.
"""

from dataclasses import dataclass

import torch

from .draft_model import Head
from .rows import Row, Rows
from .target_model import Target


@dataclass(frozen=True)
class TreeShape:
    """A static tree: depth, nodes a layer, nodes verified with the root."""

    num_steps: int = 5
    topk: int = 4
    num_draft_tokens: int = 8


@dataclass(frozen=True)
class DraftTrees:
    """Trees of R bases: M candidates each, in drafting order."""

    tokens: torch.Tensor  # [R, M] int64
    scores: torch.Tensor  # [R, M]: product of draft probabilities from the root
    parents: torch.Tensor  # [M] or [R, M] int64: candidate index of the parent, -1 for the root


def simulate_accept_lens(
    target: Target,
    draft: Head,
    store: Rows,
    row: Row,
    tree: TreeShape = TreeShape(),
) -> list[int]:
    """Return the accepted tokens, bonus included, of every verify step of one greedy request.

    Args:
        row: a greedy answer; its last `tree.num_steps` tokens are what the last trees are held
            against, so they are decoded by no step of their own.
    """
    states = store.states(row)
    tokens = torch.tensor([row.tokens])
    # Slot `answer_start - 1` drafts behind the first token, which prefill yields.
    first, last = row.answer_start - 1, len(row.tokens) - 3 - tree.num_steps
    if last < first:
        return []
    bases = torch.arange(first, last + 1)
    trees = draft_trees(target, draft, tokens, states, bases, tree)
    follows = torch.stack([tokens[0, bases + 2 + depth] for depth in range(tree.num_steps)], dim=1)
    num_correct = count_correct_drafts(trees, follows, tree)
    accept_lens = []
    position = 0
    while position < len(bases):
        accept_lens.append(int(num_correct[position]) + 1)
        position += accept_lens[-1]
    return accept_lens


@torch.inference_mode()
def draft_trees(
    target: Target,
    draft: Head,
    tokens: torch.Tensor,
    states: torch.Tensor,
    bases: torch.Tensor,
    tree: TreeShape,
) -> DraftTrees:
    """Draft from several bases of one sequence at once.

    As in SGLang, branch k of a layer of an EAGLE-3 head attends to what branch k of the layers
    above left in the cache, also where selection made another branch its parent.

    Args:
        tokens: [1, T] int64.
        states: [T - 1, state_size], the target's.
        bases: [R] int64: last committed slot, whose token one ahead is the root.

    Returns:
        Trees of M = topk + (num_steps - 1) * topk ** 2 candidates.
    """
    num_bases, topk = len(bases), tree.topk
    embed = target.model.embed_tokens
    features = states[None, :, : -target.shape.hidden_size].float()
    drafting = draft.drafting(embed(tokens[:, 1:]).float(), features, bases, keeps_branches=True)

    best = drafting.first().softmax(-1).topk(topk)
    frontier_scores, frontier_tokens = best.values, draft.vocabulary[best.indices]  # [R, K]
    frontier_index = torch.arange(topk).expand(num_bases, topk)
    parents = torch.zeros(num_bases, topk, dtype=torch.int64)
    tokens_list, scores_list = [frontier_tokens], [frontier_scores]
    parents_list = [torch.full((num_bases, topk), -1)]
    for depth in range(1, tree.num_steps):
        logits = drafting.next(embed(frontier_tokens).float(), parents)
        best = logits.softmax(-1).topk(topk)
        scores = (frontier_scores.reshape(-1, 1) * best.values).view(num_bases, topk * topk)
        candidates = draft.vocabulary[best.indices].view(num_bases, topk * topk)
        tokens_list.append(candidates)
        scores_list.append(scores)
        parents_list.append(frontier_index.repeat_interleave(topk, dim=1))
        kept = scores.topk(topk).indices  # [R, K]
        frontier_scores = scores.gather(1, kept)
        frontier_tokens = candidates.gather(1, kept)
        frontier_index = topk + (depth - 1) * topk * topk + kept
        parents = kept // topk
    return DraftTrees(
        torch.cat(tokens_list, dim=1), torch.cat(scores_list, dim=1), torch.cat(parents_list, dim=1)
    )


def count_correct_drafts(trees: DraftTrees, follows: torch.Tensor, tree: TreeShape) -> torch.Tensor:
    """Walk each tree along the target's tokens, over the candidates that are verified.

    Args:
        follows: [R, num_steps] int64, the target's tokens behind each root.

    Returns:
        [R] int64, accepted drafts without the bonus token.
    """
    selected = torch.zeros_like(trees.scores, dtype=torch.bool)
    selected.scatter_(1, trees.scores.topk(tree.num_draft_tokens - 1).indices, True)
    node = torch.full((len(follows), 1), -1)
    is_alive = torch.ones(len(follows), dtype=torch.bool)
    num_correct = torch.zeros(len(follows), dtype=torch.int64)
    for depth in range(tree.num_steps):
        fits = selected & (trees.parents == node) & (trees.tokens == follows[:, depth, None])
        is_alive = is_alive & fits.any(1)
        num_correct += is_alive
        node = fits.int().argmax(1, keepdim=True)
    return num_correct
