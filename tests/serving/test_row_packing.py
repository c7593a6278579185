"""Passes over requests of unequal numbers of rows: what is run, and where its outputs land."""

from types import SimpleNamespace

import pytest
import torch

from cast_sglang.cpu.attention import CastCpuAttnBackend
from cast_sglang.cpu.reads import causal_read
from cast_sglang.serving.row_packing import (
    ending_at,
    kept_rows,
    last_layer,
    last_rows,
    running_only,
    runs_kept_rows,
)

WIDTH = 3


class Runner:
    """A model that states of each row what it got."""

    def __init__(self):
        self.attn_backend = SimpleNamespace(kept_rows=None)
        self.seen = None

    def forward(self, forward_batch):
        self.seen = forward_batch.input_ids, self.attn_backend.kept_rows
        states = forward_batch.spec_info.hidden_states + forward_batch.positions[:, None]
        logits = torch.stack((forward_batch.input_ids, forward_batch.out_cache_loc), dim=1)
        return SimpleNamespace(
            logits_output=SimpleNamespace(next_token_logits=logits, hidden_states=states)
        )


def layout(batch_size):
    rows = torch.arange(batch_size * WIDTH)
    return SimpleNamespace(
        input_ids=10 + rows,
        positions=100 + rows,
        out_cache_loc=1000 + rows,
        spec_info=SimpleNamespace(hidden_states=rows[:, None].float()),
    )


def test_kept_rows_are_the_first_of_each_request():
    assert kept_rows(torch.tensor([1, 3, 2]), WIDTH).tolist() == [0, 3, 4, 5, 6, 7]
    assert kept_rows(torch.tensor([WIDTH, WIDTH]), WIDTH) is None


def test_only_kept_rows_run_and_their_outputs_stand_in_their_places():
    runner, whole, packed = Runner(), layout(2), layout(2)
    everything = runner.forward(whole).logits_output
    kept = kept_rows(torch.tensor([1, 2]), WIDTH)
    with running_only(runner, kept):
        output = runner.forward(packed).logits_output
    assert runner.seen[0].tolist() == [10, 13, 14] and runner.seen[1] is kept
    for name in ("next_token_logits", "hidden_states"):
        ours, theirs = getattr(output, name), getattr(everything, name)
        assert ours.shape == theirs.shape
        assert torch.equal(ours[kept], theirs[kept])
        assert ours.sum() == theirs[kept].sum()  # zeros elsewhere


def test_afterwards_all_rows_run_again_even_after_an_error():
    runner = Runner()
    with running_only(runner, None):
        assert len(runner.forward(layout(2)).logits_output.hidden_states) == 2 * WIDTH
    broken = layout(2)
    broken.positions = None
    with pytest.raises(TypeError), running_only(runner, kept_rows(torch.tensor([1, 2]), WIDTH)):
        runner.forward(broken)
    assert runner.attn_backend.kept_rows is None
    assert len(runner.forward(layout(2)).logits_output.hidden_states) == 2 * WIDTH


def test_attention_of_kept_rows_is_that_of_all_rows():
    """Each row sees what it would see among all of its request's rows."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, head_dim, num_slots = 4, 2, 8, 40
    backend = CastCpuAttnBackend.__new__(CastCpuAttnBackend)
    cache = torch.randn(num_slots, 2 * kv_heads * head_dim, generator=generator)
    backend.pool = SimpleNamespace(layer_rows=lambda layer: cache)
    seq_lens = torch.tensor([7, 4, 5])
    table = torch.randperm(num_slots, generator=generator)[: 3 * 10].view(3, 10).int()
    backend.read = causal_read(table, torch.arange(3), seq_lens, WIDTH)
    layer = SimpleNamespace(
        layer_id=0,
        tp_q_head_num=heads,
        tp_k_head_num=kv_heads,
        head_dim=head_dim,
        scaling=0.3,
        sliding_window_size=-1,
        logit_cap=0,
        is_cross_attention=False,
        attn_type=None,
    )
    from sglang.srt.layers.radix_attention import AttentionType

    layer.attn_type = AttentionType.DECODER
    queries = torch.randn(3 * WIDTH, heads * head_dim, generator=generator)

    def attend(q):
        return backend.forward_decode(q, None, None, layer, None, save_kv_cache=False)

    expected = attend(queries)
    kept = kept_rows(torch.tensor([3, 1, 2]), WIDTH)
    backend.kept_rows = kept
    torch.testing.assert_close(attend(queries[kept]), expected[kept])


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
        self.attn_backend = SimpleNamespace(kept_rows=None)
        self.layer = Layer()

    def forward(self, forward_batch):
        states = forward_batch.spec_info.hidden_states
        hidden, residual = self.layer(states, states + 1.0)
        return SimpleNamespace(
            logits_output=SimpleNamespace(next_token_logits=hidden, hidden_states=residual)
        )


def filled_layout(batch_size):
    batch = layout(batch_size)
    generator = torch.Generator().manual_seed(1)
    batch.spec_info.hidden_states = torch.randn(batch_size * WIDTH, 4, generator=generator)
    return batch


def test_last_rows():
    assert last_rows(torch.tensor([1, 3, 2]), WIDTH).tolist() == [0, 5, 7]


@pytest.mark.parametrize("num_rows", [(2, 1, 3), (WIDTH, WIDTH, WIDTH), (1, 1, 1)])
def test_the_last_layer_goes_on_with_the_rows_that_are_read(num_rows):
    runner, num_rows = LayerRunner(), torch.tensor(num_rows)
    everything = runner.forward(filled_layout(3)).logits_output
    kept, read = kept_rows(num_rows, WIDTH), last_rows(num_rows, WIDTH)
    with running_only(runner, kept, runner.layer, read):
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
    with ending_at(norm, layer, last):
        ours = run()
    assert layer.seen == [7, 3]
    for some, whole in zip(ours, everything, strict=True):
        assert some.shape == whole.shape
        torch.testing.assert_close(some[last], whole[last])
        assert some.count_nonzero() == whole[last].count_nonzero()
    torch.testing.assert_close(run(), everything)


def test_a_draft_of_other_layers_runs_them_whole():
    assert last_layer(torch.nn.Linear(2, 2)) is None
    other = torch.nn.Module()
    other.model = torch.nn.Module()
    other.model.layers = torch.nn.ModuleList([Layer()])
    assert last_layer(other) is None
    other.model.layers = torch.nn.ModuleList()
    assert last_layer(other) is None


def test_a_backend_that_does_not_know_of_kept_rows_is_left_alone():
    assert not runs_kept_rows(SimpleNamespace(attn_backend=SimpleNamespace()))
    assert runs_kept_rows(SimpleNamespace(attn_backend=CastCpuAttnBackend))
