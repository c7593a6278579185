"""The draft model over nodes: the best children, in the target's vocabulary."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from cast_sglang.serving.drafting import model as module
from cast_sglang.serving.drafting.model import DraftModel

LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 2.0]])


class Batch:
    sampling_info = SimpleNamespace()
    is_ready = False

    def mark_forward_metadata_ready(self):
        self.is_ready = True


@pytest.fixture
def log(monkeypatch):
    """What the attention backend is given, and the one that the pass runs with."""
    log = []

    @contextlib.contextmanager
    def context(context, forward_batch):
        log.append(context.attn_backend)
        yield

    monkeypatch.setattr(module, "forward_context", context)
    monkeypatch.setattr(
        module, "renorm_draft_probs", lambda logits, *args: torch.softmax(logits, dim=-1)
    )
    return log


def draft_model(log, token_map=None):
    states = torch.ones(2, 8)

    def forward(batch):
        assert batch.is_ready
        output = SimpleNamespace(next_token_logits=LOGITS, hidden_states=states)
        return SimpleNamespace(logits_output=output)

    attention = SimpleNamespace(init_tree_metadata=lambda batch, slots: log.append(slots))
    return DraftModel(SimpleNamespace(forward=forward, device="cpu"), attention, 2, 2, token_map)


def test_a_layer_returns_the_best_children(log):
    model = draft_model(log)
    probs, tokens, states = model.forward_layer(Batch(), "slots")
    assert tokens.tolist() == [[1, 2], [0, 3]] and states.shape == (2, 8)
    expected = torch.softmax(LOGITS, dim=-1).gather(1, tokens)
    torch.testing.assert_close(probs, expected)
    assert log == ["slots", model.attention]


def test_children_are_named_in_the_targets_vocabulary(log):
    token_map = torch.tensor([70, 71, 72, 73])
    model = draft_model(log, token_map)
    assert model.forward_nodes(Batch())[1].tolist() == [[71, 72], [70, 73]]
    # New weights bring a new map, in place.
    token_map += 10
    assert model.to_target_vocab(torch.tensor([[0, 3]])).tolist() == [[80, 83]]
    index = torch.tensor([[0, 3]])
    assert draft_model(log).to_target_vocab(index) is index


def test_hidden_states_are_those_of_the_runner(log, monkeypatch):
    monkeypatch.setattr(
        module, "get_draft_recurrent_hidden_state_spec", lambda runner: (8, torch.bfloat16)
    )
    assert draft_model(log).recurrent_hidden_states() == (8, torch.bfloat16)
