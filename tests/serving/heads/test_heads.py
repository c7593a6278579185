"""What the heads change of SGLang's EAGLE-3 model; whole heads are served in `tests/server`."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.models.registry import ModelRegistry

from cast_sglang.serving.heads.cascade import LlamaForCausalLMCascadeEagle3
from cast_sglang.serving.heads.parallel import LlamaForCausalLMParallelEagle3, _mask_slots
from cast_sglang.serving.heads.registry import one_pass_depth, register_heads

LAYERS, ROWS, HIDDEN = 3, 5, 4


def test_sglang_finds_the_classes_by_their_names():
    register_heads()
    register_heads()
    for head in (LlamaForCausalLMCascadeEagle3, LlamaForCausalLMParallelEagle3):
        assert ModelRegistry.resolve_model_cls([head.__name__]) == (head, head.__name__)
    # Those of SGLang are there still.
    assert ModelRegistry.is_arch_supported("LlamaForCausalLMEagle3")


def test_only_a_head_of_one_pass_has_a_depth():
    assert one_pass_depth(SimpleNamespace(one_pass_depth=7)) == 7
    assert one_pass_depth(SimpleNamespace()) is None
    assert one_pass_depth(None) is None


class Layer(torch.nn.Module):
    """Adds its number; hands on what it adds and the residual apart, as SGLang's layers do."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, hidden, residual):
        residual = residual + hidden if residual is not None else hidden.clone()
        return torch.full_like(hidden, float(self.number)), residual


class Model(torch.nn.Module):
    """SGLang's layers in series; each adds to the tensors of the one before in place."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(number) for number in range(LAYERS))

    def norm(self, hidden, residual=None):
        if residual is None:
            return 10.0 * hidden
        return 10.0 * (hidden + residual), hidden + residual

    def forward(self, hidden):
        if not len(hidden):
            return hidden, [hidden]
        residual = None
        for layer in self.layers:
            before = hidden, residual
            hidden, residual = layer(hidden, residual)
            for each in before:
                if each is not None:
                    each.zero_()
        normed, plain = self.norm(hidden, residual)
        return normed, [plain]


@pytest.fixture
def cascade(monkeypatch):
    base = LlamaForCausalLMCascadeEagle3.__mro__[1]

    def build(self, config, quant_config=None, prefix=""):
        torch.nn.Module.__init__(self)
        self.config, self.model = config, Model()

    monkeypatch.setattr(base, "__init__", build)
    config = SimpleNamespace(num_hidden_layers=LAYERS, hidden_size=HIDDEN)
    return LlamaForCausalLMCascadeEagle3(config)


def test_a_cascade_hands_on_the_states_of_every_layer(cascade):
    hidden = torch.rand(ROWS, HIDDEN)
    expected, total = [], hidden.clone()
    for number in range(LAYERS):
        total = total + number
        expected.append(10.0 * total)
    for _ in range(2):  # nothing is left of the pass before
        first, later = cascade.model(hidden.clone())
        for found, wanted in zip([first, *later], expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_rows_that_are_not_read_are_dropped_behind_the_last_layer(cascade):
    hidden, rows = torch.rand(ROWS, HIDDEN), torch.tensor([1, 4])
    whole = cascade.model(hidden.clone())
    cascade.read_rows = rows
    first, later = cascade.model(hidden.clone())
    torch.testing.assert_close(first, whole[0][rows])
    for found, wanted in zip(later, whole[1], strict=True):
        torch.testing.assert_close(found, wanted[rows])


def test_a_batch_without_rows_has_states_of_as_many_layers(cascade):
    first, later = cascade.model(torch.zeros(0, HIDDEN))
    assert first.shape == (0, HIDDEN) and len(later) == LAYERS - 1


def test_logits_of_later_layers_are_those_of_the_same_head(cascade):
    head = torch.rand(7, HIDDEN)
    cascade.lm_head = head

    def logits_of(input_ids, hidden_states, lm_head, metadata):
        assert metadata.forward_mode.is_decode() and input_ids is None
        return SimpleNamespace(next_token_logits=hidden_states @ lm_head.T)

    cascade.logits_processor = logits_of
    states = torch.rand(ROWS, (LAYERS - 1) * HIDDEN)
    found = cascade.later_logits(states)
    assert found.shape == (ROWS, LAYERS - 1, 7)
    torch.testing.assert_close(found[2, 1], states[2, HIDDEN:] @ head.T)


def test_a_cascade_of_one_layer_is_refused():
    with pytest.raises(ValueError, match="two layers or more"):
        LlamaForCausalLMCascadeEagle3(SimpleNamespace(num_hidden_layers=1))


def test_masked_slots_read_what_was_learnt_for_them():
    model = SimpleNamespace(mask_embed=torch.rand(HIDDEN), mask_hidden=torch.rand(3 * HIDDEN))
    ids, positions = torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS)

    def batch(**fields):
        return SimpleNamespace(spec_info=SimpleNamespace(hidden_states="the target's", **fields))

    plain = ids, positions, batch(), None
    assert _mask_slots(model, plain) is plain
    masked = batch(is_masked=True)
    args = _mask_slots(model, (ids, positions, masked, None))
    assert args[0] is ids and args[1] is positions and args[2] is masked
    assert torch.equal(args[3], model.mask_embed.expand(ROWS, -1))
    assert torch.equal(masked.spec_info.hidden_states, model.mask_hidden.expand(ROWS, -1))
