"""The draft worker's own part of a step, around SGLang's passes; whole steps: `tests/server`."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative import eagle_worker_common
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.serving.copies import Copies
from cast_sglang.serving.drafting import worker as module
from cast_sglang.serving.drafting.backlog import Backlog
from cast_sglang.serving.drafting.draws import Draws
from cast_sglang.serving.drafting.eagle import EagleDrafter
from cast_sglang.serving.drafting.tools import StepTools
from cast_sglang.serving.drafting.worker import CastDraftWorker
from cast_sglang.serving.graphs.passes import PassGraphs
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.pass_clock import PassClock
from cast_sglang.serving.step_room import StepRoom
from tests.support.copies import DEVICE, watched_copies
from tests.support.copying_server import Request
from tests.support.drafts import HIDDEN, STEPS, TOPK, FakeModel, Widths, decider_of, forward_batch

ROWS, CONTEXT, SLOTS = 12, 40, 9


def make_worker(decider=None, is_ragged=False, max_rows=ROWS):
    """Return a worker without SGLang's part."""
    worker = CastDraftWorker.__new__(CastDraftWorker)
    worker.device, worker.topk, worker.speculative_num_steps = "cpu", TOPK, STEPS
    worker.speculative_num_draft_tokens = worker.max_draft_tokens = ROWS
    worker.cuda_graph_runner_for_draft_extend = worker._plain_input = worker.extend_graphs = None
    worker._no_children = None
    worker._last_layer = worker._narrows = worker.draft_extend_attn_backend = None
    runner = SimpleNamespace(decode_attention_backend_str="triton")
    worker.target_worker = SimpleNamespace(model_runner=runner)
    worker.draft_runner = SimpleNamespace(attn_backend=SimpleNamespace(packed_rows=None))
    table = torch.arange(1000, 1000 + SLOTS * CONTEXT).view(SLOTS, CONTEXT).int()
    worker.req_to_token_pool = SimpleNamespace(req_to_token=table)
    worker.model = FakeModel()
    worker.drafter = EagleDrafter(worker.model, STEPS)
    worker.tools = StepTools(
        decider=decider,
        calibration=None,
        reads=HostReads("cpu"),
        clock=PassClock("cpu"),
        recorder=None,
        backlog=Backlog(SLOTS, 4),
        is_ragged=is_ragged,
        graph_plan=None,
        verify_sizes=(2, 5, ROWS),
        room=StepRoom(STEPS, max_rows, TOPK * STEPS),
        draws=Draws("cpu", seed=0, topk=TOPK),
    )
    return worker


def batch_of(slots, seq_lens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = len(slots)
    return SimpleNamespace(
        reqs=[object()] * size,
        req_pool_indices=torch.tensor(slots),
        req_pool_indices_cpu=torch.tensor(slots),
        seq_lens=torch.tensor(seq_lens),
        seq_lens_cpu=torch.tensor(seq_lens),
        seq_lens_sum=sum(seq_lens),
        spec_info=EagleDraftInput(
            topk_p=torch.rand(size, TOPK, generator=generator),
            topk_index=torch.randint(50, (size, TOPK), generator=generator),
            hidden_states=torch.rand(size, HIDDEN, generator=generator),
        ),
    )


def result_of(num_requests, width, accept_lens):
    """Return what verify hands to draft extend; states and tokens tell the rows."""
    rows = torch.arange(num_requests * width)
    return GenerationBatchResult(
        logits_output=LogitsProcessorOutput(None, rows.float().unsqueeze(1).repeat(1, HIDDEN)),
        next_token_ids=rows,
        accept_lens=torch.tensor(accept_lens, dtype=torch.int32),
        accept_index=torch.zeros(num_requests, width, dtype=torch.int32),
        next_draft_input=EagleDraftInput(),
        speculative_num_draft_tokens=width,
    )


@pytest.fixture
def extended(monkeypatch):
    """Stand in for SGLang's draft extend; collect what it is given, and propose sevens."""
    calls = []

    def extend(self, batch, result, **kwargs):
        seen = SimpleNamespace(
            batch=batch,
            result=result,
            width=self.speculative_num_draft_tokens,
            graph=self.cuda_graph_runner_for_draft_extend,
            packed_rows=self.draft_runner.attn_backend.packed_rows,
        )
        calls.append(seen)
        size = len(batch.seq_lens)
        result.next_draft_input.topk_p = torch.full((size, TOPK), 7.0)
        result.next_draft_input.topk_index = torch.full((size, TOPK), 7)
        result.next_draft_input.hidden_states = torch.full((size, HIDDEN), 7.0)

    monkeypatch.setattr(EagleDraftWorker, "_draft_extend_for_decode", extend)
    return calls


def test_a_plain_step_is_kept_until_the_draft_catches_up(extended):
    worker, batch = make_worker(), batch_of([3, 5], [10, 20])
    before = batch.spec_info
    for step in range(2):
        result = result_of(2, 1, [1, 1])
        result.next_token_ids += 100 * step
        with worker.plain_step(before):
            worker._draft_extend_for_decode(batch, result)
        assert worker.last_extend_rows == 0
        # What the scheduler keeps has the shape of the next roots' children.
        assert torch.equal(result.next_draft_input.topk_p, before.topk_p)
        assert torch.equal(result.next_draft_input.hidden_states, before.hidden_states)
        batch.seq_lens, batch.seq_lens_cpu = batch.seq_lens + 1, batch.seq_lens_cpu + 1
    assert extended == [] and worker.tools.backlog.num_missing(np.array([3, 5])) == 2
    worker.catch_up(batch)
    [seen] = extended
    assert seen.width == 2 and seen.result.next_token_ids.tolist() == [0, 100, 1, 101]
    assert seen.batch.seq_lens.tolist() == [10, 20] and seen.batch.seq_lens_sum == 30
    table = worker.req_to_token_pool.req_to_token
    assert seen.batch.out_cache_loc.tolist() == [*table[3, 10:12], *table[5, 20:22]]
    assert (batch.spec_info.topk_index == 7).all()
    # The batch itself stays where it is, and nothing is left to do.
    assert batch.seq_lens.tolist() == [12, 22]
    worker.catch_up(batch)
    assert len(extended) == 1


def test_prompts_are_left_out_where_nothing_is_drafted_behind_them(monkeypatch):
    calls, first = [], batch_of([3], [10]).spec_info
    first.num_tokens_per_req = 1

    def prefill(self, batch, hidden_states, next_token_ids):
        calls.append(next_token_ids.tolist())
        return first

    monkeypatch.setattr(EagleDraftWorker, "_draft_extend_for_prefill", prefill)
    worker, batch = make_worker(), batch_of([3, 5], [10, 20])
    batch.forward_mode, batch.extend_lens = SimpleNamespace(is_idle=lambda: False), [4, 7]

    def prefilled(leaves_out, tokens):
        worker.tools.num_left_out = 2 * leaves_out
        return worker._draft_extend_for_prefill(batch, None, torch.tensor(tokens))

    # What the children look like is known after the first prefill.
    assert prefilled(True, [1, 2]) is first and prefilled(False, [3, 4]) is first
    left_out = prefilled(True, [5, 6])
    assert calls == [[1, 2], [3, 4]]
    # The first one compiles.
    assert [rows for rows, _ in worker.tools.clock.finished_prefills()] == [11]
    assert left_out.bonus_tokens.tolist() == [5, 6] and left_out.num_tokens_per_req == 1
    # SGLang joins them with those of other prefills.
    for name in ("topk_p", "topk_index", "hidden_states"):
        joined = torch.cat([getattr(first, name), getattr(left_out, name)])
        assert len(joined) == 3 and joined.dtype == getattr(first, name).dtype


def test_only_a_request_that_lacks_rows_gets_new_children(extended):
    worker = make_worker()
    alone = batch_of([5], [20])
    for _ in range(2):
        with worker.plain_step(alone.spec_info):
            worker._draft_extend_for_decode(alone, result_of(1, 1, [1]))
    batch = batch_of([3, 5], [10, 22])
    before = batch.spec_info.topk_p.clone()
    worker.catch_up(batch)
    [seen] = extended
    assert seen.batch.seq_lens.tolist() == [10, 20]
    assert seen.result.accept_lens.tolist() == [1, 2]
    # What lies behind a request's end may be another's by now, so these rows go to the dummy slot.
    table = worker.req_to_token_pool.req_to_token
    assert seen.batch.out_cache_loc.tolist() == [0, 0, *table[5, 20:22]]
    assert torch.equal(batch.spec_info.topk_p[0], before[0])
    assert batch.spec_info.topk_p[1].tolist() == [7.0] * TOPK


def test_without_lengths_on_the_host_none_are_made_up(extended):
    worker, batch = make_worker(), batch_of([3], [10])
    with worker.plain_step(batch.spec_info):
        worker._draft_extend_for_decode(batch, result_of(1, 1, [1]))
    batch.seq_lens_cpu = batch.seq_lens_sum = None
    worker.catch_up(batch)
    assert extended[0].batch.seq_lens_cpu is None and extended[0].batch.seq_lens.tolist() == [9]


def test_draft_extend_runs_the_columns_that_were_accepted(extended):
    worker, batch = make_worker(), batch_of([3, 5], [10, 20])
    batch.out_cache_loc = torch.arange(10)
    result = result_of(2, 5, [1, 3])
    worker._draft_extend_for_decode(batch, result)
    [seen] = extended
    assert seen.width == worker.last_extend_rows == 3
    assert seen.result.next_token_ids.tolist() == [0, 1, 2, 5, 6, 7]
    assert seen.batch.out_cache_loc.tolist() == [0, 1, 2, 5, 6, 7]
    assert seen.packed_rows is None
    # The scheduler still reads all that verify has found.
    assert len(result.next_token_ids) == 10 and worker.speculative_num_draft_tokens == ROWS


def test_rows_that_hold_nothing_are_not_run_where_they_can_be_left_out(extended):
    worker, batch = make_worker(is_ragged=True), batch_of([3, 5], [10, 20])
    batch.out_cache_loc = torch.arange(10)
    worker.draft_runner.forward = None
    worker._draft_extend_for_decode(batch, result_of(2, 5, [1, 3]))
    [seen] = extended
    assert seen.packed_rows.tolist() == [0, 3, 4, 5]
    assert worker.last_extend_rows == 2.0 and worker.draft_runner.attn_backend.packed_rows is None


@pytest.mark.parametrize(("accepted", "width", "graph"), [(3, 4, "four"), (5, 5, None)])
def test_captured_draft_extend_takes_the_next_size_that_was_verified(
    extended, accepted, width, graph
):
    worker, batch = make_worker(), batch_of([3, 5], [10, 20])
    worker.extend_graphs = PassGraphs(GraphSizes({2: (2, 4, 8)}))
    worker.extend_graphs._runners = {2: "two", 4: "four", 8: "eight"}
    worker.draft_extend_attn_backend = SimpleNamespace(num_draft_tokens=ROWS)
    batch.out_cache_loc = torch.arange(2 * 6)
    worker._draft_extend_for_decode(batch, result_of(2, 6, [1, accepted]))
    [seen] = extended
    assert (seen.width, seen.graph) == (width, graph) and worker.last_extend_rows == width
    assert worker.cuda_graph_runner_for_draft_extend is None


def test_the_servers_width_is_back_after_an_error():
    worker = make_worker()
    with pytest.raises(RuntimeError), worker._width(3, 2):
        assert worker.speculative_num_draft_tokens == 3
        raise RuntimeError
    assert worker.speculative_num_draft_tokens == ROWS
    with pytest.raises(RuntimeError), worker.plain_step("input"):
        assert worker._plain_input == "input"
        raise RuntimeError
    assert worker._plain_input is None


class Verifies(Widths):
    """A policy of given widths and rows."""

    def __init__(self, widths, num_rows):
        super().__init__(widths)
        self.num_rows = num_rows

    def rerank(self, scores, costs):
        return self.num_rows


@pytest.fixture
def built(monkeypatch):
    """Stand in for SGLang's preparation of a step and for its tree builder; collect its input."""
    calls = []

    def build(batch, draft_input, parents, index, tokens, probs, **sizes):
        calls.append(SimpleNamespace(parents=parents, numbers=index, tokens=tokens, **sizes))
        links = torch.tensor([[1, -1], [1, -1]])
        # The second request has siblings, the first one has none.
        siblings = torch.tensor([[-1, -1], [-1, 2]])[: len(tokens)]
        return SimpleNamespace(
            retrieve_next_token=links[: len(tokens)], retrieve_next_sibling=siblings
        )

    monkeypatch.setattr(eagle_worker_common, "build_eagle_verify_input", build)
    monkeypatch.setattr(
        module,
        "prepare_for_draft",
        lambda draft_input, pool, batch, *args: (forward_batch(len(batch.reqs), 1), None, None),
    )
    return calls


@pytest.mark.parametrize(
    ("num_layers", "num_rows", "longest"), [(4, 8, 4), (2, 8, 2), (4, 3, 2), (1, 2, 1)]
)
def test_a_step_verifies_what_was_decided(built, num_layers, num_rows, longest):
    policy = Verifies([3, 1, 2][: num_layers - 1], num_rows)
    worker, batch = make_worker(decider_of(policy)), batch_of([3, 5], [10, 20])
    num_rows = min(num_rows, 1 + TOPK * (1 + sum([3, 1, 2][: num_layers - 1])))
    verify_input = worker.draft(batch)
    [seen] = built
    assert seen.num_draft_tokens == num_rows and seen.tokens.shape == (2, num_rows - 1)
    assert verify_input.topk == TOPK and verify_input.spec_steps == longest
    rows = [-1] + [int(n) // num_rows for n in seen.numbers[0]]
    depths = [0]
    for row in rows[1:]:
        depths.append(depths[row] + 1)
    assert max(depths) <= num_layers
    shape = worker.last_shape
    assert shape == ((3, 1, 2)[: num_layers - 1], num_rows, None, longest)
    assert not verify_input.is_path and verify_input.num_rows is None


def test_no_more_is_verified_than_there_is_room_for(built):
    worker = make_worker(decider_of(Verifies([3, 3], 12)), max_rows=5)
    worker.draft(batch_of([3, 5], [10, 20]))
    assert built[0].num_draft_tokens == 5


def test_a_lone_path_is_known_as_one(built):
    worker = make_worker(decider_of(Verifies([1], 3), batch=1))
    assert worker.draft(batch_of([3], [10])).is_path


def test_a_request_that_wants_no_drafts_has_only_its_root(built):
    worker = make_worker(decider_of(Verifies([2], 4)))
    worker.tools.weights = np.array([0.0, 1.0])
    verify_input = worker.draft(batch_of([3, 5], [10, 20]))
    assert verify_input.retrieve_next_token.tolist() == [[-1, -1], [1, -1]]


def rooted(slot, text, is_greedy=True):
    """A batch of one request whose text, prompt and answer, ends with its root."""
    batch = batch_of([slot], [len(text) - 1])
    top_k = 1 if is_greedy else 20
    batch.reqs = [
        Request(
            rid="a",
            origin_input_ids=text[:-1],
            output_ids=text[-1:],
            sampling_params=SimpleNamespace(top_k=top_k, custom_params=None),
        )
    ]
    batch.spec_info.bonus_tokens = torch.tensor(text[-1:])
    return batch


def copying_worker(policy, copy_depth=STEPS, **options):
    worker = make_worker(decider_of(policy, batch=1), **options)
    worker.tools.room = worker.tools.room._replace(copy_depth=copy_depth)
    worker.tools.copies = Copies(
        worker.tools.reads, topk=TOPK, num_nodes=ROWS - 1, max_tokens=1000, vocab_size=300
    )
    return worker


@pytest.mark.parametrize("copy_depth", [STEPS, STEPS + 1])
def test_copies_hang_below_the_root_and_below_each_other(built, copy_depth):
    """Deeper than the drafted layers, and no deeper than the step has room for."""
    worker = copying_worker(Verifies([], ROWS), copy_depth)
    verify_input = worker.draft(rooted(3, [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]))
    [seen] = built
    tokens, num_rows = [2, *seen.tokens[0].tolist()], seen.num_draft_tokens
    parents = [-1, *(int(number) // num_rows for number in seen.numbers[0])]
    for above, below in ((2, 3), (3, 4), (4, 5)):
        assert tokens[parents[tokens.index(below)]] == above
    assert verify_input.spec_steps == worker.last_shape.depth == copy_depth
    assert (8 in tokens) == (copy_depth > STEPS)  # the root's sixth descendant


def test_a_request_without_copies_gets_the_tree_that_it_would_have_had(built):
    """A text that repeats nothing, and a request that another row stands for."""
    policy = Verifies([2], 6)
    make_worker(decider_of(policy, batch=1)).draft(rooted(3, [1, 2, 3]))
    for is_greedy in (True, False):
        copying_worker(Verifies([2], 6)).draft(rooted(3, [1, 2, 3], is_greedy))
    for seen in built[1:]:
        assert torch.equal(seen.numbers, built[0].numbers)
    assert torch.equal(built[1].tokens, built[0].tokens)


def test_what_the_draft_lacks_is_made_up_for_before_a_tree_grows(built, extended):
    worker, batch = make_worker(decider_of(Verifies([2], 4))), batch_of([3, 5], [10, 20])
    with worker.plain_step(batch.spec_info):
        worker._draft_extend_for_decode(batch, result_of(2, 1, [1, 1]))
    worker.draft(batch)
    assert len(extended) == 1 and (batch.spec_info.topk_index == 7).all()


def on_device(batch):
    """Move what a scheduler keeps on the device; lengths and places on the host stay."""
    for name in ("req_pool_indices", "seq_lens"):
        setattr(batch, name, getattr(batch, name).to(DEVICE))
    for name in ("topk_p", "topk_index", "hidden_states"):
        setattr(batch.spec_info, name, getattr(batch.spec_info, name).to(DEVICE))
    return batch


def test_nothing_waits_while_the_draft_catches_up(extended, monkeypatch):
    worker, batch = make_worker(), on_device(batch_of([3, 5], [10, 20]))
    worker.device = DEVICE
    worker.req_to_token_pool.req_to_token = worker.req_to_token_pool.req_to_token.to(DEVICE)
    result = result_of(2, 1, [1, 1])
    result.logits_output.hidden_states = result.logits_output.hidden_states.to(DEVICE)
    result.next_token_ids = result.next_token_ids.to(DEVICE)

    def children(self, batch, result, **kwargs):
        result.next_draft_input = batch_of([3, 5], [10, 20]).spec_info
        for name in ("topk_p", "topk_index", "hidden_states"):
            value = getattr(result.next_draft_input, name)
            setattr(result.next_draft_input, name, torch.empty_like(value, device=DEVICE))

    monkeypatch.setattr(EagleDraftWorker, "_draft_extend_for_decode", children)
    with watched_copies(monkeypatch) as spy:
        with worker.plain_step(batch.spec_info):
            worker._draft_extend_for_decode(batch, result)
        worker.catch_up(batch)
    assert spy.num_copies == 3 and spy.waits == []


def test_nothing_waits_to_leave_out_requests_that_want_no_drafts(monkeypatch):
    worker, batch = make_worker(decider_of(Verifies([], 3))), batch_of([3, 5], [10, 20])
    worker.device, worker.tools.weights = DEVICE, np.array([0.0, 1.0])
    links = torch.empty(2, 3, dtype=torch.int64, device=DEVICE)
    rows = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    selection = SimpleNamespace(parent_rows=rows, top_scores_index=0, draft_tokens=0)
    tree = SimpleNamespace(
        num_layers=1,
        ranked=lambda most: SimpleNamespace(scores=torch.rand(2, 4)),
        select=lambda *args: selection,
    )
    monkeypatch.setattr(module, "grow_tree", lambda growth: (tree, ()))
    monkeypatch.setattr(module, "prepare_for_draft", lambda *args: (None, None, None))
    monkeypatch.setattr(
        eagle_worker_common,
        "build_eagle_verify_input",
        lambda *args, **sizes: SimpleNamespace(
            retrieve_next_token=links, retrieve_next_sibling=links
        ),
    )
    with watched_copies(monkeypatch) as spy:
        worker.draft(batch)
    assert spy.num_copies == 1 and spy.waits == []
