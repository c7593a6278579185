"""Servers of a check: starting them, decoding with them, comparing and tracing what they do."""

import asyncio
import contextlib
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.gpu_host.settings import Settings

Numbers = dict[str, Any]
TRACE_SECONDS = 25.0


class CheckError(RuntimeError):
    """A check did not hold; the message says what was found."""


# Below what chance brings in the life of a check, above what a wrong rule of acceptance brings.
LEAST_P_VALUE = 1e-6
LAW_TOKENS = 3
LAW_SAMPLES_A_REQUEST = 240
LAWS = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.6, top-p 0.8": {"temperature": 0.6, "top_p": 0.8},
    "temperature 1, top-k 5": {"temperature": 1.0, "top_k": 5},
}


def compare_greedy(settings: Settings, numbers: Numbers, servers: Mapping[str, Any]) -> None:
    """Decode prompts with plain decoding one by one, with every arm in batches; count partings.

    The last arm of fixed trees is asked once more not to draft, which runs its plain steps.
    """
    expected = decode(servers["plain"], settings, 1, settings.num_tokens)
    drafting = [arm for arm in servers if arm.startswith("cast:fixed")]
    asked = [(arm, None) for arm in servers] + [(arm, "off") for arm in drafting[-1:]]
    for arm, mode in asked:
        for batch in settings.equality_batches:
            if (arm, batch) != ("plain", 1):
                name = f"{arm}{'' if mode is None else ', plain steps'}, batch {batch}"
                numbers[name] = _compared(settings, servers[arm], arm, mode, batch, expected)


def _compared(
    settings: Settings,
    server: Any,
    arm: str,
    mode: str | None,
    batch: int,
    expected: Sequence[Sequence[int]],
) -> Numbers:
    from benchmarks.harness.counters import cast_state, tree_means

    is_cast = arm.startswith("cast")
    before = cast_state(server) if is_cast else {}
    row = partings(expected, decode(server, settings, batch, settings.num_tokens, mode))
    if is_cast:
        after = cast_state(server)
        rows = row["rows"] = tree_means(before, after)["mean_verify_rows"]
        if "copying" in arm:
            row["copies"] = after["copies_accepted"] - before["copies_accepted"]
        if mode is not None and (rows or 1) > 1:
            raise CheckError(f"{arm} drafted for requests that asked it not to")
        if mode is None and arm.startswith("cast:fixed") and not (rows or 0) > 1:
            raise CheckError(f"{arm} verified no drafts, so equality says nothing")
    return row


def compare_laws(
    settings: Settings, numbers: Numbers, servers: Mapping[str, Any], arm: str
) -> None:
    """Sample with plain decoding and with an arm, and compare what they draw.

    Raises:
        CheckError: the arm's tokens have another law, or none of its drafts were accepted.
    """
    import numpy as np

    from benchmarks.harness.pairs import heldout_prompts
    from tests.server.client import generate
    from tests.server.homogeneity import homogeneity_p_value

    prompt = heldout_prompts()[0]
    for name, sampling in LAWS.items():
        drawn = {}
        for server in ("plain", arm):
            answers: list[Any] = []
            while len(answers) < settings.law_samples:
                answers += generate(
                    servers[server],
                    prompt,
                    n=min(LAW_SAMPLES_A_REQUEST, settings.law_samples),
                    max_new_tokens=LAW_TOKENS,
                    **sampling,
                )
            drawn[server] = np.array([answer["output_ids"] for answer in answers])
        passes = np.array([answer["meta_info"]["spec_verify_ct"] for answer in answers])
        least = min(
            homogeneity_p_value(drawn["plain"][:, of], drawn[arm][:, of])
            for last in range(LAW_TOKENS)
            for of in (slice(last, last + 1), slice(0, last + 1))
        )
        # The first token is prefill's; two more took one pass where a draft was accepted.
        accepted = float((passes < LAW_TOKENS - 1).mean())
        numbers[name] = {"samples": len(answers), "least_p": least, "accepted": accepted}
        if least < LEAST_P_VALUE:
            raise CheckError(f"{arm}, {name}: its tokens have another law, p {least:.2g}")
        if not accepted:
            raise CheckError(f"{arm}, {name}: no draft was accepted, so laws say nothing")


def partings(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> Numbers:
    """Compare answers token for token, each up to where it first differs."""
    tokens = flips = 0
    for ours, theirs in zip(found, expected, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        flips += same is not None
        tokens += len(theirs) if same is None else same + 1
    rate = round(flips / tokens, 5)
    return {"answers": len(expected), "flips": flips, "tokens": tokens, "flip_rate": rate}


def decode(
    server: Any, settings: Settings, batch: int, num_tokens: int, mode: str | None = None
) -> list[list[int]]:
    """Return greedy answers to held-out prompts, `batch` of them at a time.

    Args:
        mode: of speculation, as the requests ask for it.
    """
    from benchmarks.harness.cells import choose_prompts
    from benchmarks.harness.pairs import heldout_prompts
    from benchmarks.harness.streams import stream_batch

    count = settings.num_prompts if batch <= settings.num_prompts else batch
    prompts = choose_prompts(heldout_prompts()[:count], batch, count)
    answers = []
    for start in range(0, len(prompts), batch):
        wave = prompts[start : start + batch]
        answers += asyncio.run(stream_batch(server.url, wave, 0.0, num_tokens, mode))
    return [answer.output_ids for answer in answers][: settings.num_prompts]


def traced(server: Any, settings: Settings, batch: int, folder: Path) -> Path:
    """Decode under SGLang's profiler and return the trace that it wrote."""
    import httpx

    activities = ["CPU"] if settings.is_dry else ["CPU", "GPU"]
    body = {"output_dir": str(folder), "num_steps": settings.trace_steps, "activities": activities}
    # Stacks would slow down the host whose time is looked at.
    body["with_stack"] = False
    httpx.post(f"{server.url}/start_profile", json=body, timeout=60).raise_for_status()
    decode(server, settings, batch, settings.num_tokens)
    deadline = time.monotonic() + TRACE_SECONDS
    while time.monotonic() < deadline:
        found = list(folder.rglob("*.trace.json.gz"))
        # It may still be growing.
        if found and time.time() - found[0].stat().st_mtime > 1.0:
            return found[0]
        time.sleep(0.2)
    raise CheckError(f"the profiler wrote no trace of {settings.trace_steps} steps")


@contextlib.contextmanager
def serving_arms(
    settings: Settings, pair: Any, dtype: str, arms: Sequence[str], name: str
) -> Iterator[dict[str, Any]]:
    """Serve a pair in several ways at once."""
    from benchmarks.harness.arms import parse_arms
    from benchmarks.harness.servers import serving

    profile = profile_path(settings)
    chosen = str(profile) if profile.exists() and dtype == "bfloat16" else "estimate"
    parsed = parse_arms(arms, pair.draft, chosen)
    flags = shlex.split(f"--dtype {dtype} {settings.capacity} {settings.flags}")
    logs = Path(settings.work) / "servers" / name
    try:
        with serving(parsed, pair.target, logs, flags, None, settings.start_at_once) as servers:
            yield servers
    finally:
        copy_logs(logs, settings, name)


def inflated(settings: Settings) -> Any:
    """Return the pair that `check_inflate` made."""
    from benchmarks.harness.pairs import Pair

    folder = Path(settings.work) / "inflated"
    if not (folder / "draft" / "config.json").exists():
        raise CheckError(f"there is no pair in {folder}: run the stage inflate first")
    return Pair(str(folder / "target"), str(folder / "draft"))


def profile_path(settings: Settings) -> Path:
    """Return where the stage `profile` leaves the cost profile."""
    return Path(settings.out) / "profile.json"


def copy_logs(folder: Path, settings: Settings, name: str) -> None:
    """Put the logs of servers beside those of the stages."""
    for log in folder.rglob("*.log"):
        shutil.copyfile(log, Path(settings.work) / "logs" / f"{name}--{log.name}")


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for the servers that are started meanwhile."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
