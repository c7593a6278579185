"""Rows of a made-up run of `bench_serving`, as the report reads them."""

from collections import Counter

from benchmarks.harness.arms import parse_arms, split
from benchmarks.harness.cells import Cell, Group, Result
from benchmarks.harness.counters import TOTALS
from benchmarks.harness.rows import as_rows
from benchmarks.harness.streams import Answer

ARMS = ["plain", "static", "static:3-1-4", "static:2-2-4", "adaptive", "cast:auto"]
ARMS += ["cast:fixed", "cast:auto+calibration=off"]
# Tokens per second relative to plain decoding.
SPEEDS = dict(zip(ARMS, (1.0, 1.4, 1.5, 1.2, 1.3, 1.8, 1.6, 1.7), strict=True))
SPEEDS["static:5-4-8"] = SPEEDS["static"]
ORIGIN = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m benchmarks.bench_serving --arms 'plain,cast' --out out/bench",
    "device": "Device <1>",
    "target": "org/target",
    "draft": "org/draft",
    "server_flags": "--dtype bfloat16",
    "tokens": 64,
    "repeats": 3,
    "tasks": {"code": "source | text"},
    "profiles": {"cast:auto": "profile.json"},
    "versions": {"python": "3.12.1", "sglang": "0.5.23"},
    "git_commit": "0123456789ab",
}


def result(name: str, cell: Cell) -> Result:
    answer = Answer(
        times=[0.1, 0.2, 0.4],
        counts=[1, 12, 40],
        output_ids=[1],
        verify_passes=0 if name == "plain" else 10,
        num_prompt_tokens=100,
    )
    totals = Counter(dict.fromkeys(TOTALS, 10.0) | {"drafts_accepted": 20.0, "predicted_us": 2e4})
    speed = SPEEDS[name] * 40.0 * cell.batch
    if cell.phase == "cold" and name == "cast:auto":
        speed /= 2  # it has learned nothing yet
    return Result([speed, 1.1 * speed, 0.9 * speed], [answer] * cell.batch, totals)


def rows_of(at_once: int = 8, batches: tuple[int, ...] = (1, 8)) -> list[dict]:
    groups = split(parse_arms(ARMS, "draft"), at_once)
    workloads = (("code", 0.0, "warm"), ("chat", 0.8, "warm"), ("code", 0.0, "cold"))
    cells = [Cell(b, t, task, phase) for task, t, phase in workloads for b in batches]
    return [
        row
        for cell in cells
        for row in as_rows(
            cell,
            [Group(arms, {arm.name: result(arm.name, cell) for arm in arms}) for arms in groups],
        )
    ]
