"""Passes over requests of unequal numbers of rows: what is run, and where its outputs land."""

from types import SimpleNamespace

import pytest
import torch

from cast_sglang.cpu.attention import CastCpuAttnBackend
from cast_sglang.cpu.reads import causal_read
from cast_sglang.serving.ragged import kept_rows, running_only, runs_kept_rows

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


def test_a_backend_that_does_not_know_of_kept_rows_is_left_alone():
    assert not runs_kept_rows(SimpleNamespace(attn_backend=SimpleNamespace()))
    assert runs_kept_rows(SimpleNamespace(attn_backend=CastCpuAttnBackend))
