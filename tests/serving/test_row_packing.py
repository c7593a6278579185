"""Requests of unequal numbers of rows: which rows are run and read, and by whom they can be."""

from types import SimpleNamespace

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.utils import GenerationBatchResult

from cast_sglang.cpu.attention import CastCpuAttnBackend
from cast_sglang.serving.row_packing import (
    can_pack_rows,
    find_packed_rows,
    first_columns,
    last_layer,
    last_rows,
    rows_with_nodes,
    spread_rows,
)

WIDTH = 3


def test_packed_rows_are_the_first_of_each_request():
    assert find_packed_rows(torch.tensor([1, 3, 2]), WIDTH).tolist() == [0, 3, 4, 5, 6, 7]
    assert find_packed_rows(torch.tensor([WIDTH, WIDTH]), WIDTH) is None


def test_rows_with_nodes():
    batch = SimpleNamespace(reqs=["a", "b", "c"], spec_info=SimpleNamespace())
    assert rows_with_nodes(batch, 5, None).tolist() == [5, 5, 5]
    assert rows_with_nodes(batch, 5, np.array([1.0, 0.0, 4.0])).tolist() == [5, 1, 5]
    batch.spec_info.rows_with_nodes = np.array([2, 7, 3])
    assert rows_with_nodes(batch, 7, np.array([1.0, 0.0, 4.0])).tolist() == [2, 1, 3]
    batch.spec_info.rows_with_nodes = None
    assert rows_with_nodes(batch, 1, None).tolist() == [1, 1, 1]


def test_last_rows():
    assert last_rows(torch.tensor([1, 3, 2]), WIDTH).tolist() == [0, 5, 7]


def test_a_draft_of_other_layers_runs_them_whole():
    assert last_layer(torch.nn.Linear(2, 2)) is None
    other = torch.nn.Module()
    other.model = torch.nn.Module()
    other.model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert last_layer(other) is None
    other.model.layers = torch.nn.ModuleList()
    assert last_layer(other) is None


def test_a_head_that_reads_every_layer_runs_its_last_one_whole():
    from sglang.srt.models.llama_eagle3 import LlamaDecoderLayer

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    layer = LlamaDecoderLayer.__new__(LlamaDecoderLayer)
    torch.nn.Module.__init__(layer)
    model.model.layers = torch.nn.ModuleList([layer])
    assert last_layer(model) is layer
    model.read_rows = None
    assert last_layer(model) is None


def test_a_backend_that_does_not_know_of_packed_rows_is_left_alone():
    assert not can_pack_rows(runner_of(SimpleNamespace()))
    assert can_pack_rows(runner_of(CastCpuAttnBackend))


def test_adapters_are_laid_out_for_as_many_rows_of_every_request():
    assert not can_pack_rows(runner_of(CastCpuAttnBackend, lora_manager=SimpleNamespace()))


def runner_of(attn_backend, lora_manager=None):
    return SimpleNamespace(attn_backend=attn_backend, lora_manager=lora_manager)


def test_rows_are_spread_to_their_places():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    spread = spread_rows(rows, torch.tensor([0, 2]), 3)
    assert spread.tolist() == [[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]


def verified_chain():
    """What verify of a chain on a device hands on: with places in rows of its own width."""
    rows = torch.arange(2 * WIDTH)
    places = torch.tensor([1, 2]), rows.view(2, WIDTH)[:, 1], rows
    return SimpleNamespace(out_cache_loc=rows), GenerationBatchResult(
        logits_output=LogitsProcessorOutput(None, rows.unsqueeze(1).float()),
        next_token_ids=rows,
        speculative_num_draft_tokens=WIDTH,
        prepared_draft_extend_inputs=places,
    )


def test_places_that_were_prepared_hold_at_the_width_of_verify_alone():
    batch, result = verified_chain()
    assert first_columns(batch, result, WIDTH).prepared_draft_extend_inputs is not None
    narrowed = first_columns(batch, result, 2)
    assert narrowed.prepared_draft_extend_inputs is None
    assert narrowed.next_token_ids.tolist() == batch.out_cache_loc.tolist() == [0, 1, 3, 4]
    # The scheduler reads the whole.
    assert len(result.next_token_ids) == 2 * WIDTH
