"""Attention backends of stock SGLang and of CAST, by model and GPU: a table of docs/gpu.md.

    python -m scripts.backend_table            # print it
    python -m scripts.backend_table --write    # put it into docs/gpu.md

SGLang resolves the arguments of each launch as it does before a server, on a machine that is said
to be the GPU. No model is loaded and no GPU is needed. A test compares the table with the document.
"""

import argparse
import contextlib
import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- backends:begin -->", "<!-- backends:end -->"

# What SGLang asks a machine about, of three kinds of GPU.
NO = dict.fromkeys(
    (
        *("is_hip", "is_npu", "is_xpu", "is_musa", "is_mps", "is_sm90", "is_sm100", "is_sm110"),
        *("is_sm100_or_sm110", "is_sm120", "is_blackwell", "is_hopper_with_cuda_12_3", "has_amx"),
    ),
    False,
)
GPUS: dict[str, tuple[dict[str, bool], tuple[int, int]]] = {
    "Hopper": ({"is_sm90": True, "is_hopper_with_cuda_12_3": True}, (9, 0)),
    "B200": ({"is_sm100": True, "is_sm100_or_sm110": True, "is_blackwell": True}, (10, 0)),
    "Ampere, Ada": ({}, (8, 9)),
}
MEMORY_MB = 140_000

DENSE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
}


class Model(NamedTuple):
    """A kind of model, as its `config.json` says it, and the draft that people use with it."""

    config: Mapping[str, Any]
    algorithm: str = "EAGLE3"  # of stock SGLang; NEXTN for a layer of the checkpoint itself


def _of(architecture: str, model_type: str, **more: Any) -> dict[str, Any]:
    return {**DENSE, "architectures": [architecture], "model_type": model_type, **more}


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
MODELS = {
    "Llama": Model(_of("LlamaForCausalLM", "llama")),
    "Qwen3": Model(_of("Qwen3ForCausalLM", "qwen3")),
    "Qwen3-MoE": Model(_of("Qwen3MoeForCausalLM", "qwen3_moe", **EXPERTS)),
    "gpt-oss": Model(
        _of(
            "GptOssForCausalLM",
            "gpt_oss",
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=128,
            layer_types=["sliding_attention", "full_attention"] * 16,
        )
    ),
    "MiMo, MTP": Model(_of("MiMoForCausalLM", "qwen2", num_nextn_predict_layers=1), "NEXTN"),
    "GLM-4.5, MTP": Model(
        _of(
            "Glm4MoeForCausalLM",
            "glm4_moe",
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=1024,
            n_shared_experts=1,
            first_k_dense_replace=1,
            num_nextn_predict_layers=1,
        ),
        "NEXTN",
    ),
    "DeepSeek V3, MTP": Model(
        _of(
            "DeepseekV3ForCausalLM",
            "deepseek_v3",
            num_key_value_heads=32,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=1024,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            num_nextn_predict_layers=1,
        ),
        "NEXTN",
    ),
    "Qwen3-Next, MTP": Model(
        _of(
            "Qwen3NextForCausalLM",
            "qwen3_next",
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            linear_conv_kernel_dim=4,
            full_attention_interval=4,
            **EXPERTS,
            shared_expert_intermediate_size=1024,
            num_nextn_predict_layers=1,
        ),
        "NEXTN",
    ),
}


class Launch(NamedTuple):
    """What the arguments of a launch come to."""

    shape: str = ""
    prompts: str = ""
    verify: str = ""
    draft: str = ""
    page_size: int = 1
    refused: str = ""


class Row(NamedTuple):
    """A model on a GPU."""

    model: str
    gpu: str
    stock: Launch
    served: Launch  # CAST without a flag
    trees: Launch  # the same, or where it is a chain CAST with --speculative-eagle-topk 8
    chains: Launch  # CAST with --speculative-eagle-topk 1


def rows() -> list[Row]:
    """Resolve every launch of the table."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in MODELS.items():
            target, draft = _write(Path(folder) / re.sub(r"\W+", "-", name), model)
            for gpu in GPUS:
                stock = [*_flags(target, draft), "--speculative-algorithm", model.algorithm]
                cast = [*_flags(target, draft), "--speculative-algorithm", "CAST"]
                trees, chains = ([*cast, "--speculative-eagle-topk", topk] for topk in ("8", "1"))
                with _machine(gpu):
                    served = _resolved(cast)
                    is_chain = "-1-" in served.shape
                    grown = _resolved(trees) if is_chain else served
                    found.append(Row(name, gpu, _resolved(stock), served, grown, _resolved(chains)))
    return found


def table(found: Sequence[Row]) -> list[str]:
    """Return the table; GPUs on which a model is served alike share a line."""
    lines = [
        "| target and draft | GPU | stock: tree | stock: prompts and verify | "
        "CAST: prompts, verify, draft | trees | chains |",
        "|---|---|---|---|---|---|---|",
    ]
    alike: dict[tuple[str, str], list[str]] = {}
    for row in found:
        cells = [row.stock.shape, _attention(row.stock), _attention(row.served)]
        cells += [launch.refused or "yes" for launch in (row.trees, row.chains)]
        alike.setdefault((row.model, " | ".join(cells)), []).append(row.gpu)
    for (model, cells), gpus in alike.items():
        where = "any" if len(gpus) == len(GPUS) else "; ".join(gpus)
        lines.append(f"| {model} | {where} | {cells} |")
    return lines


def _attention(launch: Launch) -> str:
    if launch.refused:
        return "-"
    parts = [launch.prompts, launch.verify, launch.draft]
    names = [f"`{part}`" for part in parts if part]
    pages = f", pages of {launch.page_size}" if launch.page_size > 1 else ""
    return (", ".join(names) if len(set(names)) > 1 else names[0]) + pages


def _flags(target: Path, draft: Path | None) -> list[str]:
    flags = ["--model-path", str(target), "--mem-fraction-static", "0.8", "--device", "cuda"]
    return flags if draft is None else [*flags, "--speculative-draft-model-path", str(draft)]


def _write(folder: Path, model: Model) -> tuple[Path, Path | None]:
    """Write the configs of a pair; return their folders."""
    target, draft = folder / "target", folder / "draft"
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(model.config))
    if model.algorithm == "NEXTN":
        return target, None
    draft.mkdir()
    config = _of("LlamaForCausalLMEagle3", "llama", num_hidden_layers=1, draft_vocab_size=32000)
    (draft / "config.json").write_text(json.dumps(config))
    return target, draft


def _resolved(argv: list[str]) -> Launch:
    from sglang.srt.arg_groups.overrides import attention_backends_of, resolving_view
    from sglang.srt.server_args import prepare_server_args

    from cast_sglang.errors import CastError

    is_cast = "CAST" in argv
    try:
        args = prepare_server_args(argv)
        args.resolve_once()
    except CastError as error:
        return Launch(refused=f"refused: {_reason(str(error))}")
    found = resolving_view(args)
    prompts, verify = attention_backends_of(found)
    if not is_cast and found.speculative_attention_mode == "prefill":
        verify = prompts
    draft = found.speculative_draft_attention_backend or verify
    steps, topk = found.speculative_num_steps, found.speculative_eagle_topk
    shape = f"{steps}-{topk}-{found.speculative_num_draft_tokens}"
    return Launch(shape, prompts, verify, draft if is_cast else "", found.page_size or 1)


def _reason(message: str) -> str:
    """Return the part of a refusal that says why."""
    for key, reason in (
        ("MLA", "MLA"),
        ("linear-attention layers", "linear attention"),
        ("pages of one token", "pages above 1"),
    ):
        if key in message:
            return reason
    return message


@contextlib.contextmanager
def _machine(gpu: str) -> Iterator[None]:
    """Say that this machine has a GPU of a kind."""
    import torch
    from sglang.srt.arg_groups import kv_shard_hook, memory_hook
    from sglang.srt.runtime_context import override_platform

    from cast_sglang.serving.launch import identity

    facts, capability = GPUS[gpu]
    device = {
        "device_name": gpu,
        "device_memory_bytes": MEMORY_MB << 20,
        "driver": "",
        "runtime": "cuda",
        "device_count": 1,
    }
    version = 10 * capability[0] + capability[1]
    everything = {**NO, **facts, "is_cuda": True, "has_flashinfer": True}
    with (
        override_platform(**everything, device_sm=version, device_capability=capability),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "device_count", lambda: 1),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *device: capability),
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.object(memory_hook, "get_device_memory_capacity", lambda device: MEMORY_MB),
        mock.patch.object(kv_shard_hook, "get_device_memory_capacity", lambda device: MEMORY_MB),
        mock.patch.object(identity, "device_facts", lambda name: device),
    ):
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or write it into the document."""
    parser = argparse.ArgumentParser(
        prog="backend_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    lines = table(rows())
    if not args.write:
        print("\n".join(lines))
        return 0
    before, rest = DOCUMENT.read_text().split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(before + "\n".join([BEGIN, *lines, END]) + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
