"""What a profile must match."""

from types import SimpleNamespace

import pytest
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig

from benchmarks.harness.pairs import tiny_pair


@pytest.mark.parametrize(
    ("device", "backend", "captures"),
    [
        ("cuda", Backend.FULL, True),
        ("cuda:1", Backend.DISABLED, False),
        ("cpu", Backend.FULL, False),
    ],
)
def test_a_profile_says_whether_steps_were_captured(device, backend, captures):
    from cast_sglang.serving.launch.identity import captures_decode

    graphs = CudaGraphConfig(decode=PhaseConfig(backend=backend), prefill=PhaseConfig())
    server_args = SimpleNamespace(device=device, cuda_graph_config=graphs)
    assert captures_decode(server_args) == captures


def test_a_server_without_a_draft_says_so(monkeypatch):
    from cast_sglang.costs.profiles import profile_filename
    from cast_sglang.costs.schema import NO_DRAFT
    from cast_sglang.serving.launch import identity as module

    target = tiny_pair().target
    monkeypatch.setattr(module, "verify_backend", lambda args: "cast_cpu")
    config = SimpleNamespace(dtype="torch.float32")
    monkeypatch.setattr(
        "sglang.srt.configs.model_config.ModelConfig.from_server_args", lambda args: config
    )
    args = SimpleNamespace(
        **dict.fromkeys(("revision", "quantization", "kv_cache_dtype", "cuda_graph_config")),
        **{"device": "cpu", "model_path": target, "speculative_draft_model_path": None},
        **{"tp_size": 1, "page_size": 1, "disable_overlap_schedule": True},
    )
    found = module.without_local_paths(module.host_identity(args))
    assert found.draft == NO_DRAFT != found.target
    assert "__target__no-draft__" in profile_filename(found)


def test_a_published_command_does_not_tell_where_models_lie():
    from cast_sglang.serving.launch.identity import command_without_local_paths

    command = "cast-sglang profile --model-path /home/me/my\\ models/target --model-path=/a/b/c/d"
    command += " --speculative-draft-model-path ~/models/draft --output out/p.json --dtype half"
    assert command_without_local_paths(command) == (
        "cast-sglang profile --model-path 'my models/target' --model-path=c/d "
        "--speculative-draft-model-path models/draft --output out/p.json --dtype half"
    )
    assert command_without_local_paths("--cast-profile auto") == "--cast-profile auto"
