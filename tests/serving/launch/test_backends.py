"""Attention backends: what runs on which, what is captured, and what is said of the others."""

import logging
import re
from types import SimpleNamespace

import pytest
import triton
from sglang.srt.arg_groups import model_override_base
from sglang.srt.arg_groups.overrides import record_foreign_defaults, resolving_view
from sglang.srt.configs import Qwen3NextConfig
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig
from sglang.srt.server_args import ServerArgs
from transformers import LlamaConfig

from cast_sglang.config import CastConfig
from cast_sglang.errors import HostError
from cast_sglang.serving.launch import backends as module
from cast_sglang.serving.launch.backends import (
    limit_graphs,
    set_attention_backends,
    verify_backend,
)


def made_up(**given):
    names = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    more = ("speculative_draft_attention_backend", "speculative_eagle_topk")
    more += ("enable_lora", "lora_paths", "linear_attn_verify_backend")
    values = dict.fromkeys((*names, *more))
    graphs = CudaGraphConfig(decode=PhaseConfig(backend=Backend.FULL), prefill=PhaseConfig())
    values |= {"device": "cuda", "cuda_graph_config": graphs}
    return SimpleNamespace(**{**values, "speculative_attention_mode": "prefill", **given})


PLAIN_LAYERS = {
    "sliding_window_size": None,
    "is_hybrid_swa": False,
    "attention_chunk_size": None,
    "has_attention_sinks": False,
    "hf_text_config": SimpleNamespace(),
    "attention_arch": AttentionArch.MHA,
    "hf_config": LlamaConfig(),
}


@pytest.fixture(autouse=True)
def target(monkeypatch):
    """The target of all launches here, as SGLang's configuration describes it."""
    config = SimpleNamespace(**PLAIN_LAYERS)
    monkeypatch.setattr(module, "target_config", lambda args: config)
    return config


@pytest.mark.parametrize(
    ("given", "prefill", "decode", "draft"),
    [
        # What stock SGLang chooses for prompts: on Hopper, elsewhere, and on Blackwell for chains.
        ({"attention_backend": "fa3"}, "fa3", "fa3", "triton"),
        ({"attention_backend": "flashinfer"}, "flashinfer", "flashinfer", "triton"),
        ({"attention_backend": "trtllm_mha"}, "trtllm_mha", "triton", "triton"),
        (
            {"attention_backend": "trtllm_mha", "speculative_eagle_topk": 1},
            "trtllm_mha",
            "trtllm_mha",
            "triton",
        ),
        ({"attention_backend": "fa4"}, "fa4", "triton", "triton"),
        ({"attention_backend": "triton"}, "triton", "triton", None),
        # What a user may ask for.
        (
            {"attention_backend": "triton", "prefill_attention_backend": "fa3"},
            "fa3",
            "fa3",
            "triton",
        ),
        (
            {"attention_backend": "fa3", "decode_attention_backend": "triton"},
            "fa3",
            "triton",
            "triton",
        ),
        (
            {"attention_backend": "fa3", "prefill_attention_backend": "triton"},
            "triton",
            "triton",
            None,
        ),
        (
            {"attention_backend": "fa3", "decode_attention_backend": "flashinfer"},
            "fa3",
            "flashinfer",
            "triton",
        ),
        (
            {"attention_backend": "flashinfer", "decode_attention_backend": "triton"},
            "flashinfer",
            "triton",
            "triton",
        ),
    ],
)
def test_prompts_stay_where_they_are_and_verify_runs_where_it_can(given, prefill, decode, draft):
    args = made_up(**given)
    set_attention_backends(args)
    base = args.attention_backend
    assert (args.prefill_attention_backend or base) == prefill
    assert (args.decode_attention_backend or base) == verify_backend(args) == decode
    assert args.speculative_draft_attention_backend == draft
    # SGLang verifies on the backend of decoding where the two differ.
    assert (args.speculative_attention_mode == "decode") == (prefill != decode)


@pytest.mark.parametrize(
    "layers",
    [
        {"is_hybrid_swa": True},
        {"sliding_window_size": 4096},
        {"attention_chunk_size": 8192},
        {"has_attention_sinks": True},
    ],
)
@pytest.mark.parametrize("backend", ["fa3", "flashinfer"])
def test_windows_and_sinks_are_verified_on_triton(backend, layers, target):
    vars(target).update(layers)
    args = made_up(attention_backend=backend)
    set_attention_backends(args)
    assert args.prefill_attention_backend == backend and verify_backend(args) == "triton"
    with pytest.raises(HostError, match=f"{backend}: CAST does not verify on it where.*triton"):
        set_attention_backends(made_up(decode_attention_backend=backend))
    chain = made_up(attention_backend="trtllm_mha", speculative_eagle_topk=1)
    set_attention_backends(chain)
    assert verify_backend(chain) == "trtllm_mha"


def test_trtllm_mha_verifies_chains_alone():
    args = made_up(decode_attention_backend="trtllm_mha", speculative_eagle_topk=8)
    with pytest.raises(HostError, match="drafts are trees.*--speculative-eagle-topk 1.*triton"):
        set_attention_backends(args)


@pytest.mark.parametrize(
    ("backend", "verifies"), [("fa3", "fa3"), ("triton", "triton"), ("trtllm_mla", "triton")]
)
def test_latent_attention_verifies_where_its_kernels_can(backend, verifies, target):
    target.attention_arch = AttentionArch.MLA
    args = made_up(attention_backend=backend)
    set_attention_backends(args)
    assert (args.prefill_attention_backend or backend) == backend
    assert verify_backend(args) == verifies
    # No other target has prompts there.
    target.attention_arch = AttentionArch.MHA
    with pytest.raises(HostError, match="--attention-backend trtllm_mla.*triton"):
        set_attention_backends(made_up(attention_backend="trtllm_mla"))


@pytest.mark.parametrize("backend", ["flashinfer", "trtllm_mla", "flashmla"])
def test_kernels_of_latent_attention_that_were_never_tried(backend, target):
    target.attention_arch = AttentionArch.MLA
    with pytest.raises(HostError, match=f"--decode-attention-backend {backend}.*pass triton"):
        set_attention_backends(made_up(decode_attention_backend=backend))


@pytest.mark.parametrize(("backend", "verifies"), [("fa3", "fa3"), ("flashinfer", "triton")])
def test_linear_attention_verifies_on_triton(backend, verifies, target):
    target.hf_config = Qwen3NextConfig()
    args = made_up(attention_backend=backend)
    set_attention_backends(args)
    assert args.linear_attn_verify_backend == "triton" and verify_backend(args) == verifies
    with pytest.raises(HostError, match="^--linear-attn-verify-backend flashinfer.*pass triton"):
        set_attention_backends(
            made_up(attention_backend="fa3", linear_attn_verify_backend="flashinfer")
        )


def test_a_window_that_no_layer_uses_is_none(target):
    """As the configurations of Qwen2 and Qwen3 state it."""
    target.sliding_window_size = 32768
    target.hf_text_config.use_sliding_window = False
    args = made_up(attention_backend="fa3")
    set_attention_backends(args)
    assert verify_backend(args) == "fa3"


@pytest.mark.parametrize(("backend", "verifies"), [("flashinfer", "flashinfer"), ("fa4", "triton")])
def test_an_engine_without_flags_gets_what_a_command_gets(backend, verifies):
    """Through SGLang's own record of a launch, where the backend is resolved and not given."""
    args = ServerArgs(model_path="m", device="cuda")
    args._resolved_overrides = [("sglang", {"attention_backend": backend})]
    record_foreign_defaults(args, "cast", set_attention_backends)
    found = resolving_view(args)
    assert (found.prefill_attention_backend or found.attention_backend) == backend
    assert verify_backend(found) == verifies
    assert found.speculative_draft_attention_backend == "triton"
    assert (found.speculative_attention_mode == "decode") == (backend != verifies)


HOPPER, BLACKWELL, OTHERS = "is_hopper_with_cuda_12_3", "is_sm100", ""


@pytest.mark.parametrize(
    ("gpu", "topk", "prefill"),
    [
        (HOPPER, None, "fa3"),
        (HOPPER, 1, "fa3"),
        (HOPPER, 8, "flashinfer"),
        (BLACKWELL, None, "flashinfer"),
        (BLACKWELL, 1, "trtllm_mha"),
        (OTHERS, None, "flashinfer"),
        (OTHERS, 1, "flashinfer"),
    ],
)
def test_what_stock_chooses_on_a_gpu_is_kept_for_prompts(gpu, topk, prefill, monkeypatch):
    """By SGLang's own choice, on a platform that says it is that GPU."""
    facts = dict.fromkeys((HOPPER, BLACKWELL, "is_hip"), False) | {"has_flashinfer": True}
    platform = SimpleNamespace(**{**facts, gpu: True})
    monkeypatch.setattr(model_override_base, "get_platform", lambda: platform)
    monkeypatch.setattr(
        model_override_base, "current_platform", SimpleNamespace(is_out_of_tree=lambda: False)
    )
    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]))
    model.has_asymmetric_kv = model.has_attention_sinks = False
    args = ServerArgs(model_path="m", device="cuda")
    args.speculative_algorithm, args.speculative_eagle_topk = "CAST", topk
    backend = model_override_base.get_default_attn_backend(args, False, model)
    args._resolved_overrides = [("sglang", {"attention_backend": backend})]
    record_foreign_defaults(args, "cast", set_attention_backends)
    found = resolving_view(args)
    assert (found.prefill_attention_backend or backend) == prefill
    assert verify_backend(found) == prefill


@pytest.mark.parametrize(("backend", "draft"), [("cast_cpu", None), (None, "cast_cpu")])
def test_the_cpu_platform_has_one_backend(backend, draft):
    args = made_up(attention_backend=backend, device="cpu")
    set_attention_backends(args)
    assert args.speculative_draft_attention_backend == draft
    assert args.prefill_attention_backend is args.decode_attention_backend is None


def test_the_cpu_platform_runs_triton_in_its_interpreter_alone(monkeypatch):
    args = made_up(attention_backend="triton", device="cpu")
    with pytest.raises(HostError, match="--attention-backend triton.*cast_cpu"):
        set_attention_backends(args)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    set_attention_backends(args)
    assert args.speculative_draft_attention_backend is None and verify_backend(args) == "triton"


@pytest.mark.parametrize("flag", ["--attention-backend", "--prefill-attention-backend"])
@pytest.mark.parametrize(
    ("device", "backend", "advised"),
    [
        ("cuda", "flashmla", "triton"),
        ("cuda", "torch_native", "triton"),
        ("cpu", "fa3", "cast_cpu"),
        ("cpu", "torch_native", "cast_cpu"),
    ],
)
def test_backends_that_prompts_cannot_run_on(flag, device, backend, advised):
    given = {flag.removeprefix("--").replace("-", "_"): backend}
    with pytest.raises(HostError, match=f"{flag} {backend}.*-attention-backend {advised}"):
        set_attention_backends(made_up(device=device, **given))


@pytest.mark.parametrize("backend", ["fa4", "flashmla", "torch_native"])
@pytest.mark.parametrize(("device", "advised"), [("cuda", "triton"), ("cpu", "cast_cpu")])
def test_backends_that_cannot_verify(backend, device, advised):
    args = made_up(device=device, decode_attention_backend=backend)
    with pytest.raises(HostError, match=f"--decode-attention-backend {backend}.*pass {advised}"):
        set_attention_backends(args)


@pytest.mark.parametrize("backend", ["flashinfer", "fa3", "trtllm_mha"])
def test_the_draft_runs_on_triton(backend):
    args = made_up(attention_backend="triton", speculative_draft_attention_backend=backend)
    with pytest.raises(HostError, match=f"{backend}.*pass triton"):
        set_attention_backends(args)


@pytest.mark.parametrize(
    ("given", "settings", "reason"),
    [
        ({"attention_backend": "triton"}, {}, None),
        ({"attention_backend": "fa3"}, {}, None),
        ({"attention_backend": "flashinfer"}, {}, None),
        ({"attention_backend": "trtllm_mha", "speculative_eagle_topk": 1}, {}, None),
        ({"attention_backend": "triton"}, {"graphs": "off"}, "--cast-graphs off"),
        ({"attention_backend": "triton", "enable_lora": True}, {}, "adapters are captured"),
        ({"attention_backend": "triton", "lora_paths": ["a=b"]}, {}, "adapters are captured"),
        ({"attention_backend": "triton"}, {"graphs": "passes"}, None),
    ],
)
def test_passes_are_captured_where_verify_can_be(given, settings, reason, caplog):
    args = made_up(**given)
    set_attention_backends(args)
    with caplog.at_level(logging.WARNING):
        limit_graphs(CastConfig(**settings), args)
    is_on = args.cuda_graph_config.decode.backend == Backend.FULL
    assert is_on == (reason is None)
    if reason is None:
        assert not caplog.text
    else:
        assert re.search(reason, caplog.text)


@pytest.mark.parametrize("backend", [Backend.DISABLED, Backend.BREAKABLE])
def test_graphs_that_cast_does_not_capture(backend, caplog):
    graphs = CudaGraphConfig(decode=PhaseConfig(backend=backend), prefill=PhaseConfig())
    args = made_up(attention_backend="triton", cuda_graph_config=graphs)
    with caplog.at_level(logging.WARNING):
        limit_graphs(CastConfig(), args)
    assert args.cuda_graph_config.decode.backend == Backend.DISABLED
    assert "CUDA graphs are off" in caplog.text
