"""What a draft's files say: each way in which a head does not fit its target is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.pairs import ROOT, tiny_pair
from cast_sglang.serving.launch.head import check_head

VOCAB, HIDDEN, LAYERS, OWN = 64, 8, 6, 16
IDS = torch.arange(OWN) * 3 + 1


@pytest.fixture
def target(tmp_path) -> str:
    path = tmp_path / "target"
    path.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN}
    config |= {"num_hidden_layers": LAYERS, "max_position_embeddings": 512}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return str(path)


def write_draft(path: Path, drop=(), config=(), as_bin=False, **tensors) -> str:
    path.mkdir()
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]}
    settings |= {"draft_vocab_size": OWN, "max_position_embeddings": 512, **dict(config)}
    (path / "config.json").write_text(json.dumps(settings))
    weights = {
        "fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN),
        "lm_head.weight": torch.zeros(OWN, HIDDEN),
        "d2t": IDS - torch.arange(OWN),
        "t2d": torch.isin(torch.arange(VOCAB), IDS),
        **tensors,
    }
    kept = {name: tensor for name, tensor in weights.items() if name not in drop}
    if as_bin:
        torch.save(kept, path / "pytorch_model.bin")
    else:
        save_file(kept, path / "model.safetensors")
    return str(path)


def permuted(ids: torch.Tensor) -> torch.Tensor:
    return ids.roll(5) - torch.arange(OWN)


def layers(*ids: int) -> list:
    return [("eagle_config", {"eagle_aux_hidden_state_layer_ids": ids})]


PARALLEL = [("architectures", ["LlamaForCausalLMParallelEagle3"])]


@pytest.mark.parametrize("as_bin", [False, True])
def test_a_head_that_fits(target, tmp_path, as_bin):
    [check] = check_head(target, write_draft(tmp_path / "draft", as_bin=as_bin), 512)
    assert check.status == "ok" and "4 tensors" in check.found


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"drop": ["lm_head.weight"]}, "fail", "lm_head.weight is missing"),
        ({"drop": ["d2t"]}, "fail", "no d2t"),
        ({"d2t": 2 * IDS}, "fail", "out of the target's 64"),
        ({"d2t": 9 - torch.arange(OWN)}, "fail", "15 tokens to one that another has"),
        ({"d2t": IDS + 1 - torch.arange(OWN)}, "fail", "d2t and t2d name different tokens"),
        ({"d2t": permuted(IDS)}, "warn", "may have been permuted"),
        ({"fc.weight": torch.zeros(8, 16)}, "fail", "fc reads 16 values, and 3 states"),
        ({"config": layers(1, 3, 9)}, "fail", "reads layers [1, 3, 9] of a target that has 6"),
        ({"config": layers(1, 3, 3)}, "fail", "reads layers [1, 3, 3]"),
        ({"config": PARALLEL}, "fail", "mask_embed is missing"),
        ({"config": layers(2, 4)}, "fail", "2 states of the target have 16"),
        ({"config": [("max_position_embeddings", 128)]}, "warn", "made for 128 positions"),
    ],
)
def test_what_does_not_fit_is_named(target, tmp_path, changes, status, says):
    [check] = check_head(target, write_draft(tmp_path / "draft", **changes), None)
    assert check.name == "draft head" and check.status == status and check.fix
    assert says in check.found


def test_a_head_with_the_targets_vocabulary_takes_the_targets_head(target, tmp_path):
    changes = {"drop": ["lm_head.weight", "d2t", "t2d"], "config": [("draft_vocab_size", None)]}
    [check] = check_head(target, write_draft(tmp_path / "draft", **changes), None)
    assert check.status == "ok"


def test_an_eagle_head_reads_an_embedding_and_a_state(target, tmp_path):
    changes = {"architectures": ["LlamaForCausalLMEagle"], "draft_vocab_size": None}
    path = write_draft(
        tmp_path / "draft", drop=["d2t", "t2d", "lm_head.weight"], config=changes.items()
    )
    [check] = check_head(target, path, None)
    assert check.status == "fail" and "fc reads 24 values, and 2 states" in check.found


def test_files_that_are_not_here_or_damaged_are_not_checked(target, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    [check] = check_head(target, "nobody/nothing", None)
    assert check.status == "skip" and "nobody/nothing are not here" in check.found
    damaged = Path(write_draft(tmp_path / "draft"))
    (damaged / "model.safetensors").write_bytes(b"x" * 99)
    [check] = check_head(target, str(damaged), None)
    assert check.status == "skip" and "model.safetensors" in check.found


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_the_drafts_of_this_repository_fit(name):
    if name == "tiny":
        [check] = check_head(*tiny_pair(), None)
        assert check.status == "ok", check
    else:
        draft = ROOT / "models" / "smollm2-draft"
        weights = load_file(next(draft.glob("*.safetensors")))
        assert {"fc.weight", "lm_head.weight"} & weights.keys()
