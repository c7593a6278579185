"""How far draft probabilities can be trusted, before and after calibration, on held-out prompts.

    python -m benchmarks.studies.bench_calibration --out DIR

One server learns from one half of the prompts. A fresh one then answers the other half; what it
sees is predicted by the draft's own probabilities and by the map that the first server learned.
Writes `reliability.json` and the picture `reliability.png`.
"""

import argparse
import asyncio
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness.arms import parse_arm
from benchmarks.harness.counters import cast_state
from benchmarks.harness.pairs import OUT, Pair, heldout_prompts, tiny_pair
from benchmarks.harness.provenance import provenance
from benchmarks.harness.servers import ServerError, exit_on_sigterm, serving
from benchmarks.harness.streams import stream_batch

Row = Mapping[str, Any]  # as `acceptance.Reliability`
FEWEST_NODES = 10  # of a point that is drawn; a handful says nothing
Z = 1.96  # standard deviations of a 95 % interval
# A colour and a marker for each bucket of depths; colour-blind readers can tell them apart.
LOOKS = (
    *(("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "D"), ("#cc79a7", "^")),
    *(("#e69f00", "v"), ("#56b4e9", "P"), ("#332288", "X"), ("#882255", "*")),
)


class Point(NamedTuple):
    """Nodes of like probability below accepted parents."""

    first_depth: int
    num_nodes: float
    drafted: float  # mean probability as the draft states it
    calibrated: float  # mean probability as the other half of the prompts taught
    accepted: float  # share that was accepted


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    args = parse_args(argv)
    exit_on_sigterm()
    pair = Pair(args.model_path, args.draft_model_path) if args.model_path else tiny_pair()
    prompts = heldout_prompts()
    halves = prompts[::2], prompts[1::2]
    try:
        learned, seen = (
            serve(args, pair, name, half)
            for name, half in zip(("first", "second"), halves, strict=True)
        )
    except (ServerError, OSError, ValueError, httpx.HTTPError) as error:
        print(f"bench_calibration: error: {error}", file=sys.stderr)
        return 1
    points = predict(learned, seen)
    errors = {name: error_of(points, name) for name in ("drafted", "calibrated")}
    settings = {name: getattr(args, name) for name in ("temperature", "batch", "tokens")}
    settings["server_flags"] = args.server_flags
    origin = provenance("benchmarks.studies.bench_calibration", argv, pair, "", settings)
    content = {"provenance": origin, "errors": errors, "points": [p._asdict() for p in points]}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "reliability.json").write_text(json.dumps(content, indent=1) + "\n")
    draw(points, f"{args.out}/reliability.png")
    print(json.dumps(errors))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", help="target (default: the tiny pair)")
    parser.add_argument("--draft-model-path", help="its draft, with --model-path")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="per answer (default: 128)")
    parser.add_argument("--server-flags", default="--dtype bfloat16 --max-total-tokens 16384")
    parser.add_argument("--out", type=Path, default=OUT / "calibration")
    args = parser.parse_args(argv)
    if (args.model_path is None) != (args.draft_model_path is None):
        parser.error("--model-path and --draft-model-path go together")
    return args


def serve(args: argparse.Namespace, pair: Pair, name: str, prompts: Sequence[str]) -> Sequence[Row]:
    """Answer the prompts by a fresh server and return its reliability."""
    arm = parse_arm("cast:auto", pair.draft)
    with serving([arm], pair.target, args.out / name, args.server_flags.split()) as servers:
        server = servers[arm.name]
        for start in range(0, len(prompts), args.batch):
            wave = prompts[start : start + args.batch]
            asyncio.run(stream_batch(server.url, wave, args.temperature, args.tokens))
        rows: Sequence[Row] = cast_state(server)["reliability"]
        return rows


def predict(learned: Sequence[Row], seen: Sequence[Row]) -> list[Point]:
    """Predict what was seen by what was learned elsewhere; a depth that was not met stays raw."""
    curves: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in learned:
        share = (row["drafted"] / row["num_nodes"], row["calibrated"] / row["num_nodes"])
        curves[row["first_depth"]].append(share)
    points = []
    for row in seen:
        depth, nodes = row["first_depth"], row["num_nodes"]
        drafted = row["drafted"] / nodes
        ends = [(0.0, 0.0), *sorted(curves[depth]), (1.0, 1.0)]
        calibrated = float(np.interp(drafted, *zip(*ends, strict=True)))
        points.append(Point(depth, nodes, drafted, calibrated, row["accepted"] / nodes))
    return points


def error_of(points: Sequence[Point], name: str) -> float:
    """Return the expected calibration error: the mean distance to what was accepted, by nodes."""
    nodes = sum(point.num_nodes for point in points)
    gaps = (point.num_nodes * abs(getattr(point, name) - point.accepted) for point in points)
    return round(sum(gaps) / nodes, 4)


def draw(points: Sequence[Point], path: str) -> None:
    """Draw the share accepted against both predictions, a colour for each bucket of depths."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"drafted": "Draft's own probability", "calibrated": "Calibrated on other prompts"}
    names = depth_names(sorted({point.first_depth for point in points}))
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, label="as predicted")
        for (depth, label), (color, marker) in zip(names.items(), LOOKS, strict=False):
            mine = [p for p in points if p.first_depth == depth and p.num_nodes >= FEWEST_NODES]
            mine.sort(key=lambda point: getattr(point, name))
            ends = [confidence(point) for point in mine]
            axes.errorbar(
                [getattr(point, name) for point in mine],
                [point.accepted for point in mine],
                [
                    [max(0.0, p.accepted - low) for p, (low, _) in zip(mine, ends, strict=True)],
                    [max(0.0, high - p.accepted) for p, (_, high) in zip(mine, ends, strict=True)],
                ],
                color=color,
                marker=marker,
                markersize=4,
                linewidth=0.6,
                elinewidth=0.9,
                label=label,
            )
        axes.set_title(f"{title}: off by {error_of(points, name):.3f} in the mean", loc="left")
        axes.set_xlabel("predicted chance of acceptance, given that the parent was accepted")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("share accepted")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        title="nodes of each depth; bars: 95 % confidence, if nodes were independent",
        loc="outside lower center",
        ncols=len(names) + 1,
        frameon=False,
    )
    figure.savefig(path)


def depth_names(first_depths: Sequence[int]) -> dict[int, str]:
    """Name buckets of depths, each of which ends where the next one begins."""
    names = {}
    for first, following in itertools.zip_longest(first_depths, first_depths[1:]):
        last = first if following is None else following - 1
        names[first] = f"depth {first}" + ("" if last == first else f" to {last}")
    if first_depths:
        names[first_depths[-1]] += " and deeper"
    return names


def confidence(point: Point) -> tuple[float, float]:
    """Return the ends of Wilson's 95 % interval of the share that was accepted."""
    share, nodes = point.accepted, point.num_nodes
    middle = share + Z**2 / (2 * nodes)
    half = Z * math.sqrt(share * (1 - share) / nodes + Z**2 / (4 * nodes**2))
    return (middle - half) / (1 + Z**2 / nodes), (middle + half) / (1 + Z**2 / nodes)


if __name__ == "__main__":
    sys.exit(main())
