"""What a profile must match."""

from types import SimpleNamespace

import pytest
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig


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


def test_a_published_command_does_not_tell_where_models_lie():
    from cast_sglang.serving.launch.identity import command_without_local_paths

    command = "cast-sglang profile --model-path /home/me/my\\ models/target --model-path=/a/b/c/d"
    command += " --speculative-draft-model-path ~/models/draft --output out/p.json --dtype half"
    assert command_without_local_paths(command) == (
        "cast-sglang profile --model-path 'my models/target' --model-path=c/d "
        "--speculative-draft-model-path models/draft --output out/p.json --dtype half"
    )
    assert command_without_local_paths("--cast-profile auto") == "--cast-profile auto"
