"""Small valid profiles and identities for tests."""

import math
from typing import Any

import msgspec

from cast_sglang.costs.schema import (
    NO_DRAFT,
    CostProfile,
    CostTable,
    HostIdentity,
    ModelIdentity,
    Provenance,
)


def make_identity(**changes: Any) -> HostIdentity:
    identity = HostIdentity(
        device_name="NVIDIA H200",
        device_memory_bytes=150 << 30,
        driver="570.1",
        runtime="CUDA 13.0",
        target=ModelIdentity(name="org/Target-8B", config_hash="a" * 64, architectures=["Llama"]),
        draft=ModelIdentity(name="org/Draft", config_hash="b" * 64, architectures=["LlamaEagle3"]),
        dtype="bfloat16",
        tp_size=1,
        attention_backend="triton",
        cuda_graph=True,
        page_size=1,
        versions={"sglang": "0.5.23", "torch": "2.11.0", "python": "3.12.1"},
        overlap=True,
        kv_cache_dtype="auto",
        clock_mhz=1980,
    )
    return msgspec.structs.replace(identity, **changes)


def make_table(
    base_us: float = 1000.0,
    batch_sizes: tuple[int, ...] = (1, 4),
    contexts: tuple[int, ...] = (128, 1024),
    token_counts: tuple[int, ...] = (1, 2, 4, 8),
    tile: int = 4,
) -> CostTable:
    """A staircase in batch_size * tokens, with a slope in the context."""

    def time_us(batch_size: int, context: int, tokens: int) -> float:
        rows = tile * math.ceil(batch_size * tokens / tile)
        return base_us * (1 + 0.02 * rows + 1e-4 * batch_size * context)

    def cube(value: Any) -> list[list[list[Any]]]:
        return [[[value(b, c, n) for n in token_counts] for c in contexts] for b in batch_sizes]

    return CostTable(
        batch_sizes=list(batch_sizes),
        contexts=list(contexts),
        token_counts=list(token_counts),
        time_us=cube(time_us),
        spread_us=cube(lambda b, c, n: 0.01 * time_us(b, c, n)),
        samples=cube(lambda b, c, n: 6),
    )


def make_profile(identity: HostIdentity | None = None, **changes: Any) -> CostProfile:
    facts = msgspec.structs.asdict(identity or make_identity())
    profile = CostProfile(
        target=make_table(),
        draft=make_table(base_us=100.0),
        draft_extend=make_table(base_us=150.0),
        step_overhead_us=[50.0, 80.0],
        provenance=Provenance(
            **facts, date="2026-01-01T00:00:00+00:00", command="cast-sglang profile", seconds=12.5
        ),
    )
    return msgspec.structs.replace(profile, **changes)


def make_draftless_profile(**changes: Any) -> CostProfile:
    """Return a profile of a server without a draft model."""
    return make_profile(make_identity(draft=NO_DRAFT), draft=None, draft_extend=None, **changes)
