"""Attention backends: which CAST runs on, which it captures, and what it says of the others."""

import argparse
import logging
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig

from cast_sglang.config import CastConfig
from cast_sglang.errors import HostError
from cast_sglang.serving.launch import arguments


def made_up(**given):
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    values = dict.fromkeys((*names, "speculative_draft_attention_backend"))
    graphs = CudaGraphConfig(decode=PhaseConfig(backend=Backend.FULL), prefill=PhaseConfig())
    return SimpleNamespace(**{**values, "device": "cuda", "cuda_graph_config": graphs, **given})


@pytest.mark.parametrize(
    ("device", "backend", "draft"),
    [
        ("cuda", "triton", None),
        ("cuda", "flashinfer", "triton"),
        ("cpu", "cast_cpu", None),
        ("cpu", None, "cast_cpu"),
    ],
)
def test_backends_of_the_target(device, backend, draft):
    server_args = made_up(attention_backend=backend, device=device)
    arguments.set_attention_backends(server_args)
    assert server_args.speculative_draft_attention_backend == draft


@pytest.mark.parametrize("backend", ["fa3", "fa4", "flashmla", "trtllm_mha", "torch_native"])
@pytest.mark.parametrize(
    "flag", ["--attention-backend", "--prefill-attention-backend", "--decode-attention-backend"]
)
@pytest.mark.parametrize(("device", "advised"), [("cuda", "triton"), ("cpu", "cast_cpu")])
def test_other_backends_of_the_target_are_refused(flag, backend, device, advised):
    given = {flag.removeprefix("--").replace("-", "_"): backend}
    with pytest.raises(HostError, match=f"{flag} {backend}.*--attention-backend {advised}"):
        arguments.set_attention_backends(made_up(device=device, **given))


@pytest.mark.parametrize("backend", ["flashinfer", "fa3", "trtllm_mha"])
def test_the_draft_runs_on_triton(backend):
    server_args = made_up(attention_backend="triton", speculative_draft_attention_backend=backend)
    with pytest.raises(HostError, match=f"{backend}.*pass triton"):
        arguments.set_attention_backends(server_args)


@pytest.mark.parametrize(
    ("given", "settings", "reason"),
    [
        ({"attention_backend": "triton"}, {}, None),
        ({"attention_backend": "triton", "decode_attention_backend": "triton"}, {}, None),
        ({"attention_backend": "flashinfer"}, {}, "--attention-backend triton"),
        (
            {"attention_backend": "triton", "prefill_attention_backend": "flashinfer"},
            {},
            "flashinfer, triton",
        ),
        ({"attention_backend": "triton"}, {"graphs": "off"}, "--cast-graphs off"),
        ({"attention_backend": "triton"}, {"graphs": "passes"}, None),
    ],
)
def test_graphs_are_captured_on_triton_alone(given, settings, reason, caplog):
    server_args = made_up(**given)
    with caplog.at_level(logging.WARNING):
        arguments.limit_graphs(CastConfig(**settings), server_args)
    is_on = server_args.cuda_graph_config.decode.backend == Backend.FULL
    assert is_on == (reason is None)
    assert (reason is None and not caplog.text) or reason in caplog.text


@pytest.mark.parametrize("backend", [Backend.DISABLED, Backend.BREAKABLE])
def test_graphs_that_cast_does_not_capture(backend, caplog):
    graphs = CudaGraphConfig(decode=PhaseConfig(backend=backend), prefill=PhaseConfig())
    server_args = made_up(attention_backend="triton", cuda_graph_config=graphs)
    with caplog.at_level(logging.WARNING):
        arguments.limit_graphs(CastConfig(), server_args)
    assert server_args.cuda_graph_config.decode.backend == Backend.DISABLED
    assert "CUDA graphs are off" in caplog.text


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("given", [None, "flashinfer"])
def test_a_gpu_server_defaults_to_the_backend_with_graphs(has_gpu, given, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    args = argparse.Namespace(
        attention_backend=given, prefill_attention_backend=None, decode_attention_backend=None
    )
    arguments.choose_attention_backend(args)
    assert args.attention_backend == ("triton" if has_gpu and given is None else given)


OTHER_VALUES = {"--pp-size": 2, "--page-size": 16, "--disaggregation-mode": "decode"}


@pytest.mark.parametrize("flag", arguments.UNSUPPORTED)
def test_what_cast_cannot_run_with_is_refused(flag, monkeypatch):
    monkeypatch.setattr(arguments, "read_draft_config", lambda *draft: None)
    values = {flag: unset for flag, (unset, _) in arguments.UNSUPPORTED.items()}

    def check(given: object) -> None:
        flags = {**values, "--speculative-draft-model-path": "d", flag: given}
        names = {name.removeprefix("--").replace("-", "_"): flags[name] for name in flags}
        more = {"speculative_draft_model_revision": None, "trust_remote_code": False}
        arguments.check_flags(argparse.Namespace(**names, **more))

    check(values[flag])
    check(None)
    with pytest.raises(HostError, match=f"^{flag} cannot be combined with"):
        check(OTHER_VALUES.get(flag, True))
