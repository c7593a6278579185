"""Hidden states of answers: those of the last layer, on the accepted path."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode

from cast_sglang.serving.host_patches import hidden_states as module

ROWS = 4
READ, LAST = (torch.arange(2 * ROWS * size).view(2 * ROWS, size).float() for size in (6, 2))


@pytest.fixture(autouse=True)
def server(monkeypatch):
    monkeypatch.setattr(module, "is_cast", lambda: True)
    monkeypatch.setattr(
        module, "get_server_return_hidden_states_mode", lambda: CaptureHiddenMode.FULL
    )


def handed_out(accept_index, is_asked_for=True, last=LAST):
    output = LogitsProcessorOutput(
        next_token_logits=None, hidden_states=READ, last_hidden_states=last
    )
    result = SimpleNamespace(
        logits_output=output, accept_index=accept_index, speculative_num_draft_tokens=ROWS
    )
    forward = module.handing_out_plain_states(lambda worker, batch: result)
    assert forward(None, SimpleNamespace(return_hidden_states=is_asked_for)) is result
    return output.hidden_states


@pytest.mark.parametrize("longest", [3, 6])
def test_those_of_accepted_nodes_stand_in_front(longest):
    accept_index = torch.full((2, longest), -1, dtype=torch.int32)
    accept_index[0, :3] = torch.tensor([0, 2, 3])
    accept_index[1, :2] = torch.tensor([4, 7])
    found = handed_out(accept_index)
    assert found.shape == LAST.shape
    assert found[:3].equal(LAST[[0, 2, 3]]) and found[4:6].equal(LAST[[4, 7]])


def test_those_of_a_prompt_stay_in_order():
    assert handed_out(None) is LAST


def test_where_none_are_asked_for_or_the_draft_reads_them_nothing_changes():
    accept_index = torch.zeros((2, 3), dtype=torch.int32)
    assert handed_out(accept_index, is_asked_for=False) is READ
    assert handed_out(accept_index, last=None) is READ


@pytest.mark.parametrize(
    ("is_cast", "mode", "of_server", "keeps"),
    [
        (True, CaptureHiddenMode.FULL, CaptureHiddenMode.FULL, True),
        (True, CaptureHiddenMode.LAST, CaptureHiddenMode.FULL, False),
        (True, CaptureHiddenMode.FULL, CaptureHiddenMode.NULL, False),
        (False, CaptureHiddenMode.FULL, CaptureHiddenMode.FULL, False),
    ],
)
def test_last_states_are_kept_where_requests_may_ask(monkeypatch, is_cast, mode, of_server, keeps):
    monkeypatch.setattr(module, "is_cast", lambda: is_cast)
    monkeypatch.setattr(module, "get_server_return_hidden_states_mode", lambda: of_server)
    metadata = SimpleNamespace(capture_hidden_mode=mode)
    kept = module.keep_last_states(lambda *args: None, None, LAST, READ, metadata)
    assert (kept is LAST) == keeps
    assert module.keep_last_states(lambda *args: None, None, LAST, None, metadata) is None
