"""Copied paths: grafting by what is recorded of them is grafting by the text itself."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.copying.chances import Chances
from cast_sglang.copying.contexts import looked_up
from cast_sglang.copying.graft import graft
from cast_sglang.copying.paths import copied_paths
from cast_sglang.ops import reference
from cast_sglang.policy.acceptance import DRAWN, GREEDY, SAMPLED
from cast_sglang.tree import DraftTree
from tests.copying.test_graft import VOCAB, indexed, learned


def stages(rng, batch, topk, widths):
    """Return tokens, scores and parents of a tree after each of its layers."""

    def children(rows):
        tokens = np.stack([rng.permutation(VOCAB)[:topk] for _ in range(rows)])
        probs = np.sort(rng.dirichlet(np.ones(topk + 1), rows)[:, :topk], axis=1)[:, ::-1]
        return torch.from_numpy(tokens), torch.from_numpy(probs.copy()).float()

    tree = DraftTree(*children(batch), len(widths) + 1, reference)
    yield tree.tokens.numpy(), tree.scores.numpy(), tree.parents.numpy()
    for width in widths:
        tree.grow(tree.frontier(), width, *children(batch * width))
        yield tree.tokens.numpy(), tree.scores.numpy(), tree.parents.numpy()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    topk=st.integers(1, 4),
    widths=st.lists(st.integers(1, 4), max_size=3),
    num_nodes=st.integers(1, 12),
    max_depth=st.integers(4, 6),
    least_score=st.sampled_from([0.0, 0.01, 0.11, 0.4]),
    kind=st.sampled_from([GREEDY, SAMPLED, DRAWN]),
)
def test_grafts_by_a_record_are_those_by_the_text(
    seed, batch, topk, widths, num_nodes, max_depth, least_score, kind
):
    """While the tree grows too, at any higher limit, and candidate for candidate."""
    rng = np.random.default_rng(seed)
    grown = list(stages(rng, batch, topk, [min(width, topk) for width in widths]))
    texts = [rng.integers(0, VOCAB - 1, rng.integers(0, 30)).tolist() for _ in range(batch)]
    table = learned(rng)
    index, roots = indexed(texts)
    least, kinds = np.full(batch, least_score, np.float32), np.full(batch, kind)
    limits = {"max_depth": max_depth, "vocab_size": VOCAB, "least_scores": least}
    paths = copied_paths(index.ints, roots, *grown[-1], topk, table, kinds, **limits)
    size = grown[-1][1].shape[1]
    ints, rows = looked_up([p.copied for p in paths], [size + len(p.parents) for p in paths])
    limits = {"num_nodes": num_nodes, "max_depth": max_depth, "vocab_size": 1 << 30}
    for higher in (1.0, 1.5):
        limits["least_scores"] = least * np.float32(higher)
        for tokens, scores, parents in grown:
            theirs = graft(
                *(index.ints, roots, tokens, scores, parents, topk, table, kinds),
                **limits | {"vocab_size": VOCAB},
            )
            numbers = np.arange(scores.shape[1])[None].repeat(batch, axis=0)
            # Rows know by themselves whether a request samples.
            ours_kinds = np.where(kinds == SAMPLED, GREEDY, kinds)
            drafted = numbers, scores, parents
            ours = graft(ints, rows, *drafted, topk, table, ours_kinds, **limits)
            for name in ("scores", "parents", "copied_scores", "counts", "classes", "depth"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
            if scores.shape[1] < size:
                continue
            for b, known in enumerate(paths):
                count = theirs.counts[b]
                numbers = known.numbers_of(theirs.parents[b, :count], size)
                assert numbers.tolist() == ours.tokens[b, :count].tolist()
                said = np.append(tokens[b], known.tokens)[numbers]
                assert said.tolist() == theirs.tokens[b, :count].tolist()
    for b, known in enumerate(paths):
        assert known.match == len(longest_repeat(texts[b]))
        assert (known.parents < np.arange(size, size + len(known.parents))).all()


def longest_repeat(text):
    for start in range(1, len(text)):
        end = text[start:]
        if any(text[i : i + len(end)] == end for i in range(start)):
            return end
    return []


def test_a_request_without_text_has_no_paths():
    index, roots = indexed([[], [1, 2, 1, 2]])
    rng = np.random.default_rng(0)
    [drafted] = stages(rng, 2, 2, [])
    limits = {"max_depth": 3, "least_scores": np.zeros(2, np.float32), "vocab_size": VOCAB}
    kinds = np.zeros(2, np.int64)
    none, some = copied_paths(index.ints, roots, *drafted, 2, Chances().table(), kinds, **limits)
    assert len(none.copied) == len(none.parents) == none.match == 0
    assert len(some.copied) and some.match == 2
    ints, rows = looked_up([none.copied, some.copied], [2, 2 + len(some.parents)])
    assert rows[0].tolist() == [-1, 0, 0, 0] and len(ints) == 2 * (3 + len(some.parents))


def test_the_path_below_the_root_goes_on_whatever_it_is_worth():
    index, roots = indexed([list(range(6)) + [99, 0, 1]])
    drafted = np.array([[90, 91]]), np.array([[0.6, 0.3]], np.float32), np.array([[-1, -1]])
    limits = {"max_depth": 4, "least_scores": np.ones(1, np.float32), "vocab_size": 100}
    kinds = np.zeros(1, np.int64)
    [paths] = copied_paths(index.ints, roots, *drafted, 2, Chances().table(), kinds, **limits)
    assert paths.match == 2 and paths.tokens.tolist() == [2, 3, 4, 5, 99]
    assert paths.parents.tolist() == [-1, 2, 3, 4, 5]
