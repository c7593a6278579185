"""What is changed around single passes: what then runs, and that it is put back."""

from types import SimpleNamespace

import pytest
import torch
from sglang.kernels.ops.speculative.spec_tree import TreeMaskMode
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.attention.verify_mask import VerifyMask
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_context, get_spec
from sglang.srt.speculative import eagle_worker_common

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.errors import HostError
from cast_sglang.serving.host_patches.passes import (
    building_backend,
    capturing_size,
    counted_capture,
    extend_rows,
    keeping_buffers,
    last_rows_only,
    leave_prefix_unmasked,
    packed_pass,
    running_on,
    sharing_buffers,
)
from cast_sglang.serving.row_packing import find_packed_rows, last_rows

WIDTH = 3


class Runner:
    """A model that states of each row what it got."""

    def __init__(self):
        self.attn_backend = SimpleNamespace(packed_rows=None)
        self.seen = None

    def forward(self, forward_batch):
        self.seen = forward_batch.input_ids, self.attn_backend.packed_rows
        states = forward_batch.spec_info.hidden_states + forward_batch.positions[:, None]
        logits = torch.stack((forward_batch.input_ids, forward_batch.out_cache_loc), dim=1)
        return SimpleNamespace(
            logits_output=LogitsProcessorOutput(
                next_token_logits=logits, hidden_states=states, last_hidden_states=states + 1
            )
        )


def layout(batch_size):
    rows = torch.arange(batch_size * WIDTH)
    return SimpleNamespace(
        input_ids=10 + rows,
        positions=100 + rows,
        out_cache_loc=1000 + rows,
        spec_info=SimpleNamespace(hidden_states=rows[:, None].float()),
    )


def test_only_packed_rows_run_and_their_outputs_stand_in_their_places():
    runner, whole, packed = Runner(), layout(2), layout(2)
    everything = runner.forward(whole).logits_output
    packed_rows = find_packed_rows(torch.tensor([1, 2]), WIDTH)
    with packed_pass(runner, packed_rows):
        output = runner.forward(packed).logits_output
    assert runner.seen[0].tolist() == [10, 13, 14] and runner.seen[1] is packed_rows
    for name in ("next_token_logits", "hidden_states", "last_hidden_states"):
        ours, theirs = getattr(output, name), getattr(everything, name)
        assert ours.shape == theirs.shape
        assert torch.equal(ours[packed_rows], theirs[packed_rows])
        assert ours.sum() == theirs[packed_rows].sum()  # zeros elsewhere


def test_afterwards_all_rows_run_again_even_after_an_error():
    runner = Runner()
    with packed_pass(runner, None):
        assert len(runner.forward(layout(2)).logits_output.hidden_states) == 2 * WIDTH
    broken = layout(2)
    broken.positions = None
    with (
        pytest.raises(TypeError),
        packed_pass(runner, find_packed_rows(torch.tensor([1, 2]), WIDTH)),
    ):
        runner.forward(broken)
    assert runner.attn_backend.packed_rows is None
    assert len(runner.forward(layout(2)).logits_output.hidden_states) == 2 * WIDTH


class Layer(torch.nn.Module):
    """The parts of a decoder layer by the names that EAGLE-3's has, each row on its own."""

    def __init__(self, hidden=4):
        super().__init__()
        self.self_attn = torch.nn.Module()
        self.self_attn.o_proj = torch.nn.Linear(hidden, hidden)
        self.post_attention_layernorm = AddedNorm()
        self.seen = []

    def forward(self, attended, residual):
        hidden, residual = self.post_attention_layernorm(self.self_attn.o_proj(attended), residual)
        self.seen.append(len(hidden))
        return hidden * 2.0, residual


class AddedNorm(torch.nn.Module):
    def forward(self, hidden, residual):
        return torch.tanh(hidden + residual), hidden + residual


class LayerRunner:
    """A model of one layer over `hidden_states`."""

    def __init__(self):
        self.attn_backend = SimpleNamespace(packed_rows=None)
        self.layer = Layer()

    def forward(self, forward_batch):
        states = forward_batch.spec_info.hidden_states
        hidden, residual = self.layer(states, states + 1.0)
        return SimpleNamespace(
            logits_output=LogitsProcessorOutput(next_token_logits=hidden, hidden_states=residual)
        )


def filled_layout(batch_size):
    batch = layout(batch_size)
    generator = torch.Generator().manual_seed(1)
    batch.spec_info.hidden_states = torch.randn(batch_size * WIDTH, 4, generator=generator)
    return batch


@pytest.mark.parametrize("num_rows", [(2, 1, 3), (WIDTH, WIDTH, WIDTH), (1, 1, 1)])
def test_the_last_layer_goes_on_with_the_rows_that_are_read(num_rows):
    runner, num_rows = LayerRunner(), torch.tensor(num_rows)
    everything = runner.forward(filled_layout(3)).logits_output
    packed_rows, read = find_packed_rows(num_rows, WIDTH), last_rows(num_rows, WIDTH)
    with packed_pass(runner, packed_rows, runner.layer, read):
        output = runner.forward(filled_layout(3)).logits_output
    assert runner.layer.seen == [3 * WIDTH, 3]
    for name in ("next_token_logits", "hidden_states"):
        ours, theirs = getattr(output, name), getattr(everything, name)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours[read], theirs[read])
        assert ours.count_nonzero() == theirs[read].count_nonzero()
    runner.forward(filled_layout(3))
    assert runner.layer.seen[-1] == 3 * WIDTH


def test_a_pass_ends_at_the_last_row_of_each_request():
    layer, norm = Layer(), AddedNorm()
    states = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    last = torch.tensor([3, 1, 3]).cumsum(0) - 1

    def run():
        return norm(*layer(states, states + 1.0))

    everything = run()
    with last_rows_only(norm, layer, last):
        ours = run()
    assert layer.seen == [7, 3]
    for some, whole in zip(ours, everything, strict=True):
        assert some.shape == whole.shape
        torch.testing.assert_close(some[last], whole[last])
        assert some.count_nonzero() == whole[last].count_nonzero()
    torch.testing.assert_close(run(), everything)


def test_passes_run_on_a_backend_and_prompts_go_back_to_the_runners_own():
    runner = SimpleNamespace(attn_backend="own", decode_cuda_graph_runner="SGLang's own")
    with pytest.raises(RuntimeError), running_on(runner, "of 5 rows", None):
        assert runner.attn_backend == "of 5 rows" and runner.decode_cuda_graph_runner is None
        raise RuntimeError
    assert runner.attn_backend == "own"


@pytest.mark.parametrize(("rows", "topk"), [(5, 3), (1, 1)])
def test_a_backend_is_built_for_its_rows(rows, topk):
    given = {"speculative_num_draft_tokens": 32, "speculative_eagle_topk": 3}

    def seen():
        spec = get_spec()
        return spec.speculative_num_draft_tokens, spec.speculative_eagle_topk

    with get_context().override_server_args(speculative_algorithm="EAGLE3", **given):
        with pytest.raises(RuntimeError), building_backend(rows):
            assert seen() == (rows, topk)
            raise RuntimeError
        assert seen() == (32, 3)


def test_tables_as_long_as_the_context_are_there_once():
    class Backend:
        """As much as there is of a backend that keeps its buffers by name."""

        def __init__(self, rows):
            self.rows, self._verify_mask = rows, None

        def init_cuda_graph_state(self, max_bs, max_num_tokens):
            self._verify_mask = f"of {self.rows}"
            self.verify = {
                "page_table": torch.zeros(max_bs, 50),
                "cu_seqlens_q": torch.arange(max_bs + 1) * self.rows,
                max_bs: "metadata",
            }
            self.expand = {"page_table": torch.zeros(max_bs * self.rows, self.rows)}

    owner, backend = Backend(8), Backend(3)
    owner.init_cuda_graph_state(4, 32)
    with sharing_buffers(backend, owner):
        backend.init_cuda_graph_state(2, 6)
    table = backend.verify["page_table"]
    assert table.data_ptr() == owner.verify["page_table"].data_ptr() and len(table) == 2
    assert backend._verify_mask == "of 8"
    # What depends on the rows is each backend's own.
    assert backend.verify["cu_seqlens_q"].tolist() == [0, 3, 6] and backend.verify[2] == "metadata"
    assert backend.expand["page_table"].shape == (6, 3)
    backend.init_cuda_graph_state(2, 6)
    assert backend._verify_mask == "of 3"


def test_draft_extends_rows_are_put_back():
    backend = SimpleNamespace(num_draft_tokens=32)
    with pytest.raises(RuntimeError), extend_rows(backend, 3):
        assert backend.num_draft_tokens == 3
        raise RuntimeError
    assert backend.num_draft_tokens == 32


def test_buffers_are_kept_while_graphs_are_captured():
    class Backend:
        buffers = 0

        def init_cuda_graph_state(self, *args, **kwargs):
            self.buffers += 1

    backend = Backend()
    with keeping_buffers(backend):
        backend.init_cuda_graph_state(8, 32)
    assert backend.buffers == 0
    backend.init_cuda_graph_state(8, 32)
    assert backend.buffers == 1


def test_a_size_is_captured_by_its_own_arguments(monkeypatch):
    from sglang.srt import runtime_context
    from sglang.srt.model_executor import cuda_graph_config

    seen = []
    context = SimpleNamespace(override=lambda name, **values: seen.append(values))
    graph = SimpleNamespace(cuda_graph_config="all")
    monkeypatch.setattr(runtime_context, "get_context", lambda: context)
    monkeypatch.setattr(runtime_context, "get_exec", lambda: SimpleNamespace(graph=graph))
    spec = SimpleNamespace(speculative_num_draft_tokens=32)
    monkeypatch.setattr(runtime_context, "get_spec", lambda: spec)
    monkeypatch.setattr(cuda_graph_config, "with_phase", lambda config, phase, bs: (config, bs))
    with pytest.raises(HostError, match="of 5 rows per request failed: broken; pass --cast-graphs"):
        with capturing_size(5, [1, 8]):
            raise RuntimeError("broken")
    assert seen == [
        {"cuda_graph_config": ("all", [1, 8]), "speculative_num_draft_tokens": 5},
        {"cuda_graph_config": "all", "speculative_num_draft_tokens": 32},
    ]


ROWS, LONGEST, CAPTURED = 4, 50, 3


def triton_backend(**changes):
    """SGLang's backend with the mask of captured verify passes, without a model behind it."""
    backend = object.__new__(TritonAttnBackend)
    cells = CAPTURED * ROWS * (LONGEST + ROWS)
    buffer = torch.full((cells,), 7, dtype=torch.uint8)
    mask = VerifyMask(buffer=buffer, mode=TreeMaskMode.FULL_MASK, max_bs=CAPTURED)
    own = {"_verify_mask": mask, "enable_deterministic": False, "device": "cpu"}
    vars(backend).update({**own, **changes})
    return backend


def hybrid(decode):
    backend = object.__new__(HybridAttnBackend)
    backend.prefill_backend, backend.decode_backend = SimpleNamespace(), decode
    backend.spec_attn_is_decode = True
    return backend


@pytest.mark.parametrize("wrap", [lambda backend: backend, hybrid], ids=["alone", "split"])
def test_the_prefix_of_the_verify_mask_is_not_filled(wrap, monkeypatch):
    """What SGLang's builder does with the buffer: it leaves all to the kernel of the tree."""
    backend = triton_backend()
    leave_prefix_unmasked(wrap(backend), "triton")
    mask, filled = backend.verify_mask, []
    monkeypatch.setattr(
        eagle_worker_common,
        "build_tree_kernel_efficient",
        lambda *args, **kwargs: (filled.append(kwargs["fill_prefix_mask"]), *range(5)),
    )
    runner = SimpleNamespace(attn_backend=wrap(backend))
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE, seq_lens=torch.tensor([9, 4]), seq_lens_sum=13
    )
    draft_input = SimpleNamespace(bonus_tokens=None)
    nodes = torch.zeros(2, ROWS - 1, dtype=torch.int64)
    eagle_worker_common.build_eagle_verify_input(
        batch,
        draft_input,
        nodes,
        nodes,
        nodes,
        None,
        target_worker=SimpleNamespace(model_runner=runner),
        topk=2,
        num_steps=2,
        num_draft_tokens=ROWS,
        tree_mask_mode=TreeMaskMode.FULL_MASK,
        device="cpu",
    )
    assert filled == [False] and (mask.buffer == 7).all()


def test_a_mask_of_which_the_prefix_is_read_is_filled():
    backend = triton_backend(enable_deterministic=True)
    leave_prefix_unmasked(backend, "triton")
    assert backend.verify_mask.is_read
    # `fa3` gathers the cells among the rows, whatever the kernels.
    leave_prefix_unmasked(backend, "fa3")
    assert not backend.verify_mask.is_read


def test_other_backends_keep_their_mask():
    backend = SimpleNamespace(verify_mask=None)
    leave_prefix_unmasked(backend, "flashinfer")
    assert vars(backend) == {"verify_mask": None}


def test_what_graphs_take_is_counted_among_sglangs(monkeypatch, caplog):
    free = iter([10.0, 7.5])
    monkeypatch.setattr(
        "sglang.srt.utils.common.get_available_gpu_memory", lambda device, number: next(free)
    )
    # What SGLang has captured by then.
    runner = SimpleNamespace(
        device="cuda",
        gpu_id=0,
        graph_memory_usage={"target_verify": 1.0},
        graph_time_usage={"target_verify": 2.0},
    )
    sizes = GraphSizes({1: (1, 4), 8: (4,)})
    with caplog.at_level("INFO"), counted_capture(runner, "target_verify", "verify, rows", sizes):
        pass
    assert runner.graph_memory_usage == {"target_verify": 3.5}
    assert runner.graph_time_usage["target_verify"] >= 2.0
    assert "captured 3 graphs of verify, rows at batch 1: 1,4; batch 8: 4 in 0.0 s, 2.50 GB" in (
        caplog.text
    )
