"""Which backend runs how many rows, and a plain step as the decode pass that it is."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention import attention_registry
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_context, get_spec

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.serving.graphs.backends import PlainStepBackend, VerifyBackends
from cast_sglang.serving.graphs.passes import PassGraphs
from cast_sglang.serving.host_patches import passes as patches
from cast_sglang.serving.launch.backends import VERIFY_BACKENDS

ROWS, RESERVED = 8, 7


def backend_of(shape):
    return SimpleNamespace(shape=shape, max_context_len=40, max_num_pages=40, page_size=1)


@pytest.fixture
def built(monkeypatch):
    """Stand in for SGLang's backends, which are what the settings of the moment say."""
    backends = []

    def build(runner):
        spec = get_spec()
        shape = spec.speculative_num_draft_tokens, spec.speculative_eagle_topk
        backends.append(shape)
        return backend_of(shape)

    for name in VERIFY_BACKENDS:
        monkeypatch.setitem(attention_registry.ATTENTION_BACKENDS, name, build)
    given = {"speculative_num_draft_tokens": ROWS, "speculative_eagle_topk": 4}
    monkeypatch.setattr(patches, "slots_reserved", lambda: RESERVED)
    with get_context().override_server_args(speculative_algorithm="EAGLE3", **given):
        yield backends


SHARED = backend_of("shared")


def runner_on(name):
    vars(SHARED).update(vars(backend_of("shared")))
    return SimpleNamespace(
        attn_backend=SHARED,
        device="cpu",
        decode_attention_backend_str=name,
        decode_num_tokens_per_req=lambda: ROWS,
        decode_cuda_graph_runner="SGLang's own",
    )


@pytest.mark.parametrize("name", ["fa3", "trtllm_mha"])
def test_these_have_an_object_for_each_number_of_rows(built, name):
    backends = VerifyBackends(runner_on(name))
    assert backends.at(ROWS) is SHARED and built == []
    assert backends.at(5).shape == (5, 4) and backends.at(5) is backends.at(5)
    assert backends.at(3).shape == (3, 4)
    plain = backends.at(1)
    # One row is no tree, so that no cascade is laid out for it.
    assert isinstance(plain, PlainStepBackend) and plain.backend.shape == (1, 1)
    assert built == [(5, 4), (3, 4), (1, 1)]
    # Tables are as long as what a step near the limit of the context may write.
    for backend in (SHARED, backends.at(5), plain.backend):
        assert backend.max_context_len == backend.max_num_pages == 40 + RESERVED


def test_triton_runs_every_number_of_rows_and_decodes_plain_steps(built):
    backends = VerifyBackends(runner_on("triton"))
    assert all(backends.at(rows) is SHARED for rows in range(2, ROWS + 1))
    assert isinstance(backends.at(1), PlainStepBackend) and built == [(1, 1)]


def test_flashinfer_keeps_the_captured_passes_of_each_number_apart(built):
    runner = runner_on("flashinfer")
    SHARED.prefill_cuda_graph_metadata, SHARED.decode_cuda_graph_metadata = {4: "of all"}, {}
    SHARED.cuda_graph_kv_indices = "the one buffer"
    backends = VerifyBackends(runner)
    assert backends.at(ROWS) is SHARED and backends.at(5) is backends.at(5)
    for backend in (backends.at(5), backends.at(3), backends.at(1).backend):
        assert backend.prefill_cuda_graph_metadata == backend.decode_cuda_graph_metadata == {}
        backend.prefill_cuda_graph_metadata[4] = "its own"
        assert backend.cuda_graph_kv_indices is SHARED.cuda_graph_kv_indices
    assert SHARED.prefill_cuda_graph_metadata == {4: "of all"}
    assert isinstance(backends.at(1), PlainStepBackend) and built == []


@pytest.mark.parametrize("name", ["cast_cpu", None])
def test_other_backends_verify_the_root(built, name):
    backends = VerifyBackends(runner_on(name))
    assert all(backends.at(rows) is SHARED for rows in range(1, ROWS + 1))
    assert built == [] and backends.root_input(lambda batch: f"of {batch}", "two") == "of two"


@pytest.mark.parametrize("name", list(VERIFY_BACKENDS))
def test_no_mask_is_written_for_a_plain_step(built, name):
    batch = SimpleNamespace(
        seq_lens=torch.tensor([5, 9]), spec_info=SimpleNamespace(bonus_tokens=torch.tensor([3, 4]))
    )
    root = VerifyBackends(runner_on(name)).root_input(None, batch)
    assert len(root.custom_mask) == 0 and root.draft_token.tolist() == [3, 4]
    assert root.positions.tolist() == [5, 9] and root.draft_token_num == 1
    assert root.retrieve_index.tolist() == [[0], [1]] and root.max_tree_depth == 1
    assert (root.retrieve_next_token == -1).all() and (root.retrieve_next_sibling == -1).all()


def test_a_pass_runs_on_its_backend_with_its_graphs(built):
    runner = runner_on("fa3")
    backends, graphs = VerifyBackends(runner), PassGraphs(GraphSizes({2: (5, ROWS)}))
    graphs._runners = {5: "graph of five", ROWS: "graph of all"}
    with backends.running(5, 2, graphs):
        assert runner.attn_backend.shape == (5, 4)
        assert runner.decode_cuda_graph_runner == "graph of five"
    # Too many requests for a graph.
    with backends.running(5, 3, graphs):
        assert runner.attn_backend.shape == (5, 4) and runner.decode_cuda_graph_runner is None
    assert runner.attn_backend is SHARED
    runner.decode_cuda_graph_runner = "SGLang's own"
    with backends.running(ROWS, 3, None):
        assert (runner.attn_backend, runner.decode_cuda_graph_runner) == (SHARED, "SGLang's own")


class Decodes:
    """A backend that notes the batches of its passes, and attends to the lengths of its layout."""

    needs_cpu_seq_lens = False

    def __init__(self):
        self.seen, self.recorded = [], None

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        self.sizes = max_bs, max_num_tokens

    def init_forward_metadata(self, batch):
        self.seen.append(batch)
        self.recorded = batch.seq_lens

    def init_forward_metadata_out_graph(self, batch, in_capture=False):
        self.seen.append(batch)

    def init_forward_metadata_in_graph(self, batch):
        self.recorded = batch.seq_lens

    def forward_decode(self, q, k, v, layer, batch, save_kv_cache, **kwargs):
        assert batch.forward_mode == ForwardMode.DECODE and batch.spec_info is None
        return self.recorded.clone(), batch.out_cache_loc

    def shared_read_ends(self, mode):
        return mode


def verify_batch(lengths, **host):
    return SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        spec_info="verify's",
        batch_size=len(lengths),
        seq_lens=torch.tensor(lengths),
        seq_lens_cpu=None,
        seq_lens_sum=None,
        out_cache_loc="slots",
        **host,
    )


def attend(backend, batch):
    return backend.forward(None, None, None, None, batch, save_kv_cache=True)


def test_a_plain_step_decodes_with_its_row_in_the_lengths():
    backend = PlainStepBackend(Decodes(), "cpu")
    batch = verify_batch([5, 9])
    batch.seq_lens_cpu, batch.seq_lens_sum = torch.tensor([5, 9]), 14
    backend.init_forward_metadata(batch)
    lengths, slots = attend(backend, batch)
    assert lengths.tolist() == [6, 10] and slots == "slots"
    [decode] = backend.seen
    assert decode.seq_lens_cpu.tolist() == [6, 10] and decode.seq_lens_sum == 16
    # The batch itself is verify's, which samples and counts by it.
    assert batch.forward_mode == ForwardMode.TARGET_VERIFY and batch.seq_lens.tolist() == [5, 9]
    assert backend.shared_read_ends(ForwardMode.TARGET_VERIFY) == ForwardMode.DECODE
    assert not backend.needs_cpu_seq_lens


def test_a_captured_plain_step_reads_the_lengths_of_its_replay():
    backend = PlainStepBackend(Decodes(), "cpu")
    backend.init_cuda_graph_state(4, 4)
    assert backend.sizes == (4, 4)
    static = verify_batch([1, 1])
    backend.init_forward_metadata_out_graph(static, in_capture=True)

    def graph():
        backend.init_forward_metadata_in_graph(static)
        return attend(backend, static)[0]

    captured = graph()
    assert captured.tolist() == [2, 2]
    # A replay has a batch of its own, with what was copied to the static buffers.
    for lengths in ([5, 9], [3, 1]):
        static.seq_lens.copy_(torch.tensor(lengths))
        replayed = verify_batch(lengths)
        replayed.seq_lens = static.seq_lens
        backend.init_forward_metadata_out_graph(replayed)
        assert backend.seen[-1].seq_lens.tolist() == [length + 1 for length in lengths]
        assert graph().tolist() == [length + 1 for length in lengths]
    # All of them stand in one place, as a graph needs it.
    assert len({batch.seq_lens.data_ptr() for batch in backend.seen}) == 1
