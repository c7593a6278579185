"""Show cost profiles to people: tables for the terminal and a figure of the cost curves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cast_sglang.errors import HostError, ProfileError
from cast_sglang.profile_schema import CostProfile, CostTable

__all__ = ["plot_profiles", "print_comparison", "print_profile"]

# Seven columns of milliseconds fit a terminal of 80.
MAX_COLUMNS = 7
TABLE_TITLES = {
    "target": ("target: one verify pass", "rows"),
    "draft": ("draft: one layer", "nodes"),
    "draft_extend": ("draft: extend pass", "rows"),
    "plain": ("target: plain decoding step", "rows"),
}


def print_profile(profile: CostProfile, console: Console) -> None:
    """Print where the profile was measured and its tables in milliseconds."""
    _print_provenance(profile, console)
    for name, (title, unit) in TABLE_TITLES.items():
        table = getattr(profile, name)
        if table is not None:
            heading = f"{title}, ms by {unit} per request"
            milliseconds = np.asarray(table.time_us) / 1e3
            _print_grid(console, heading, table, milliseconds, "{:.3g}")
    if profile.step_overhead_us is not None:
        pairs = zip(profile.target.batch_sizes, profile.step_overhead_us, strict=True)
        console.print(
            "Step overhead, us by batch size: " + ", ".join(f"{b}: {us:.0f}" for b, us in pairs)
        )


def print_comparison(first: CostProfile, second: CostProfile, console: Console) -> None:
    """Print how the second profile's times relate to the first's, over the first's grid."""
    console.print("[bold]first[/bold]")
    _print_provenance(first, console)
    console.print("[bold]second[/bold]")
    _print_provenance(second, console)
    for name, (title, unit) in TABLE_TITLES.items():
        table = getattr(first, name)
        if table is not None and getattr(second, name) is not None:
            ratios = _ratios(name, table, second)
            heading = f"{title}, second / first by {unit} per request"
            _print_grid(console, heading, table, ratios, "{:.2f}")


def plot_profiles(profiles: list[CostProfile], path: Path) -> None:
    """Draw time against tokens per request, and the marginal cost of a token, into a file.

    One line per batch size, at the middle context of the grid; a second profile is dashed.

    Raises:
        ProfileError: the file name does not end in .png or .svg, or cannot be written.
        HostError: matplotlib is not installed.
    """
    if path.suffix not in (".png", ".svg"):
        raise ProfileError(f"plot {path}: the file name must end in .png or .svg")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HostError("--plot needs matplotlib: pip install matplotlib") from error

    # Not pyplot: it would ask for a display and keep global state.
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    target, draft, marginal = figure.subplots(1, 3)
    tables = [table for profile in profiles for table in (profile.target, profile.draft)]
    batch_sizes = sorted({size for table in tables for size in table.batch_sizes})
    colors = {size: f"C{i % 10}" for i, size in enumerate(batch_sizes)}
    for profile, style in zip(profiles, ("-", "--"), strict=False):
        _plot_times(target, profile.target, colors, style)
        _plot_times(draft, profile.draft, colors, style)
        _plot_marginal(marginal, profile.target, colors, style)
    contexts = {table.contexts[len(table.contexts) // 2] for table in (p.target for p in profiles)}
    where = ", ".join(str(context) for context in sorted(contexts))
    target.set_title(f"target: one verify pass, context {where}")
    target.set_xlabel("rows per request")
    draft.set_title("draft: one layer")
    draft.set_xlabel("nodes per request")
    marginal.set_title("target: marginal cost of a row")
    marginal.set_xlabel("rows per request")
    target.set_ylabel("ms")
    draft.set_ylabel("ms")
    marginal.set_ylabel("us per row and request")
    for axes in (target, draft):
        axes.set_ylim(bottom=0)
    target.legend(title="batch size", fontsize="small")
    names = [f"{p.provenance.device_name}, {p.provenance.target.name}" for p in profiles]
    figure.suptitle(" against (dashed) ".join(names))
    try:
        figure.savefig(path)
    except OSError as error:
        raise ProfileError(f"plot {path}: cannot be written: {error.strerror}") from error


def _print_provenance(profile: CostProfile, console: Console) -> None:
    source = profile.provenance
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    memory = f"{source.device_memory_bytes / 2**30:.0f} GiB"
    facts.add_row("device", f"{source.device_name} ({memory}), {source.driver}, {source.runtime}")
    facts.add_row("pair", f"{source.target.name} + {source.draft.name}")
    quantization = f", {source.quantization}" if source.quantization else ""
    graph = "graphs" if source.cuda_graph else "no graphs"
    facts.add_row(
        "settings",
        f"{source.dtype}{quantization}, tp {source.tp_size}, {source.attention_backend}, {graph}, "
        f"page size {source.page_size}",
    )
    facts.add_row("versions", ", ".join(f"{k} {v}" for k, v in sorted(source.versions.items())))
    kind = "estimated, not measured" if source.estimated else f"measured in {source.seconds:.0f} s"
    facts.add_row("date", f"{source.date}, {kind}")
    if heldout := source.heldout:
        facts.add_row(
            "error",
            f"median {heldout.median_error:.1%}, p95 {heldout.p95_error:.1%} "
            f"at {heldout.points} held-out points",
        )
    console.print(facts)


def _print_grid(
    console: Console, title: str, table: CostTable, values: np.ndarray, form: str
) -> None:
    """Print [B, C, N] values: one line per batch size and context, a few token counts across."""
    last = len(table.token_counts) - 1
    shown = sorted({round(i * last / (MAX_COLUMNS - 1)) for i in range(MAX_COLUMNS)})
    grid = Table(box=SIMPLE_HEAD)
    for heading in ("batch", "context", *(str(table.token_counts[i]) for i in shown)):
        grid.add_column(heading, justify="right", no_wrap=True)
    for b, batch_size in enumerate(table.batch_sizes):
        for c, context in enumerate(table.contexts):
            cells = [form.format(values[b, c, i]) for i in shown]
            grid.add_row(str(batch_size) if c == 0 else "", str(context), *cells)
    console.print(f"[bold]{title}[/bold]")
    console.print(grid)


def _ratios(name: str, table: CostTable, second: CostProfile) -> np.ndarray:
    """Return the second profile's times over those of `table`, at the grid of `table`."""
    from cast_sglang.cost import CostModel

    num_tokens = table.token_counts[-1]
    model = CostModel(
        second,
        max_batch_size=table.batch_sizes[-1],
        max_context=table.contexts[-1],
        max_verify_tokens=1 if name == "draft" else num_tokens,
        max_width=num_tokens if name == "draft" else 1,
    )
    times_us = np.asarray(table.time_us)
    ratios = np.empty_like(times_us)
    for b, batch_size in enumerate(table.batch_sizes):
        for c, context in enumerate(table.contexts):
            costs = model.step_costs(batch_size, context)
            field = "verify" if name == "target" else name
            relative = np.atleast_1d(np.asarray(getattr(costs, field)))
            indexes = np.asarray(table.token_counts) - 1
            ratios[b, c] = relative[indexes] * costs.unit_us / times_us[b, c]
    return ratios


def _plot_times(axes: Any, table: CostTable, colors: dict[int, str], style: str) -> None:
    for batch_size, times_us in _curves(table):
        axes.plot(
            table.token_counts,
            times_us / 1e3,
            style,
            color=colors[batch_size],
            marker=".",
            label=str(batch_size) if style == "-" else None,
        )


def _plot_marginal(axes: Any, table: CostTable, colors: dict[int, str], style: str) -> None:
    if len(table.token_counts) < 2:
        return
    for batch_size, times_us in _curves(table):
        each_us = np.diff(times_us) / np.diff(table.token_counts) / batch_size
        color = colors[batch_size]
        axes.stairs(each_us, table.token_counts, color=color, linestyle=style, baseline=None)


def _curves(table: CostTable) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each batch size with its times at the middle context."""
    middle = len(table.contexts) // 2
    for batch_size, plane in zip(table.batch_sizes, table.time_us, strict=True):
        yield batch_size, np.asarray(plane[middle])
