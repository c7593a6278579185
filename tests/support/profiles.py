"""A cost profile with made-up costs: it makes CAST's trees vary, the same way on every machine."""

from pathlib import Path
from typing import Any

import msgspec

from cast_sglang.costs.profiles import save_profile
from cast_sglang.costs.schema import CostProfile

BATCH_SIZES = [1, 4, 16]
CONTEXTS = [128, 1024]


def write_profile(
    path: Path, row_us: float = 60.0, draft_us: float = 400.0, **changes: Any
) -> Path:
    """Write a valid profile, with some fields of its provenance changed.

    Args:
        row_us: what each further verified row takes.
        draft_us: what each pass of the draft takes at least.
    """
    model = {"name": "made/up", "config_hash": "0" * 64, "architectures": ["LlamaForCausalLM"]}
    provenance = {
        "device_name": "made up",
        "device_memory_bytes": 1 << 30,
        "driver": "none",
        "runtime": "cpu",
        "target": model,
        "draft": model,
        "dtype": "float32",
        "tp_size": 1,
        "attention_backend": "cast_cpu",
        "cuda_graph": False,
        "page_size": 1,
        "versions": {},
        "date": "2000-01-01T00:00:00+00:00",
        "command": "none",
        "seconds": 0.0,
        "estimated": True,
        **changes,
    }
    # Cheap drafts and a slow rise with the rows: trees of every size pay at some point.
    tables = {
        "target": _table([1, 8, 32, 64], base_us=20_000, per_row_us=row_us),
        "draft": _table([1, 8, 16], base_us=draft_us, per_row_us=20),
        "draft_extend": _table([1, 8, 32, 64], base_us=draft_us, per_row_us=20),
    }
    profile = msgspec.convert({"provenance": provenance, **tables}, type=CostProfile)
    save_profile(profile, path)
    return path


def _table(token_counts: list[int], base_us: float, per_row_us: float) -> dict[str, Any]:
    shape = (len(BATCH_SIZES), len(CONTEXTS), len(token_counts))
    times = [
        [[base_us + per_row_us * batch * count for count in token_counts] for _ in CONTEXTS]
        for batch in BATCH_SIZES
    ]
    return {
        "batch_sizes": BATCH_SIZES,
        "contexts": CONTEXTS,
        "token_counts": token_counts,
        "time_us": times,
        "spread_us": _filled(shape, 0.0),
        "samples": _filled(shape, 0),
    }


def _filled(shape: tuple[int, int, int], value: float) -> list[list[list[float]]]:
    batches, contexts, counts = shape
    return [[[value] * counts for _ in range(contexts)] for _ in range(batches)]
