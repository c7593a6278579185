"""Print cost profiles: where they were measured, the times of passes, and a comparison of two."""

import dataclasses

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel
from cast_sglang.costs.passes import Pass
from cast_sglang.costs.profiles import describe_error
from cast_sglang.costs.schema import CostProfile, CostTable

__all__ = ["print_comparison", "print_profile"]

SUMMARY_ROWS = (8, 16, 32)
# Seven columns of milliseconds fit a terminal of 80.
MAX_COLUMNS = 7
INTERPOLATED, EXTRAPOLATED = "~", "*"
LEGEND = (
    f"{INTERPOLATED} between measured token counts, {EXTRAPOLATED} extrapolated from other shapes"
)


def print_profile(profile: CostProfile, console: Console) -> None:
    """Print where the profile was measured, a summary, and its tables in milliseconds."""
    _print_provenance(profile, console)
    _print_summary(profile, console)
    for each in profile.passes:
        table = profile.table_of(each)
        cells = np.vectorize(_milliseconds)(np.asarray(table.time_us) / 1e3)
        heading = f"{each.title}, ms by {each.unit} per request"
        _print_grid(console, heading, table, np.char.add(cells, _marks(profile, table)))
    console.print(Text(LEGEND))
    if profile.step_overhead_us is not None:
        pairs = zip(profile.target.batch_sizes, profile.step_overhead_us, strict=True)
        console.print(
            "Step overhead, us by batch size: " + ", ".join(f"{b}: {us:.0f}" for b, us in pairs)
        )


def print_comparison(first: CostProfile, second: CostProfile, console: Console) -> None:
    """Print the ratio of the second profile's times to the first's, on the first's grid."""
    console.print("[bold]first[/bold]")
    _print_provenance(first, console)
    console.print("[bold]second[/bold]")
    _print_provenance(second, console)
    limits = Limits.of_tables(first)
    if second.draft is None:
        limits = dataclasses.replace(limits, max_width=0, max_extend_rows=0)
    model = CostModel(second, limits)
    for each in first.passes:
        if each not in second.passes:
            console.print(f"{each.title}: not in the second")
            continue
        table = first.table_of(each)
        cells = np.vectorize("{:.2f}".format)(_ratios(each, table, model))
        heading = f"{each.title}, second / first by {each.unit} per request"
        _print_grid(console, heading, table, np.char.add(cells, _marks(first, table)))
    console.print(Text(f"{LEGEND}, in the first"))
    if model.extrapolated:
        axes = ", ".join(sorted(model.extrapolated))
        console.print(f"of the second: extrapolated beyond the end of its grid in {axes}")


def _print_provenance(profile: CostProfile, console: Console) -> None:
    source = profile.provenance
    if source.estimated:
        console.print(Text("ESTIMATED: these tables were computed, not measured", "bold red"))
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    memory = f"{source.device_memory_bytes / 2**30:.0f} GiB"
    quantization = f", {source.quantization}" if source.quantization else ""
    graph = "graphs" if source.cuda_graph else "no graphs"
    kind = "estimated, not measured" if source.estimated else f"measured in {source.seconds:.0f} s"
    rows = {
        "device": f"{source.device_name} ({memory}), {source.driver}, {source.runtime}",
        "pair": f"{source.target.name} + {source.draft.name}",
        "settings": f"{source.dtype}{quantization}, tp {source.tp_size}, "
        f"{source.attention_backend}, {graph}, page size {source.page_size}",
        "versions": ", ".join(f"{name} {of}" for name, of in sorted(source.versions.items())),
        "date": f"{source.date}, {kind}",
        "error": describe_error(profile),
    }
    if source.estimated and source.sampling:
        rows["assumed"] = ", ".join(f"{name} {value}" for name, value in source.sampling.items())
    for name, fact in rows.items():
        # A plain string would not do: rich would read brackets in it as markup.
        facts.add_row(name, Text(fact))
    console.print(facts)


def _print_summary(profile: CostProfile, console: Console) -> None:
    """Print, by batch size, the time of a 1-row target pass and the others relative to it."""
    target, draft = profile.target, profile.draft
    model = CostModel(profile, Limits.of_tables(profile))
    contexts = profile.quotable_contexts
    context = contexts[len(contexts) // 2]
    rows = [count for count in SUMMARY_ROWS if count <= target.token_counts[-1]]
    widths = [] if draft is None else sorted({1, draft.token_counts[-1]})
    headings = ["batch", "1 row, ms", *(f"{count} rows" for count in rows)]
    headings += [f"layer of {width}" for width in widths]
    summary = Table(box=SIMPLE_HEAD)
    for heading in headings:
        summary.add_column(heading, justify="right", no_wrap=True)
    for batch_size in target.batch_sizes:
        costs = model.step_costs(batch_size, context)
        cells = [f"{costs.verify[count - 1]:.2f}x" for count in rows]
        cells += [f"{costs.draft[width - 1]:.2f}x" for width in widths]
        summary.add_row(str(batch_size), f"{costs.unit_us / 1e3:.3g}", *cells)
    console.print(
        f"[bold]summary at context {context}: a target pass over 1 row per request, "
        "and others relative to it[/bold]"
    )
    console.print(summary)


def _milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000.0 else f"{value:.0f}"


def _marks(profile: CostProfile, table: CostTable) -> np.ndarray:
    """Return [B, C, N] marks of entries that were not measured, and blanks; none in an estimate."""
    is_measured = np.asarray(table.samples) > 0
    if profile.provenance.estimated:
        return np.full(is_measured.shape, " ")
    marks = np.where(np.asarray(table.is_extrapolated)[..., None], EXTRAPOLATED, INTERPOLATED)
    return np.where(is_measured, " ", marks)


def _print_grid(console: Console, title: str, table: CostTable, cells: np.ndarray) -> None:
    """Print [B, C, N] texts: one line per batch size and context, a few token counts across."""
    last = len(table.token_counts) - 1
    shown = sorted({round(i * last / (MAX_COLUMNS - 1)) for i in range(MAX_COLUMNS)})
    grid = Table(box=SIMPLE_HEAD)
    for heading in ("batch", "context", *(str(table.token_counts[i]) for i in shown)):
        grid.add_column(heading, justify="right", no_wrap=True)
    for b, batch_size in enumerate(table.batch_sizes):
        for c, context in enumerate(table.contexts):
            grid.add_row(str(batch_size) if c == 0 else "", str(context), *cells[b, c, shown])
    console.print(f"[bold]{title}[/bold]")
    console.print(grid)


def _ratios(of: Pass, table: CostTable, second: CostModel) -> np.ndarray:
    """Return [B, C, N], the second profile's times divided by those of `table`, on its grid."""
    times_us = np.asarray(table.time_us)
    ratios = np.empty_like(times_us)
    for b, batch_size in enumerate(table.batch_sizes):
        for c, context in enumerate(table.contexts):
            costs = second.step_costs(batch_size, context)
            relative = getattr(costs, of.name)[np.asarray(table.token_counts) - 1]
            ratios[b, c] = relative * costs.unit_us / times_us[b, c]
    return ratios
