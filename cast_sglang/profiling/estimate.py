"""A cost profile of a GPU that nobody has at hand: computed, and marked as such everywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.passes import PASSES
from cast_sglang.costs.profiles import config_hash
from cast_sglang.costs.schema import CostProfile, HostIdentity, ModelIdentity
from cast_sglang.errors import ProfileError
from cast_sglang.profiling.gpus import MATMUL_SHARE, MEMORY_SHARE, Gpu
from cast_sglang.profiling.grid import default_grid
from cast_sglang.profiling.model_sizes import Precision, draft_sizes, eagle3_config, target_size
from cast_sglang.profiling.roofline import estimate_tables
from cast_sglang.profiling.run import make_profile

__all__ = ["QUANTIZATIONS", "estimate_profile", "read_model_config"]

# Bytes of a weight.
QUANTIZATIONS = {"fp8": 1}


def estimate_profile(
    gpu: Gpu,
    target: Mapping[str, Any],
    draft: Mapping[str, Any] | None,
    limits: Limits,
    *,
    names: tuple[str, str] = ("target", "draft"),
    tp_size: int = 1,
    dtype: str = "bfloat16",
    quantization: str | None = None,
    command: str = "",
) -> CostProfile:
    """Estimate the profile of a pair on a GPU.

    Args:
        target, draft: configs as in `config.json`; None for an EAGLE-3 draft as they are published.
        limits: the largest shapes of the tables.
        names: what to call the models.
        quantization: of `QUANTIZATIONS`; None for weights of `dtype`.

    Raises:
        ProfileError: a config is of a kind that is not known, or the GPU lacks the quantization or
            the memory for the weights.
    """
    if quantization is not None and not gpu.has_fp8:
        raise ProfileError(f"{gpu.name} multiplies nothing in {quantization}")
    draft = eagle3_config(target) if draft is None else draft
    precision = Precision(weight=QUANTIZATIONS.get(quantization or "", 2))
    size = target_size(target, tp_size, precision)
    layer, extend = draft_sizes(draft, target, tp_size, Precision())
    held = size.weight_bytes + size.expert_bytes + extend.weight_bytes
    if held > gpu.memory_bytes:
        raise ProfileError(
            f"the weights take {held / 2**30:.0f} GiB on each of {tp_size} and {gpu.name} has "
            f"{gpu.memory_bytes / 2**30:.0f} GiB; give a larger --tp"
        )
    rates = gpu.rates
    if quantization is not None:
        # Of the target; the draft's few products stay within its weights' time either way.
        rates = rates._replace(flops_per_second=2 * rates.flops_per_second)
    # Between two batch sizes times are nearly on a line; between numbers of rows there are tiles.
    every = {each.name: tuple(range(1, limits.most(each) + 1)) for each in PASSES}
    grid = default_grid(limits)._replace(token_counts=every)
    tables = estimate_tables(grid, rates, size, layer, extend)
    identity = HostIdentity(
        device_name=f"{gpu.name} (estimated)",
        device_memory_bytes=gpu.memory_bytes,
        driver="none",
        runtime="roofline",
        target=_identity(names[0], target),
        draft=_identity(names[1], draft),
        dtype=dtype,
        tp_size=tp_size,
        attention_backend="any",
        cuda_graph=True,
        page_size=1,
        versions={"cast_sglang": metadata.version("cast-sglang")},
        device_count=tp_size,
        quantization=quantization,
    )
    profile = make_profile(tables, identity, command)
    assumed = {
        "source": gpu.source,
        "peak_tflops": gpu.flops_per_second / 1e12,
        "matmul_share": MATMUL_SHARE,
        "memory_gb_per_s": gpu.bytes_per_second / 1e9,
        "memory_share": MEMORY_SHARE,
        "link_gb_per_s": gpu.link_bytes_per_second / 1e9,
        "tile_rows": rates.tile_rows,
        "kernel_us": rates.kernel_seconds * 1e6,
        "exchange_us": rates.exchange_seconds * 1e6,
        "decision_us": rates.decision_seconds * 1e6,
    }
    provenance = msgspec.structs.replace(profile.provenance, sampling=assumed)
    return msgspec.structs.replace(profile, provenance=provenance)


def read_model_config(path: Path) -> tuple[dict[str, Any], str]:
    """Return a config, from its file or its directory, and what to call its model.

    Raises:
        ProfileError: it cannot be read, or is no config.
    """
    path = path.expanduser()
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ProfileError(f"config {path}: cannot be read: {reason}") from error
    if not isinstance(config, dict):
        raise ProfileError(f"config {path}: no JSON object")
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return config, name


def _identity(name: str, config: Mapping[str, Any]) -> ModelIdentity:
    return ModelIdentity(
        name=name,
        config_hash=config_hash(dict(config)),
        architectures=[str(each) for each in config.get("architectures") or ["unknown"]],
    )
