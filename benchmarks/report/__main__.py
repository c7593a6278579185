"""One page from the files that benchmarks leave behind: `report.html` and `report.md`.

    python -m benchmarks.report RESULTS.json [MORE.json ...] --profile PROFILE.json \\
        --reliability reliability.json --out DIR
    python -m benchmarks.report RESULTS.json --update-docs .

The page holds its pictures itself and asks nothing of any other place; beside it lie the pictures
as files and copies of the numbers. What was not given is left out, and the page says what makes it.
Files of another kind are named and left out.
"""

import argparse
import functools
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.pairs import OUT
from benchmarks.report import ablation, figures, tables
from benchmarks.report.data import (
    OtherKindError,
    ReportError,
    Run,
    arms_of,
    load_runs,
    read_json,
    workloads,
)
from benchmarks.report.page import (
    Block,
    Bullets,
    Details,
    Heading,
    Paragraph,
    Picture,
    as_html,
    as_markdown,
    pictures_in,
)
from benchmarks.report.readme import update_docs
from cast_sglang.costs.profiles import load_profile
from cast_sglang.costs.schema import CostProfile
from cast_sglang.errors import ProfileError

TITLE = "CAST: how fast, and why"
PICTURES, NUMBERS = "pictures", "numbers"  # folders beside the page
READING = (
    "Speed is tokens per second of steady serving: as many requests run as the batch size says, "
    "and one that ends makes room for the next. It is the median of the repeats, with the least "
    "and the greatest.",
    "Ratios are formed within a repeat, in which the arms take turns; then their median is taken. "
    "Error bars reach from the least to the greatest repeat.",
    "The best static arm is the fastest fixed tree of each batch size: a choice in hindsight, "
    "which no server could have made before.",
    "Batch size `all` is the geometric mean over batch sizes.",
    "**Accept length is shown, but a longer one is no success in itself**: longer trees cost more "
    "to draft and to verify, and what counts is tokens per second.",
)
COLD = (
    "Cold is the first run of servers that were started for it and know nothing but a cost "
    "profile: for the arm that gains most tokens a step about its first 100 steps, for every other "
    "arm the same text. Each cold repeat is another start of all arms. Every other table of this "
    "page is of servers that were warm."
)
TREES = (
    "These are means over all steps of all repeats: one number for an arm and batch size, so they "
    "have no spread. Only CAST counts its layers, its plain steps and the time of its steps."
)


class Inputs(NamedTuple):
    """What the page is made of."""

    runs: list[Run]
    profiles: list[tuple[str, CostProfile]]  # with the names of their files
    reliability: Path | None
    styles: dict[str, figures.Style]
    copies: dict[Path, Path]  # of the files of numbers, relative to the page


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or the tables of the documents, or both; return the exit code."""
    args = parse_args(argv)
    try:
        found = load_all(args.results)
        if args.update_docs:
            update_docs(args.update_docs, list(found))
            print(args.update_docs)
        if args.out:
            runs = [run for mine in found.values() for run in mine]
            print(write_report(runs, args.profile, args.reliability, args.out))
    except (ReportError, ProfileError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="+", help="results.json of bench_serving")
    parser.add_argument(
        "--profile", type=Path, nargs="+", default=[], help="cost profiles, to draw their tables"
    )
    parser.add_argument("--reliability", type=Path, help="reliability.json of bench_calibration")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"gets the page (default: {OUT.name}/report, unless documents are rewritten)",
    )
    parser.add_argument(
        "--update-docs",
        type=Path,
        metavar="DIR",
        help="rewrite the tables between the markers of DIR/README.md and DIR/docs/results.md from "
        "the latest run of each file",
    )
    args = parser.parse_args(argv)
    if not (args.out or args.update_docs):
        args.out = OUT / "report"
    return args


def load_all(paths: Sequence[Path]) -> dict[Path, list[Run]]:
    """Return the runs of each file; name on stderr the files of another kind, which are left out.

    Raises:
        ReportError: a file cannot be read, or all are of another kind.
    """
    found = {}
    for path in dict.fromkeys(paths):
        try:
            found[path] = load_runs(path)
        except OtherKindError as error:
            print(f"report: left out {error}", file=sys.stderr)
    if not found:
        raise ReportError("no file holds results of bench_serving, so there is nothing to report")
    return found


def write_report(
    runs: list[Run], profiles: Sequence[Path], reliability: Path | None, out: Path
) -> Path:
    """Write the page with what belongs to it and return where it is."""
    sources = [*(run.source for run in runs), *([reliability] if reliability else [])]
    inputs = Inputs(
        runs,
        [(path.name, load_profile(path)) for path in profiles],
        reliability,
        figures.styles_of(arms_of(runs)),
        copy_numbers(sources, out),
    )
    blocks = compose(inputs)
    (out / PICTURES).mkdir(exist_ok=True)
    for picture in pictures_in(blocks):
        (out / PICTURES / f"{picture.name}.svg").write_bytes(picture.svg)
    (out / "report.md").write_text(as_markdown(TITLE, blocks, PICTURES))
    page = out / "report.html"
    page.write_text(as_html(TITLE, blocks))
    return page


def copy_numbers(sources: Sequence[Path], directory: Path) -> dict[Path, Path]:
    """Copy files of numbers, and the CSV files beside them; return where each went."""
    (directory / NUMBERS).mkdir(parents=True, exist_ok=True)
    copies: dict[Path, Path] = {}
    for source in dict.fromkeys(sources):
        # Most are called results.json.
        named = f"{source.resolve().parent.name}-{source.name}"
        taken = {copy.name for copy in copies.values()}
        name = named if source.stem == "results" or source.name in taken else source.name
        if name in taken:
            raise ReportError(f"{source}: another file of its name and folder is given too")
        copies[source] = Path(NUMBERS) / name
        shutil.copyfile(source, directory / copies[source])
        table = source.with_suffix(".csv")
        if table.exists():
            shutil.copyfile(table, directory / copies[source].with_suffix(".csv"))
            copies[table] = copies[source].with_suffix(".csv")
    return copies


def compose(inputs: Inputs) -> list[Block]:
    """Return the page's content."""
    blocks: list[Block] = [Bullets(READING)]
    is_only = len(inputs.runs) == 1
    for number, run in enumerate(inputs.runs, start=1):
        if not is_only:
            origin = run.provenance
            when = origin["date"][:16].replace("T", " ")
            blocks.append(Heading(f"Run {number}: {run.source.stem}, {when}"))
        blocks += run_chapter(inputs, run, f"run-{number}", 2 if is_only else 3)
    return [*blocks, *profile_chapter(inputs), *reliability_chapter(inputs)]


def run_chapter(inputs: Inputs, run: Run, name: str, level: int) -> list[Block]:
    """Return what there is to say about one run."""
    blocks: list[Block] = [Heading("Results", level)]
    if not run.is_complete:
        blocks.append(Paragraph("This run was cut short; cells or arms are missing.", True))
    if note := run.provenance.get("note"):
        blocks.append(Paragraph(note))
    if texts := tables.in_short(run):
        blocks.append(Bullets(texts))
    blocks += speed_pictures(inputs, run, name)
    blocks.append(Heading("Speeds", level))
    blocks += tables.headline(run)
    blocks.append(Heading("Cold servers", level))
    blocks += (
        [Paragraph(COLD), *tables.cold(run)]
        if run.cold
        else [_missing("cold cells", "python -m benchmarks.bench_serving --cold 3 --out DIR")]
    )
    blocks.append(Heading("Latency", level))
    blocks += tables.latency(run) or [
        _missing(
            "latencies",
            "python -m benchmarks.bench_serving --out DIR",
        )
    ]
    blocks += tree_section(inputs, run, name, level)
    blocks += ablation_section(run, name, level)
    blocks += [Heading("How it was measured", level), tables.how_measured(run)]
    links = [f"[{path.suffix[1:].upper()}]({inputs.copies[path]})" for path in _files(inputs, run)]
    blocks.append(Paragraph(f"All runs of this file, with every repeat: {', '.join(links)}."))
    blocks.append(Details("Every number of this run", [tables.raw_numbers([*run.rows, *run.cold])]))
    return blocks


def speed_pictures(inputs: Inputs, run: Run, name: str) -> list[Block]:
    """Return the speed-ups against the batch size."""
    blocks: list[Block] = []
    for number, (task, temperature, rows) in enumerate(workloads(run.rows), start=1):
        if svg := figures.draw_speedups(rows, inputs.styles):
            caption = f"Speed-up against batch size: {tables.workload_title(task, temperature)}"
            blocks.append(Picture(f"{name}-speed-{number}", svg, caption))
    return blocks


def tree_section(inputs: Inputs, run: Run, name: str, level: int) -> list[Block]:
    """Return what CAST's trees looked like."""
    blocks: list[Block] = [Heading("Trees", level)]
    for number, (task, temperature, rows) in enumerate(workloads(run.rows), start=1):
        if all(row["mean_layers"] is None for row in rows):
            continue
        title = tables.workload_title(task, temperature)
        if svg := figures.draw_trees(rows, inputs.styles):
            caption = f"Trees and steps against batch size: {title}"
            blocks.append(Picture(f"{name}-trees-{number}", svg, caption))
        else:
            blocks.append(Paragraph(f"**{title}**"))
        blocks.append(tables.trees(rows))
    if len(blocks) == 1:
        command = "python -m benchmarks.bench_serving --out DIR"
        return [*blocks, _missing("counters of CAST's trees", command)]
    return [blocks[0], Paragraph(TREES), *blocks[1:]]


def ablation_section(run: Run, name: str, level: int) -> list[Block]:
    """Return what single settings bring: rules switched off, thresholds swept, and the like."""
    blocks: list[Block] = [Heading("Ablation and sensitivity", level)]
    for number, (task, temperature, rows) in enumerate(workloads(run.rows), start=1):
        found = ablation.switched(rows)
        if not found:
            continue
        title = tables.workload_title(task, temperature)
        lines = len({one.arm for one in found}) + len({one.base for one in found})
        svg = figures.draw(
            10.0, 1.2 + 0.6 * lines, functools.partial(ablation.draw_switched, found=found)
        )
        caption = f"Speed relative to the arm without the setting: {title}"
        blocks.append(Picture(f"{name}-settings-{number}", svg, caption))
        if swept := ablation.sweeps(found):
            svg = figures.draw(13.0, 4.2, functools.partial(ablation.draw_sweeps, swept=swept))
            blocks.append(
                Picture(f"{name}-sweeps-{number}", svg, f"Sensitivity to thresholds: {title}")
            )
        blocks.append(ablation.table(found))
    if len(blocks) == 1:
        command = "python -m benchmarks.bench_ablation --out DIR"
        blocks.append(_missing("arms that differ by settings only", command))
    return blocks


def profile_chapter(inputs: Inputs) -> list[Block]:
    """Return the cost tables as pictures."""
    blocks: list[Block] = [Heading("Cost tables")]
    for number, (file, profile) in enumerate(inputs.profiles, start=1):
        caption = f"Cost tables of {file}"
        blocks.append(Picture(f"profile-{number}", figures.draw_profile(profile), caption))
    if not inputs.profiles:
        command = "cast-sglang profile --model-path TARGET --speculative-draft-model-path DRAFT"
        blocks.append(_missing("cost profile", f"{command} --output PROFILE", "--profile PROFILE"))
    return blocks


def reliability_chapter(inputs: Inputs) -> list[Block]:
    """Return how far draft probabilities can be trusted."""
    heading = Heading("Reliability of the draft's probabilities")
    if inputs.reliability is None:
        command = "python -m benchmarks.studies.bench_calibration --out DIR"
        option = "--reliability DIR/reliability.json"
        return [heading, _missing("reliability curves", command, option)]
    content = read_json(inputs.reliability, "points")
    errors = ", ".join(f"{name} {error:.3f}" for name, error in content["errors"].items())
    caption = "Share of drafts that the target accepted, against its prediction"
    return [
        heading,
        Picture("reliability", figures.draw_reliability(content["points"]), caption),
        Paragraph(
            "Distance to the diagonal in the mean over nodes, on prompts that were not learned "
            f"from: {errors}."
        ),
        Details("How it was measured", [_origin(inputs.reliability, content["provenance"])]),
    ]


def _origin(path: Path, provenance: dict[str, object]) -> Block:
    return tables.how_measured(Run(path, provenance, [], is_complete=True))


def _files(inputs: Inputs, run: Run) -> list[Path]:
    return [path for path in (run.source, run.source.with_suffix(".csv")) if path in inputs.copies]


def _missing(what: str, command: str, option: str = "") -> Paragraph:
    then = f"and give it with `{option}`" if option else "and give its `results.json`"
    return Paragraph(f"There are no {what} here. To have them, run `{command}` {then}.", True)


if __name__ == "__main__":
    sys.exit(main())
