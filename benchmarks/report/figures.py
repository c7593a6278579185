"""Pictures of the report, as SVG: one style for each arm in all of them."""

import io
import itertools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from benchmarks.harness.arms import kind_of
from benchmarks.report.data import Row, is_plain, label_of, ratio_of
from benchmarks.studies import bench_calibration
from cast_sglang.costs.schema import CostProfile
from cast_sglang.report.profile_plot import plot_profiles

# Of Okabe and Ito, and of Tol where these run out; colour-blind readers can tell them apart.
COLORS = {
    "plain": ("0.35",),
    "adaptive": ("#e69f00",),
    # The first is SGLang's default or the one that was named; the rest of a grid is thinner.
    "static": ("#0072b2", "#56b4e9", "#332288", "#999933"),
    "cast": ("#d55e00", "#009e73", "#cc79a7", "#882255"),
}
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#882255")
MARKERS = {
    "plain": "x",
    "adaptive": "v",
    "static": "s^<>PX",
    "cast": "oDph*d",
}
# Width of lines and size of markers, so that what the page is about is seen first.
WEIGHTS = {"plain": (0.9, 6.0), "adaptive": (1.2, 6.0), "static": (1.2, 6.0), "cast": (1.9, 7.5)}
THIN = (0.8, 5.0)
# Octaves of batch size between arms side by side, and the share of the least gap they may take.
DODGE, MOST_DODGED = 0.06, 0.5


class Panel(NamedTuple):
    """What one panel shows of the rows."""

    field: str
    title: str
    unit: str
    factor: float = 1.0


SPEED_PANELS = (
    Panel("vs_plain", "Speed relative to plain decoding", "ratio of tokens/s"),
    Panel(
        "vs_best_static",
        "Speed relative to the best static tree of each batch size, known only in hindsight",
        "ratio of tokens/s",
    ),
)
TREE_PANELS = (
    Panel("mean_layers", "Layers drafted", "layers per step"),
    Panel("mean_verify_rows", "Rows verified", "rows per request and step"),
    Panel("accept_length", "Accept length", "tokens per request and step"),
    Panel("predicted_to_measured", "Step time, predicted / measured", "ratio"),
    Panel("policy_share", "Time of the policy", "% of a step", 100.0),
    Panel("plain_share", "Plain steps", "% of steps", 100.0),
)
COLUMNS = 3  # of tree panels
LEGEND_COLUMNS = 6


class Style(NamedTuple):
    """How an arm is drawn."""

    color: str
    marker: str
    line: str
    width: float
    size: float


def styles_of(arms: Sequence[str]) -> dict[str, Style]:
    """Give each arm a colour and a marker, by its kind and its place among the arms of it."""
    styles = {}
    counts: dict[str, int] = {}
    for arm in arms:
        kind = kind_of(arm) if kind_of(arm) in COLORS else "cast"
        number = counts.setdefault(kind, 0)
        counts[kind] += 1
        colors, markers = COLORS[kind], MARKERS[kind]
        # A marker per arm, so that arms which share a colour differ by it.
        marker = markers[number % len(markers)]
        line = "-" if number < len(colors) else "--"
        is_thin = kind == "static" and number > 0
        rest = colors[1:] or colors
        color = rest[(number - 1) % len(rest)] if is_thin else colors[number % len(colors)]
        styles[arm] = Style(color, marker, line, *(THIN if is_thin else WEIGHTS[kind]))
    return styles


def draw_speedups(rows: Sequence[Row], styles: Mapping[str, Style]) -> bytes | None:
    """Draw the speed-ups of one task and temperature against the batch size.

    Returns:
        None where there is nothing to draw: no ratio, or one batch size only.
    """
    panels = [p for p in SPEED_PANELS if _arms_of(rows, p)]
    batches = _batches(rows)
    if not panels or len(batches) < 2:
        return None
    with _settings():
        figure = _empty(13.0, 0.6 + 4.2 * len(panels))
        places = figure.subplots(len(panels), squeeze=False).flat
        for axes, panel in zip(places, panels, strict=True):
            for arm, shift in _dodged(_arms_of(rows, panel), batches):
                _draw_ratios(axes, rows, arm, panel.field, shift, styles[arm])
            axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
            _label(axes, panel, batches)
        _add_legend(figure, rows)
        return _as_svg(figure)


def draw_trees(rows: Sequence[Row], styles: Mapping[str, Style]) -> bytes | None:
    """Draw what the trees of one task and temperature looked like.

    Returns:
        None where there is nothing to draw: no counter, or one batch size only.
    """
    drafting = [row for row in rows if not is_plain(row)]
    panels = [p for p in TREE_PANELS if _arms_of(drafting, p)]
    batches = _batches(rows)
    if not panels or len(batches) < 2:
        return None
    with _settings():
        lines = -(-len(panels) // COLUMNS)
        figure = _empty(13.0, 0.6 + 3.0 * lines)
        places = figure.subplots(lines, COLUMNS, squeeze=False).flat
        for axes, panel in zip(places, panels, strict=False):
            for arm in _arms_of(drafting, panel):
                _draw_means(axes, drafting, arm, panel, styles[arm])
            _scale(axes, panel)
            _label(axes, panel, batches)
        for axes in list(figure.axes)[len(panels) :]:
            axes.remove()
        _add_legend(figure, rows)
        return _as_svg(figure)


def draw(width: float, height: float, draw_on: Callable[[Figure], None]) -> bytes:
    """Return what a function draws on a figure of this size in inches."""
    with _settings():
        figure = _empty(width, height)
        draw_on(figure)
        return _as_svg(figure)


def draw_profile(profile: CostProfile) -> bytes:
    """Draw the cost tables of a profile."""
    return _drawn_by(lambda path: plot_profiles([profile], path))


def draw_reliability(points: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the reliability curves of `bench_calibration`."""
    known = [bench_calibration.Point(**point) for point in points]
    return _drawn_by(lambda path: bench_calibration.draw(known, str(path)))


def _settings() -> Any:
    # The salt makes equal pictures equal files.
    return matplotlib.rc_context(
        {
            "svg.hashsalt": "report",
            "axes.prop_cycle": cycler(color=CYCLE),
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def _empty(width: float, height: float) -> Figure:
    # Not pyplot: it would ask for a display and keep global state.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _as_svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _drawn_by(draw: Callable[[Path], None]) -> bytes:
    """Return what a function draws into a file."""
    with _settings(), tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "figure.svg"
        draw(path)
        return path.read_bytes()


def _batches(rows: Sequence[Row]) -> list[int]:
    return sorted({row["batch"] for row in rows})


def _arms_of(rows: Sequence[Row], panel: Panel) -> list[str]:
    """Return the arms that a panel shows, in order."""
    known = [row for row in rows if row[panel.field] is not None]
    if panel.field == "vs_plain":
        # Relative to itself, plain decoding is the line at 1.
        known = [row for row in known if not is_plain(row)]
    return list(dict.fromkeys(row["arm"] for row in known))


def _dodged(arms: Sequence[str], batches: Sequence[int]) -> list[tuple[str, float]]:
    """Return by how many octaves each arm stands beside its batch size, so that bars are apart."""
    gap = min(math.log2(high / low) for low, high in itertools.pairwise(batches))
    each = min(DODGE, MOST_DODGED * gap / len(arms))
    return [(arm, each * (i - (len(arms) - 1) / 2)) for i, arm in enumerate(arms)]


def _draw_ratios(
    axes: Axes, rows: Sequence[Row], arm: str, name: str, shift: float, style: Style
) -> None:
    found = {row["batch"]: ratio_of(row, name) for row in rows if row["arm"] == arm}
    known = {batch: ratio for batch, ratio in sorted(found.items()) if ratio is not None}
    middle = [ratio.median for ratio in known.values()]
    below = [0.0 if r.low is None else r.median - r.low for r in known.values()]
    above = [0.0 if r.high is None else r.high - r.median for r in known.values()]
    axes.errorbar(
        [batch * 2.0**shift for batch in known],
        middle,
        [below, above],
        color=style.color,
        marker=style.marker,
        markersize=style.size,
        linestyle=style.line,
        linewidth=style.width,
        elinewidth=1.2,
        capsize=style.size / 2,
        zorder=2 + style.width,
        label=label_of(arm),
    )


def _draw_means(axes: Axes, rows: Sequence[Row], arm: str, panel: Panel, style: Style) -> None:
    mine = [row for row in rows if row["arm"] == arm and row[panel.field] is not None]
    # Rows come in the order in which cells were measured.
    mine.sort(key=lambda row: row["batch"])
    axes.plot(
        [row["batch"] for row in mine],
        [panel.factor * row[panel.field] for row in mine],
        color=style.color,
        marker=style.marker,
        markersize=style.size,
        linestyle=style.line,
        linewidth=style.width,
        clip_on=False,  # markers at 0 stay whole
        label=label_of(arm),
    )


def _scale(axes: Axes, panel: Panel) -> None:
    if panel.unit == "ratio":
        # From 0 on, all lines would be one.
        axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
        axes.margins(y=0.15)
        return
    # A share of steps is one of all of them; elsewhere the highest marker stays whole.
    highest = 100.0 if panel.field == "plain_share" else max(axes.dataLim.ymax, 1.0)
    axes.set_ylim(0.0, 1.08 * highest)


def _label(axes: Axes, panel: Panel, batches: Sequence[int]) -> None:
    axes.set_title(panel.title, loc="left")
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("batch size, requests")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(batches[0] / 2.0**0.4, batches[-1] * 2.0**0.4)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", alpha=0.25)


def _add_legend(figure: Figure, rows: Sequence[Row]) -> None:
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    labels = list(dict.fromkeys(label_of(row["arm"]) for row in rows))
    names = [label for label in labels if label in entries]
    lines = math.ceil(len(names) / LEGEND_COLUMNS)
    figure.legend(
        [entries[name] for name in names],
        names,
        loc="outside lower center",
        ncols=math.ceil(len(names) / lines),
        frameon=False,
    )
