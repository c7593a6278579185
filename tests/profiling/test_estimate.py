"""Profiles of GPUs that are not at hand."""

import json

import numpy as np
import pytest

from cast_sglang.cli import main
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel
from cast_sglang.costs.profiles import find_profile, load_profile, save_profile
from cast_sglang.errors import ProfileError
from cast_sglang.profiling.estimate import estimate_profile, read_model_config
from cast_sglang.profiling.gpus import GPUS, find_gpu
from tests.support.builders import make_identity
from tests.support.configs import LLAMA_8B, LLAMA_70B

LIMITS = Limits(32, 4096, 64, 8, None, 9)


def model_of(gpu: str, target=LLAMA_8B, **options) -> CostModel:
    return CostModel(estimate_profile(find_gpu(gpu), target, None, LIMITS, **options), LIMITS)


def test_plain_decoding_takes_what_is_published():
    """SGLang's documentation: 158 tokens a second, Llama 3.1 8B on an H100, MT-bench."""
    costs = model_of("H100").step_costs(1, 512)
    seconds = (1 + costs.plain_overhead) * costs.unit_us * 1e-6
    assert 1 / seconds == pytest.approx(158.34, rel=0.08)


def test_ranks_of_gpus():
    """Decoding is as fast as memory is; wide trees at large batches cost what products cost."""
    units = {name: model_of(name).step_costs(1, 512).unit_us for name in GPUS}
    order = ["B200", "H200", "H20", "H100", "A800", "RTX4090", "L40S"]
    assert sorted(units, key=units.__getitem__) == order
    dear = {name: model_of(name).step_costs(16, 512).verify[31] for name in GPUS}
    assert max(dear, key=dear.__getitem__) == "H20" and dear["H20"] > 4.0 > dear["H100"]


def test_a_target_on_several_gpus():
    with pytest.raises(ProfileError, match="larger --tp"):
        model_of("H100", LLAMA_70B)
    two, eight = (
        model_of("H100", LLAMA_70B, tp_size=tp).step_costs(1, 512).unit_us for tp in (2, 8)
    )
    assert two / 4 < eight < two / 2  # exchanges do not shrink


def test_weights_of_one_byte():
    whole, half = (model_of("L40S", quantization=q).step_costs(1, 512) for q in (None, "fp8"))
    assert 0.5 < half.unit_us / whole.unit_us < 0.6
    with pytest.raises(ProfileError, match="fp8"):
        model_of("A800", quantization="fp8")


@pytest.mark.parametrize("name", ["H200", "h200", "RTX 4090", "rtx-4090"])
def test_names_of_gpus(name):
    assert find_gpu(name) in GPUS.values()


def test_an_unknown_gpu():
    with pytest.raises(ProfileError, match="RTX4090, A800, H20, L40S, H100, H200, B200"):
        find_gpu("P4")


def test_the_command(tmp_path, capsys):
    (tmp_path / "llama").mkdir()
    config, output = tmp_path / "llama" / "config.json", tmp_path / "h200.json"
    config.write_text(json.dumps(LLAMA_8B))
    argv = ["estimate", "--gpu", "H200", "--model-config", str(config), "--output", str(output)]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "estimated, not measured" in said
    assert "assumed, from published benchmarks: products reach 80%" in said
    profile = load_profile(output)
    source = profile.provenance
    assert source.estimated and source.device_name == "NVIDIA H200 (estimated)"
    assert source.target.name == "llama" and source.command.startswith("cast-sglang estimate --gpu")
    assert str(tmp_path) not in source.command
    assert source.sampling["peak_tflops"] == 989.4 and "datasheet" in source.sampling["source"]
    assert not np.array(profile.target.samples).any()
    assert profile.target.token_counts == list(range(1, 65))

    assert main(["show", str(output), "--no-plot"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "ESTIMATED: these tables were computed, not measured" in shown
    assert "estimated, not measured" in shown and "memory_share 0.8" in shown


def test_no_server_takes_it_for_its_own(tmp_path):
    profile = estimate_profile(find_gpu("H200"), LLAMA_8B, None, LIMITS)
    identity = make_identity(
        device_name="NVIDIA H200",
        target=profile.provenance.target,
        draft=profile.provenance.draft,
        dtype="bfloat16",
        quantization=None,
        tp_size=1,
    )
    save_profile(profile, tmp_path / "p.json")
    with pytest.raises(ProfileError, match="measured elsewhere: device_name"):
        find_profile(identity, str(tmp_path / "p.json"))


def test_configs_that_cannot_be_read(tmp_path):
    with pytest.raises(ProfileError, match="cannot be read"):
        read_model_config(tmp_path / "absent.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ProfileError, match="no JSON object"):
        read_model_config(tmp_path)
