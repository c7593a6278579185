"""A draft model without weights, a drafter without a model, and trees grown with them."""

from types import SimpleNamespace

import numpy as np
import torch

from cast_sglang.ops import reference
from cast_sglang.policy.base import TreePolicy
from cast_sglang.policy.decider import Decider, StepFacts
from cast_sglang.serving.drafting.base import Drafter
from cast_sglang.serving.drafting.draws import Draws
from cast_sglang.serving.drafting.grow import Growth, grow_tree
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.serving.step_room import StepRoom

TOPK, STEPS, HIDDEN, CONTEXT, SLOTS = 3, 5, 4, 16, 4000


class FakeAttention:
    """Gives each node the slots it attends to, eagerly or in buffers."""

    def __init__(self, table):
        self.table = table

    def capture_lists(self, max_nodes):
        self.indptr = torch.zeros(max_nodes + 1, dtype=torch.int32)
        self.indices = torch.zeros(max_nodes * (CONTEXT + STEPS), dtype=torch.int64)

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


class FakeModel:
    """A draft model that mixes token, position, slots read and written, and states."""

    device, topk, num_proposed = "cpu", TOPK, TOPK

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        table = torch.randint(1, SLOTS, (9, CONTEXT), generator=generator).to(torch.int32)
        table[0] = 0
        self.attention = FakeAttention(table)
        self.weights = torch.rand(SLOTS, generator=generator, dtype=torch.float64)
        translator = SimpleNamespace(bind_runner_slots=lambda batch: None)
        self.runner = SimpleNamespace(
            device="cpu", kv_index_translator=translator, spec_algorithm=None
        )

    def recurrent_hidden_states(self):
        return HIDDEN, torch.float32

    def to_target_vocab(self, index):
        return index + 100

    def forward_layer(self, batch, path_slots):
        self.attention.init_tree_metadata(batch, path_slots)
        return self.forward_nodes(batch)

    def forward_nodes(self, batch):
        lists = self.attention.lists
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


class Chains(FakeModel):
    """Proposes one child of each node."""

    topk = num_proposed = 1

    def forward_nodes(self, batch):
        probs, tokens, hidden_states = super().forward_nodes(batch)
        return probs[:, :1], tokens[:, :1], hidden_states


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


class Plans(Widths):
    """Plans chains of some layers."""

    def __init__(self, layers):
        super().__init__([])
        self.layers = layers

    def chain_layers(self, scores, costs, max_layers):
        return min(self.layers, max_layers)


class Counted(HostReads):
    """Counts what is read, and what is waited for."""

    def __init__(self):
        super().__init__("cpu")
        self.log = []

    def start(self, *tensors):
        read, number = super().start(*tensors), len(self.log)
        self.log.append("read")
        wait = read.wait

        def note():
            self.log[number] = "waited for"
            return wait()

        read.wait = note
        return read


class OnePass(Drafter):
    """Proposes all layers in one pass: the whole of a new drafter."""

    def __init__(self, batch, log):
        generator = torch.Generator().manual_seed(0)
        self.probs = torch.rand(STEPS, batch, TOPK, generator=generator).sort(-1, True).values
        self.log = log

    def layers(self, forward_batch):
        self.depth = 1
        self.log.append("layers")
        return self

    def layer_costs(self, costs):
        return costs._replace(
            overhead=costs.overhead + float(costs.draft[0]),
            draft=np.full_like(costs.draft, 1e-3),
        )

    def prepare(self, frontier):
        self.log.append("prepare")

    def run(self, frontier, width):
        self.log.append(f"run {width}")
        probs = self.probs[self.depth].repeat_interleave(width, dim=0)
        self.depth += 1
        return probs, torch.zeros(probs.shape, dtype=torch.int64)


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


def decider_of(policy, max_layers=STEPS, batch=2, width_graphs=None):
    """Return what decides as the policy does, in a step without costs."""
    decider = Decider(policy, max_missing=8, topk=TOPK, width_graphs=width_graphs)
    decider.begin_step(
        StepFacts(
            batch_size=batch,
            costs=None,
            weights=None,
            missing_rows=0,
            max_layers=max_layers,
            max_rows=12,
        )
    )
    return decider


def grow(drafter, model, widths, batch, seed, calibration=None):
    """Grow a tree of these widths.

    Returns:
        The widths that were run, the ranked nodes, all of them selected, and what the policy saw.
    """
    policy = Widths(widths)
    width_graphs = None if drafter.graphs is None else drafter.graphs.sizes
    growth = Growth(
        model=model,
        drafter=drafter,
        max_layers=STEPS,
        decider=decider_of(policy, batch=batch, width_graphs=width_graphs),
        calibration=calibration,
        reads=HostReads("cpu"),
        clock=PassClock("cpu"),
        recorder=None,
        room=StepRoom(STEPS, 1 + TOPK * STEPS, TOPK * STEPS),
        forward_batch=forward_batch(batch, seed),
        draws=Draws("cpu", seed=seed, topk=TOPK),
    )
    tree, grown = grow_tree(growth)
    ranked = tree.ranked(tree.num_candidates)
    return grown, ranked, tree.select(ranked, tree.num_candidates + 1), policy.seen
