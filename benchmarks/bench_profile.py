"""How much speed an imperfect cost table loses.

    python -m benchmarks.bench_profile --profile PROFILE --out DIR [--more quick=QUICK_PROFILE]

From one good profile the study derives tables that are wrong in known ways and serves each as one
arm beside the right table, with the same window, turns and ratios as `bench_serving`. The online
correction is off, so that a table's own effect shows, except in arms whose name says otherwise.
Arms that do not fit in memory together run in groups, each with a right table of its own.

Variants: error-X[@SEED] (X percent typical error, entries independent) | one-context | ends-only |
wrong-rows | nearest | same (the right table again, so the noise of the study) | any of these or
`right` with +residuals (the online correction).
"""

import argparse
import dataclasses
import itertools
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.arms import Arm, parse_arm
from benchmarks.bench_serving import choose_pair
from benchmarks.cells import Cell, Result, choose_prompts, run, take_turns, warm_up
from benchmarks.counters import TREE_MEANS, cast_state, tree_means
from benchmarks.options import (
    add_workload_options,
    check_workload,
    list_of,
    workload_settings,
)
from benchmarks.pairs import OUT, CommandError, tiny_directory
from benchmarks.prompt_files import read_prompts
from benchmarks.provenance import provenance
from benchmarks.rows import num_identical, ratios, speeds
from benchmarks.servers import Server, ServerError, exit_on_sigterm, serving
from benchmarks.streams import Answer, accept_length
from benchmarks.variant_figure import draw
from benchmarks.variants import (
    DEFAULT_VARIANTS,
    RIGHT,
    Variant,
    groups,
    parse_variant,
    table_error,
    tabulated_rate,
)
from cast_sglang.profile_schema import CostProfile
from cast_sglang.profiles import load_profile, save_profile


@dataclasses.dataclass(frozen=True)
class Contender:
    """A variant with its table and the server that uses it."""

    variant: Variant
    profile: CostProfile
    arm: Arm
    profile_seconds: float | None = None  # time that measuring it took; None if it was derived


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return the exit code."""
    args = parse_args(argv)
    exit_on_sigterm()
    rows: list[dict[str, Any]] = []
    try:
        right = load_profile(args.profile)
        pair, note = choose_pair(args)
        reference, *others = choose_contenders(args, right, pair.draft)
        tasks = {path.stem: joined(read_prompts(path), args.join) for path in args.prompts}
        cells = [Cell(batch, 0.0, task) for batch, task in itertools.product(args.batches, tasks)]
        origin = provenance(
            "benchmarks.bench_profile", argv, pair, note, study_settings(args, right)
        )
        flags = shlex.split(args.server_flags)
        for number, group in enumerate(groups(others, args.at_once), start=1):
            group = [reference, *group]
            arms = [contender.arm for contender in group]
            with serving(arms, pair.target, args.out / f"group-{number}", flags) as servers:
                rows += measure(args, number, group, servers, cells, tasks)
            # After each group, so that an interrupted study leaves what it has.
            write(args.out, {"provenance": origin, "rows": rows})
    except (CommandError, ServerError, OSError, ValueError, httpx.HTTPError) as error:
        print(f"bench_profile: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench_profile: interrupted", file=sys.stderr)
        return 130
    # A file or pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else 180).print(as_table(rows))
    print(args.out / "results.json")
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--profile", required=True, help="the right cost profile")
    parser.add_argument(
        "--variants",
        type=list_of(str),
        default=list(DEFAULT_VARIANTS),
        metavar="LIST",
        help=f"default: {','.join(DEFAULT_VARIANTS)}",
    )
    parser.add_argument(
        "--more",
        type=_named_path,
        action="append",
        default=[],
        metavar="NAME=PROFILE",
        help="serve another profile as a variant, such as a quick one (repeatable)",
    )
    parser.add_argument(
        "--wrong-rows",
        type=_first_and_last,
        default=(5, 16),
        metavar="FIRST-LAST",
        help="token counts whose target times `wrong-rows` doubles (default: 5-16)",
    )
    parser.add_argument("--policy", default="fixed", help="of CAST (default: %(default)s)")
    parser.add_argument("--thresholds", default="", metavar="C1-C2-C3")
    parser.add_argument(
        "--settle-tokens",
        type=int,
        default=0,
        help="tokens per request that arms with online correction decode before each cell",
    )
    parser.add_argument("--at-once", type=int, default=6, help="servers in memory (default: 6)")
    parser.add_argument(
        "--join",
        type=int,
        default=1,
        help="prompts joined into one, for longer contexts (default: 1)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT / "profile-study",
        help="gets results.json, a figure, the tables and logs",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        nargs="+",
        default=[tiny_directory() / "heldout_prompts.jsonl"],
        metavar="FILE",
        help="JSON lines with a field `prompt`; the name of a file names its task",
    )
    add_workload_options(parser)
    args = parser.parse_args(argv)
    check_workload(parser, args)
    if args.at_once < 2 or args.join < 1 or args.repeats < 1 or args.settle_tokens < 0:
        parser.error("--at-once is at least 2, --join and --repeats 1, --settle-tokens 0")
    names = [*args.variants, *(name for name, _ in args.more)]
    if not names or len(set(names)) < len(names) or RIGHT in names:
        parser.error("--variants and --more: each name once, and not `right`, which always runs")
    return args


def choose_contenders(args: argparse.Namespace, right: CostProfile, draft: str) -> list[Contender]:
    """Return what to serve, the right table first; write the derived tables beside the results."""

    def contender(
        variant: Variant, profile: CostProfile, path: Path | str, seconds: float | None = None
    ) -> Contender:
        prices = f":{args.thresholds}" if args.thresholds else ""
        arm = parse_arm(f"cast:{args.policy}{prices}", draft, str(path))
        arm = dataclasses.replace(arm, name=variant.name, env=variant.env)
        return Contender(variant, profile, arm, seconds)

    chosen = [contender(Variant(RIGHT), right, args.profile, right.provenance.seconds)]
    for text in args.variants:
        variant = parse_variant(text, args.wrong_rows)
        profile, path = right, Path(args.profile)
        if variant.change is not None:
            profile = variant.change(right)
            path = args.out / "profiles" / f"{variant.table}.json"
            save_profile(profile, path)
        chosen.append(contender(variant, profile, path))
    for name, path in args.more:
        profile = load_profile(path)
        chosen.append(contender(Variant(name), profile, path, profile.provenance.seconds))
    return chosen


def joined(prompts: list[str], count: int) -> list[str]:
    """Join each prompt with the `count - 1` after it, so that as many longer ones result."""
    ring = prompts + prompts[: count - 1]
    return ["\n".join(ring[start : start + count]) for start in range(len(prompts))]


def study_settings(args: argparse.Namespace, right: CostProfile) -> dict[str, Any]:
    """Return what made the numbers of the study what they are."""
    source = right.provenance
    return {
        **workload_settings(args),
        "requests": args.requests,
        "prompts": [path.name for path in args.prompts],
        "join": args.join,
        "policy": args.policy,
        "thresholds": args.thresholds or "default",
        "wrong_rows": list(args.wrong_rows),
        "settle_tokens": args.settle_tokens,
        "at_once": args.at_once,
        "profile": {
            "file": Path(args.profile).name,
            "date": source.date,
            "seconds": source.seconds,
            "heldout": msgspec.to_builtins(source.heldout),
        },
    }


def measure(
    args: argparse.Namespace,
    number: int,
    group: Sequence[Contender],
    servers: dict[str, Server],
    cells: Sequence[Cell],
    tasks: dict[str, list[str]],
) -> list[dict[str, Any]]:
    """Measure every arm of a group in every cell and return the rows of the result."""
    rows: list[dict[str, Any]] = []
    arms = [contender.arm for contender in group]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(cells) * args.repeats * len(arms))
        for cell in cells:
            prompts = choose_prompts(tasks[cell.task], cell.batch, args.requests)
            # Answers as long as the measured ones, so that the correction sees the same contexts.
            num_waves = -(-args.settle_tokens // args.tokens)
            waves = choose_prompts(tasks[cell.task], cell.batch, num_waves * cell.batch)
            for contender in group:
                if contender.variant.residuals and num_waves:
                    progress.update(bar, description=f"settling {contender.arm.name}")
                    run(servers[contender.arm.name], waves, cell, args.tokens)
            warm_up(arms, servers, cell, prompts)
            before = {name: cast_state(server) for name, server in servers.items()}
            results = take_turns(
                args.repeats, args.tokens, arms, servers, cell, prompts, progress, bar
            )
            trees = {name: tree_means(before[name], cast_state(servers[name])) for name in servers}
            rows += study_rows(cell, number, group, results, trees)
    return rows


def study_rows(
    cell: Cell,
    number: int,
    group: Sequence[Contender],
    results: Mapping[str, Result],
    trees: Mapping[str, Mapping[str, float | None]],
) -> list[dict[str, Any]]:
    """Summarise a cell of a group whose first contender has the right table."""
    reference = group[0]
    rows = []
    for contender in group:
        variant, result = contender.variant, results[contender.arm.name]
        base = results[reference.arm.name]
        within = ratios(result, base)
        contexts = served_contexts(result.answers)
        error = table_error(
            contender.profile,
            reference.profile,
            batch=cell.batch,
            contexts=contexts,
            lookup=variant.lookup,
        )
        rows.append(
            {
                "variant": variant.name,
                "group": number,
                **cell._asdict(),
                **speeds(result),
                "vs_right": round(statistics.median(within), 4),
                "vs_right_min": round(min(within), 4),
                "vs_right_max": round(max(within), 4),
                "accept_length": accept_length(result.answers),
                **trees[contender.arm.name],
                "residuals": variant.residuals,
                "lookup": variant.lookup,
                "nominal_error": variant.nominal_error,
                "table_error": round(error, 4),
                "contexts": list(contexts),
                "profile_seconds": contender.profile_seconds,
                "num_identical_to_right": num_identical(result, base),
                "num_requests": len(result.answers),
            }
        )
    rates = [tabulated_rate(reference.profile, row) for row in rows]
    for row, rate in zip(rows, rates, strict=True):
        known = None if rate is None or rates[0] is None else round(rate / rates[0], 4)
        row["vs_right_by_table"] = known
    return rows


def served_contexts(answers: Sequence[Answer]) -> tuple[int, int]:
    """Return the shortest and the longest context in which the answers were decoded."""
    return (
        min(answer.num_prompt_tokens for answer in answers),
        max(answer.num_prompt_tokens + answer.counts[-1] for answer in answers),
    )


def write(directory: Path, content: dict[str, Any]) -> None:
    """Write the results and their figure."""
    (directory / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    title = f"{content['provenance']['device']}, {content['provenance']['target']}"
    draw(content["rows"], title, [directory / "speed.png", directory / "speed.svg"])


def as_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Show the rows to a person."""
    table = Table(title="Steady decoding with imperfect tables: median (min to max) of the repeats")
    for heading in ("task", "batch", "variant"):
        table.add_column(heading, no_wrap=True)
    headings = "tokens/s", "vs right", "accept length", "layers", "nodes", "rows", "pred/meas"
    for heading in (*headings, "table error", "profiling"):
        table.add_column(heading, justify="right")
    for row in sorted(rows, key=lambda row: (row["task"], row["batch"])):
        seconds = row["profile_seconds"]
        table.add_row(
            row["task"],
            str(row["batch"]),
            row["variant"],
            f"{row['tok_s_median']:.1f} ({row['tok_s_min']:.1f} to {row['tok_s_max']:.1f})",
            f"{row['vs_right']:.2f}x ({row['vs_right_min']:.2f} to {row['vs_right_max']:.2f})",
            *(
                "-" if row[key] is None else f"{row[key]:.2f}"
                for key in ("accept_length", *TREE_MEANS)
            ),
            f"{row['table_error']:.0%}",
            "-" if seconds is None else f"{seconds:.0f} s",
        )
    return table


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (equals and path and name.replace("-", "").replace(".", "").isalnum()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PROFILE")
    return name, Path(path)


def _first_and_last(text: str) -> tuple[int, int]:
    first, last = map(int, text.split("-"))
    return first, last


if __name__ == "__main__":
    sys.exit(main())
