"""An EAGLE drafter: captured layers where there are graphs for the batch, else eager ones."""

from types import SimpleNamespace

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.serving.drafting import eagle as module
from cast_sglang.serving.drafting.eagle import EagleDrafter
from cast_sglang.serving.drafting.layers import EagerLayers
from tests.support.drafts import STEPS, FakeModel, forward_batch


def test_without_graphs_layers_are_eager():
    drafter = EagleDrafter(FakeModel(), STEPS)
    assert drafter.graphs is None
    assert isinstance(drafter.layers(forward_batch(2, 0)), EagerLayers)


def test_a_batch_that_was_captured_is_replayed(monkeypatch):
    model, sizes = FakeModel(), GraphSizes({1: (3,), 2: (3,)})
    seen = []

    def capture(*args):
        seen.append(args)
        return SimpleNamespace(holds=lambda batch: batch <= 2, layers=lambda batch: "captured")

    monkeypatch.setattr(module, "capture_layers", capture)
    drafter = EagleDrafter(model, STEPS)
    drafter.capture(sizes)
    assert seen == [(model, STEPS, sizes)]
    assert drafter.layers(forward_batch(2, 0)) == "captured"
    assert isinstance(drafter.layers(forward_batch(3, 0)), EagerLayers)
    # The host waits for no lengths where all layers are captured.
    assert model.attention.needs_cpu_seq_lens is False
