"""Captured draft layers against eager ones, on a model that depends on all of its inputs.

The device is a fake: a graph is what was captured, run again, and its outputs stand in memory that
every replay overwrites.
"""

from types import SimpleNamespace

import pytest
import torch

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.ops import reference
from cast_sglang.policy.base import TreePolicy
from cast_sglang.serving.calibration import Calibration
from cast_sglang.serving.drafting.captured_layers import LayerGraphs
from cast_sglang.serving.drafting.grow import compile_ops, grow_tree
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.serving.step_room import StepRoom

TOPK, STEPS, HIDDEN, CONTEXT, SLOTS = 3, 5, 4, 16, 4000


class FakeGraphs:
    """SGLang's graph backend: keeps what it is given and runs it again."""

    def __init__(self):
        self.log = []
        self._graphs = {}
        self._memory = torch.zeros(0)

    def capture_one(self, key, forward, **kwargs):
        self.log.append(("capture", key.size, key.variant_label))
        forward()
        self._graphs[key] = forward

    def replay(self, key, batch):
        self.log.append(("replay", key.size, key.variant_label))
        outputs = self._graphs[key]()
        # What the last replay returned is overwritten.
        self._memory.fill_(-1)
        self._memory = torch.cat([part.double().flatten() for part in outputs])
        starts = [0]
        for part in outputs:
            starts.append(starts[-1] + part.numel())
        views = zip(starts, outputs, strict=False)
        return tuple(
            self._memory[start : start + part.numel()].view(part.shape).to(part.dtype)
            if part.dtype != torch.float32
            else self._memory[start : start + part.numel()].view(part.shape).float()
            for start, part in views
        )


class FakeAttention:
    """Gives each node the slots it attends to, eagerly or in buffers."""

    def __init__(self, table):
        self.table = table

    def capture_lists(self, max_nodes, max_depth):
        self.indptr = torch.zeros(max_nodes + 1, dtype=torch.int32)
        self.indices = torch.zeros(max_nodes * (CONTEXT + max_depth), dtype=torch.int64)

    def init_tree_metadata(self, batch, path_slots):
        nodes = path_slots.shape[0] * path_slots.shape[1]
        indptr = torch.zeros(nodes + 1, dtype=torch.int32)
        indices = torch.zeros(nodes * (CONTEXT + STEPS), dtype=torch.int64)
        self._list(batch, path_slots, torch.tensor([path_slots.shape[2]]), indptr, indices)

    def init_captured_tree_metadata(self, batch, path_slots, depth):
        nodes = path_slots.shape[0] * path_slots.shape[1]
        self._list(batch, path_slots, depth, self.indptr[: nodes + 1], self.indices)

    def _list(self, batch, path_slots, depth, indptr, indices):
        reference.list_slots(
            self.table, batch.req_pool_indices, batch.seq_lens, path_slots, depth, indptr, indices
        )
        ends = indptr.tolist()
        self.lists = [indices[a:b] for a, b in zip(ends, ends[1:], strict=False)]


class FakeDraft:
    """A draft worker whose model mixes token, position, slots read and written, and states."""

    device, gpu_id, topk, speculative_num_steps = "cpu", 0, TOPK, STEPS
    room = StepRoom(STEPS, 1 + TOPK * STEPS)
    max_draft_tokens, verify_sizes = 12, (2, 5, 12)
    costs = residuals = calibration = layer_graphs = tracer = None

    def __init__(self, policy):
        generator = torch.Generator().manual_seed(0)
        self.policy, self.clock, self.reads = policy, PassClock("cpu"), HostReads("cpu")
        table = torch.randint(1, SLOTS, (9, CONTEXT), generator=generator).to(torch.int32)
        table[0] = 0
        self.draft_attn_backend = FakeAttention(table)
        self.weights = torch.rand(SLOTS, generator=generator, dtype=torch.float64)
        translator = SimpleNamespace(bind_runner_slots=lambda batch: None)
        self.draft_runner = SimpleNamespace(
            device="cpu", kv_index_translator=translator, spec_algorithm=None
        )

    def recurrent_hidden_states(self):
        return HIDDEN, torch.float32

    def to_target_vocab(self, index):
        return index + 100

    def forward_layer(self, batch, path_slots):
        self.draft_attn_backend.init_tree_metadata(batch, path_slots)
        return self.forward_nodes(batch)

    def forward_nodes(self, batch):
        lists = self.draft_attn_backend.lists
        assert len(lists) == len(batch.input_ids) == len(batch.positions)
        # A node reads its own slot last.
        for slots, own in zip(lists, batch.out_cache_loc, strict=True):
            assert slots[-1] == own
        read = torch.stack([self.weights[slots].sum() for slots in lists])
        state = batch.spec_info.hidden_states.double().sum(1) + read
        state = state + 0.37 * batch.input_ids + 0.11 * batch.positions
        children = torch.arange(TOPK)
        probs = torch.sigmoid(torch.sin(state).unsqueeze(1) - children).float()
        tokens = (state.unsqueeze(1) * 7).long() % 50 + children
        hidden_states = torch.sin(state.unsqueeze(1) + torch.arange(HIDDEN)).float()
        return probs, self.to_target_vocab(tokens), hidden_states


class Widths(TreePolicy):
    """A policy of given widths."""

    def __init__(self, widths):
        self.widths, self.seen = widths, []

    def breadth(self, scores, costs):
        self.layer = getattr(self, "layer", -1) + 1
        return self.widths[self.layer] if self.layer < len(self.widths) else 1

    def deepen(self):
        return self.layer < len(self.widths)

    def expanded(self, parent_scores, child_probs):
        width, rest = divmod(len(child_probs), len(parent_scores))
        assert rest == 0 and width <= parent_scores.shape[1]
        self.seen.append((parent_scores[:, :width].clone(), child_probs.clone()))

    def rerank(self, scores, costs):
        return 2


def forward_batch(batch, seed):
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        batch_size=batch,
        req_pool_indices=torch.randperm(8, generator=generator)[:batch] + 1,
        seq_lens=torch.randint(1, CONTEXT, (batch,), generator=generator),
        out_cache_loc=torch.randperm(SLOTS - 1, generator=generator)[: batch * STEPS * TOPK] + 1,
        spec_info=SimpleNamespace(
            topk_p=torch.rand(batch, TOPK, generator=generator).sort(1, True).values,
            topk_index=torch.randint(50, (batch, TOPK), generator=generator),
            hidden_states=torch.rand(batch, HIDDEN, generator=generator),
        ),
    )


def grow(draft, widths, batch, seed):
    draft.policy = Widths(widths)
    tree, grown, _ = grow_tree(draft, forward_batch(batch, seed))
    ranked = tree.ranked(tree.num_candidates)
    return grown, ranked, tree.select(ranked, tree.num_candidates + 1), draft.policy.seen


@pytest.fixture
def draft():
    return FakeDraft(Widths([]))


def captured(draft, tiers):
    graphs = LayerGraphs(draft, GraphSizes(tiers))
    backend = FakeGraphs()
    graphs.capture(backend)
    draft.layer_graphs = graphs
    return backend


ALL = {1: (1, 2, 3), 4: (1, 2, 3)}


def test_the_largest_graphs_are_captured_first(draft):
    backend = captured(draft, {1: (3,), 4: (1, 3)})
    assert backend.log == [
        ("capture", 4, "width 3"),
        ("capture", 4, "width 1"),
        ("capture", 1, "width 3"),
    ]


@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_captured_layers_are_the_eager_ones(draft, batch, is_calibrated):
    """Steps of any depth and width one after another, so that what a step leaves is overwritten."""
    draft.calibration = Calibration() if is_calibrated else None
    cases = [([3, 1, 2, 3], 0), ([], 1), ([1], 2), ([2, 2], 3), ([3, 3, 3, 3], 4)]
    eager = [grow(draft, widths, batch, seed) for widths, seed in cases]
    backend = captured(draft, ALL)
    # A larger batch before, whose rows must not be read again.
    grow(draft, [3, 3, 3], 4, seed=9)
    backend.log.clear()
    for (widths, seed), expected in zip(cases, eager, strict=True):
        ours = grow(draft, widths, batch, seed)
        assert ours[0] == expected[0] == tuple(widths)
        for part, theirs in zip((*ours[1], *ours[2]), (*expected[1], *expected[2]), strict=True):
            assert torch.equal(part, theirs)
        for part, theirs in zip(ours[3], expected[3], strict=True):
            assert torch.equal(part[0], theirs[0]) and torch.equal(part[1], theirs[1])
    bucket = 1 if batch == 1 else 4
    replayed = [("replay", bucket, f"width {width}") for widths, _ in cases for width in widths]
    assert backend.log == replayed


def test_a_width_without_a_graph_runs_as_the_next_wider(draft):
    wide = grow(draft, [3, 2, 3], 2, seed=5)
    backend = captured(draft, {4: (2, 3)})
    backend.log.clear()
    ours = grow(draft, [3, 1, 3], 2, seed=5)
    assert ours[0] == (3, 2, 3)
    assert torch.equal(ours[2].draft_tokens, wide[2].draft_tokens)
    assert [entry[2] for entry in backend.log] == ["width 3", "width 2", "width 3"]


def test_a_batch_beyond_the_captured_ones_runs_eagerly(draft):
    expected = grow(draft, [2, 3], 4, seed=6)
    backend = captured(draft, {1: (3,), 2: (3,)})
    backend.log.clear()
    ours = grow(draft, [2, 3], 4, seed=6)
    assert backend.log == [] and torch.equal(ours[2].draft_tokens, expected[2].draft_tokens)
    grow(draft, [2, 3], 2, seed=6)
    assert len(backend.log) == 2


def test_ops_can_be_compiled_before_the_first_request(draft):
    draft.calibration = Calibration()
    compile_ops(draft)
