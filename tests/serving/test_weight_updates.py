"""What does not fit is refused, and what cannot be loaded leaves the weights of before."""

from types import SimpleNamespace

import pytest

from cast_sglang.errors import HostError
from cast_sglang.serving import weight_updates
from cast_sglang.serving.weight_updates import why_not, with_rollback

SERVED = {"architectures": ["LlamaForCausalLM"], "vocab_size": 2048, "num_hidden_layers": 8}


@pytest.fixture
def config_of(monkeypatch):
    """Return a function that sets the config that any path has."""

    def choose(config):
        def read(path, revision, trust_remote_code):
            if config is None:
                raise HostError(f"{path}: no readable config.json: not found")
            return SimpleNamespace(**config)

        monkeypatch.setattr(weight_updates, "read_config", read)
        model = SimpleNamespace(trust_remote_code=False)
        monkeypatch.setattr(weight_updates, "get_model", lambda: model)

    return choose


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (SERVED, None),
        ({**SERVED, "rope_theta": 5.0}, None),
        ({**SERVED, "num_hidden_layers": 9}, "num_hidden_layers is 9, not 8"),
        ({**SERVED, "architectures": ["Other"]}, "architectures"),
        ({**SERVED, "head_dim": 64}, "head_dim is 64, not None"),
        (None, "config.json"),
    ],
    ids=str,
)
def test_only_a_checkpoint_of_the_same_shape_fits(config_of, config, says):
    config_of(config)
    error = why_not("new", SimpleNamespace(**SERVED))
    assert error is None if says is None else says in error and "new" in error


def test_a_path_that_loads_is_the_one_served():
    model = SimpleNamespace(model_path="old")

    def update(path):
        model.model_path = path
        return True, "done"

    assert with_rollback(model, "new", update) == (True, "done")
    assert model.model_path == "new"


@pytest.mark.parametrize("raises", [True, False])
def test_what_cannot_be_loaded_leaves_the_weights_of_before(raises):
    model, loaded = SimpleNamespace(model_path="old"), []

    def update(path):
        model.model_path = path
        if path == "damaged":
            if raises:
                raise RuntimeError("a weight of another shape")
            return False, "refused"
        loaded.append(path)
        return True, "done"

    success, message = with_rollback(model, "damaged", update)
    assert not success and model.model_path == "old"
    assert ("another shape" in message) if raises else (message == "refused")
    assert loaded == (["old"] if raises else [])
