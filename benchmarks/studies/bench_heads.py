"""Draft heads beside each other: what the target accepts, what training took, how fast they serve.

    python -m benchmarks.studies.bench_heads FOLDER[:BASE] ... [--speed RESULTS.json] --out DIR
    python -m benchmarks.studies.bench_heads DIR/heads.json --out DIR

A folder is one that `scripts/train_draft.py` wrote, evaluated with --eval-data and --gto-profile;
BASE is the name of the one that it is compared with, prompt by prompt. RESULTS.json is a run of
`bench_serving` whose arms `cast:...+profile=.../NAME.json` serve the heads of these names. Writes
`heads.json` and the picture `heads.png`, and prints the tables; the second form makes both from the
numbers alone.

Served trees are those that policy `auto` chooses at the costs and the batch size of the profile.
Ranges hold 95 %: of prompts that are drawn anew with replacement. A difference whose range holds 1
is within noise.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness.pairs import OUT
from benchmarks.harness.provenance import git_commit
from benchmarks.harness.turns import extent, quotients, ratio_of_sums

PERCENT = 95
KINDS = {
    "LlamaForCausalLMEagle3": "by steps",
    "LlamaForCausalLMCascadeEagle3": "cascade",
    "LlamaForCausalLMParallelEagle3": "parallel",
}
# What is compared with the base, and the tokens and passes of each prompt that it is made of.
MEASURES = {
    "accept length 5-4-8": lambda head: [[tokens, steps] for steps, tokens in head["prompts"]],
    "served trees, greedy": lambda head: [[1 + t["greedy"], 1] for t in head["served"]],
    "served trees, temperature 1": lambda head: [[1 + t["expected"], 1] for t in head["served"]],
}

Head = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Collect, or read what was collected; return the exit code."""
    args = parse_args(argv)
    try:
        if args.heads[0].endswith(".json"):
            content = json.loads(Path(args.heads[0]).read_text())
        else:
            content = collect(args.heads, args.speed)
        texts = [*table(content["heads"]), "", *comparisons(content["heads"])]
        texts += ["", *speed_table(content["heads"], content["speed"])] if content["speed"] else []
    except (OSError, ValueError, KeyError) as error:
        print(f"bench_heads: error: {error!r}", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "heads.json").write_text(json.dumps(content) + "\n")
    draw(content["heads"], content["speed"], args.out / "heads.png")
    print("\n".join(texts))
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_heads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("heads", nargs="+", metavar="FOLDER[:BASE]", help="or one heads.json")
    parser.add_argument("--speed", type=Path, metavar="FILE", help="results.json of bench_serving")
    parser.add_argument("--out", type=Path, default=OUT / "heads", help="(default: %(default)s)")
    return parser.parse_args(argv)


def collect(heads: Sequence[str], speed: Path | None) -> dict[str, Any]:
    """Return what the folders of heads, and a run of `bench_serving`, say."""
    rows = [row_of(Path(folder), base) for folder, _, base in (h.partition(":") for h in heads)]
    names = [row["head"] for row in rows]
    if unknown := {row["base"] for row in rows} - {*names, ""}:
        raise ValueError(f"no head {', '.join(unknown)} to compare with")
    return {
        "git_commit": git_commit(),
        "heads": rows,
        "speed": speeds(speed, names) if speed else {},
    }


def row_of(folder: Path, base: str) -> dict[str, Any]:
    """Return what is known of one head."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    fields = "tree minutes steps token_passes parameters agreement prompts served".split()
    return {
        "head": folder.name,
        "base": base,
        "kind": KINDS[config["architectures"][0]],
        "layers": config["num_hidden_layers"],
        "bytes": (folder / "model.safetensors").stat().st_size,
        "accept_length": evaluation["accept_length"],
        "reach": reach(evaluation["accept_len_histogram"], evaluation["tree"]["num_steps"]),
        **{field: evaluation[field] for field in fields},
    }


def reach(histogram: Mapping[str, int], depth: int) -> list[float]:
    """Return the parts of the verify steps that accept at least 1, 2, ... `depth` drafts.

    Args:
        histogram: verify steps by their accepted tokens, the bonus token among them.
    """
    counts = [histogram.get(str(length), 0) for length in range(depth + 1, 0, -1)]
    above = list(accumulate(counts))
    return [each / above[-1] for each in above[-2::-1]]


def speeds(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Return the last run of a file of `bench_serving`: its origin, and rows by head."""
    run = json.loads(path.read_text())["runs"][-1]
    rows = []
    for row in run["rows"]:
        found = re.search(r"profile=\S*?([^/]+)\.json", row["arm"])
        name = found[1] if found else row["arm"]
        if name in (*names, "plain"):
            fields = "batch temperature tok_s accept_length predicted_to_measured".split()
            rows.append({"head": name} | {field: row.get(field) for field in fields})
    origin = {key: run["provenance"].get(key) for key in ("command", "date", "device")}
    return {**origin, "git_commit": run["provenance"]["git_commit"], "rows": rows}


def ratio(head: Head, base: Head, measure: str) -> tuple[float, float, float]:
    """Return a measure of a head over that of its base, with the range."""
    ours, theirs = (MEASURES[measure](each) for each in (head, base))
    if len(ours) != len(theirs):
        raise ValueError(f"{head['head']} and {base['head']} have not seen the same prompts")
    return ratio_of_sums(ours, theirs, PERCENT)


def mean(head: Head, field: str) -> float:
    """Return the mean over prompts of what is known of the served trees."""
    return sum(trees[field] for trees in head["served"]) / len(head["served"])


def table(heads: Sequence[Head]) -> list[str]:
    """Return the heads as lines of Markdown: what they are, and what is accepted by depth."""
    depth = max(len(head["reach"]) for head in heads)
    columns = ["head", "drafts", "layers", "MB", "minutes", "steps", "accept length 5-4-8"]
    columns += [f"depth {d}" for d in range(1, depth + 1)]
    columns += ["served trees: tokens greedy", "at temperature 1", "rows"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for head in heads:
        cells = [head["head"], head["kind"], str(head["layers"]), f"{head['bytes'] / 1e6:.1f}"]
        cells += [f"{head['minutes']:.1f}" if head["steps"] else "-", f"{head['steps'] or '-'}"]
        cells.append(f"{head['accept_length']:.2f}")
        cells += [f"{part:.0%}" for part in head["reach"]]
        cells += ["-"] * (depth - len(head["reach"]))
        cells += [f"{1 + mean(head, field):.2f}" for field in ("greedy", "expected")]
        cells.append(f"{mean(head, 'num_rows'):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def comparisons(heads: Sequence[Head]) -> list[str]:
    """Return each head relative to its base as lines of Markdown."""
    named = {head["head"]: head for head in heads}
    lines = [f"| head | to | {' | '.join(MEASURES)} |", "|---" * (2 + len(MEASURES)) + "|"]
    for head in heads:
        if head["base"]:
            found = [ratio(head, named[head["base"]], measure) for measure in MEASURES]
            cells = [f"{middle:.3f} ({low:.3f} to {high:.3f})" for middle, low, high in found]
            lines.append(f"| {head['head']} | {head['base']} | {' | '.join(cells)} |")
    return lines


def speed_table(heads: Sequence[Head], speed: Mapping[str, Any]) -> list[str]:
    """Return tokens per second, and ratios within repeats, as lines of Markdown."""
    bases = {head["head"]: head["base"] for head in heads}
    rows = {(row["head"], row["temperature"], row["batch"]): row for row in speed["rows"]}
    lines = ["| head | T | batch | tokens/s | to plain | to its base | accept length |", "|---" * 7]
    lines[1] += "|"
    for (name, temperature, batch), row in rows.items():
        cells = [name, f"{temperature:g}", str(batch), _spread(row["tok_s"], 1)]
        for other in ("plain", bases.get(name)):
            base = rows.get((other, temperature, batch))
            is_same = base is None or base is row
            cells.append("" if is_same else _spread(quotients(row["tok_s"], base["tok_s"]), 2))
        length = row["accept_length"]
        cells.append(f"{length:.2f}" if length else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float], digits: int) -> str:
    middle, *ends = extent(values)
    low, high = (f"{end:.{digits}f}" for end in ends)
    return f"{middle:.{digits}f} ({low} to {high})"


def draw(heads: Sequence[Head], speed: Mapping[str, Any], path: Path) -> None:
    """Draw what is accepted by depth, the ratios to the bases, and speed where it is known."""
    figure = Figure(figsize=(15.0 if speed else 10.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3 if speed else 2, squeeze=False)[0]
    for head in heads:
        depths = range(1, len(head["reach"]) + 1)
        panels[0].plot(depths, head["reach"], marker="o", markersize=3, label=head["head"])
    panels[0].set(xlabel="drafts", ylabel="part of the steps that accept as many", title="5-4-8")
    panels[0].set_xticks(range(1, max(len(head["reach"]) for head in heads) + 1))
    panels[0].legend(fontsize="small", frameon=False)
    _draw_ratios(panels[1], heads)
    if speed:
        _draw_speed(panels[2], heads, speed)
    figure.savefig(path, dpi=100)


def _draw_ratios(axes: Axes, heads: Sequence[Head]) -> None:
    named = {head["head"]: head for head in heads}
    compared = [head for head in heads if head["base"]]
    for number, measure in enumerate(MEASURES):
        for place, head in enumerate(compared):
            middle, low, high = ratio(head, named[head["base"]], measure)
            at = place + 0.2 * (number - 1)
            axes.errorbar(
                [middle],
                [at],
                xerr=[[middle - low], [high - middle]],
                color=f"C{number}",
                marker="o",
                markersize=4,
                label=measure if place == 0 else None,
            )
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(compared)), [f"{h['head']} to {h['base']}" for h in compared])
    axes.invert_yaxis()
    axes.set(xlabel="ratio, 95 % of prompts drawn anew", title="to the base")
    axes.legend(fontsize="small", frameon=False)


def _draw_speed(axes: Axes, heads: Sequence[Head], speed: Mapping[str, Any]) -> None:
    plain = {(r["temperature"], r["batch"]): r for r in speed["rows"] if r["head"] == "plain"}
    for number, head in enumerate(heads):
        rows = [row for row in speed["rows"] if row["head"] == head["head"]]
        for temperature, line in ((0.0, "-"), (1.0, "--")):
            found = sorted(
                (row["batch"], extent(quotients(row["tok_s"], plain[key]["tok_s"])).median)
                for row in rows
                if (key := (row["temperature"], row["batch"])) in plain and key[0] == temperature
            )
            if found:
                label = f"{head['head']}, T={temperature:g}"
                axes.plot(
                    *zip(*found, strict=True), line, marker="o", color=f"C{number}", label=label
                )
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="batch", ylabel="tokens/s relative to plain decoding", title="CAST auto")
    axes.legend(fontsize="small", frameon=False)


if __name__ == "__main__":
    sys.exit(main())
