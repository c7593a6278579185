"""Pictures of the report, as SVG: one style for each arm in all of them."""

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.harness.arms import kind_of
from benchmarks.report.data import Row, is_plain, label_of, ratio_of
from benchmarks.studies import bench_calibration
from cast_sglang.costs.schema import CostProfile
from cast_sglang.report.profile_plot import plot_profiles

# Of Okabe and Ito, and of Tol where these run out; colour-blind readers can tell them apart.
COLORS = {
    "plain": ("0.35",),
    "adaptive": ("#e69f00",),
    # The first is SGLang's default or the one that was named; the rest of a grid stays pale.
    "static": ("#0072b2", "#9db7cf", "#b3b3c6", "#9fc5c1"),
    "cast": ("#d55e00", "#009e73", "#cc79a7", "#882255"),
}
CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#882255")
MARKERS = {
    "plain": "x",
    "adaptive": "v",
    "static": "s^<>PX",
    "cast": "oDph*8",
}
# Width of lines and size of markers, so that what the page is about is seen first.
WEIGHTS = {"plain": (0.9, 6.0), "adaptive": (1.2, 6.0), "static": (1.2, 6.0), "cast": (1.9, 7.5)}
PALE = (0.7, 4.0)
# Of the space of a batch size, what its arms take side by side.
DODGE = 0.6
SPEED_PANELS = (
    ("vs_plain", "plain decoding"),
    ("vs_best_static", "the best static tree of each batch size, known only in hindsight"),
)
TREE_PANELS = (
    ("mean_layers", "layers drafted", 1.0),
    ("mean_verify_rows", "rows verified per request", 1.0),
    ("accept_length", "accept length", 1.0),
    ("predicted_to_measured", "predicted / measured step time", 1.0),
    ("policy_share", "policy, % of a step", 100.0),
    ("plain_share", "plain steps, %", 100.0),
)


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
        is_pale = kind == "static" and number > 0
        pale = colors[1:] or colors
        color = pale[(number - 1) % len(pale)] if is_pale else colors[number % len(colors)]
        styles[arm] = Style(color, marker, line, *(PALE if is_pale else WEIGHTS[kind]))
    return styles


def draw_speedups(
    rows: Sequence[Row], styles: Mapping[str, Style], bounds: Mapping[tuple[str, int], float]
) -> bytes:
    """Draw the speed-ups of one task and temperature against the batch size.

    Args:
        bounds: the bound by the table against plain decoding, by arm and batch size; those of CAST
            are drawn.
    """
    with _settings():
        figure = _empty(13.0, 9.0)
        places = _places(rows)
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        for axes, (name, title) in zip(figure.subplots(2, 1), SPEED_PANELS, strict=True):
            for arm, shift in _dodged(arms):
                _draw_ratios(axes, rows, arm, name, places, shift, styles[arm])
                if name == "vs_plain" and kind_of(arm) == "cast":
                    ends = {places[b] + shift: bounds.get((arm, b)) for b in places}
                    _draw_bounds(axes, ends, styles[arm])
            axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
            axes.set_title(f"Speed relative to {title}", loc="left")
            axes.set_ylabel("tokens/s over tokens/s")
            _label_batches(axes, places)
            if not any(row[name] is not None for row in rows):
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        _add_legend(figure, bool(bounds))
        return _as_svg(figure)


def draw_trees(rows: Sequence[Row], styles: Mapping[str, Style]) -> bytes:
    """Draw what the trees of one task and temperature looked like."""
    with _settings():
        figure = _empty(13.0, 6.6)
        places = _places(rows)
        drafting = [row for row in rows if not is_plain(row)]
        arms = list(dict.fromkeys(row["arm"] for row in drafting))
        for axes, (name, title, factor) in zip(
            figure.subplots(2, 3).flat, TREE_PANELS, strict=True
        ):
            for arm in arms:
                known = {
                    places[row["batch"]]: factor * row[name]
                    for row in drafting
                    if row["arm"] == arm and row[name] is not None
                }
                if known:
                    style = styles[arm]
                    look: dict[str, Any] = {"color": style.color, "linestyle": style.line}
                    look |= {"marker": style.marker, "linewidth": style.width}
                    axes.plot(list(known), list(known.values()), label=label_of(arm), **look)
            if name == "predicted_to_measured":
                axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
            axes.set_title(title, loc="left")
            # A share of steps is one of all of them; elsewhere the highest marker stays whole.
            highest = 100.0 if name == "plain_share" else max(axes.dataLim.ymax, 1.0)
            axes.set_ylim(0.0, 1.08 * highest)
            _label_batches(axes, places)
        _add_legend(figure, False)
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


def _places(rows: Sequence[Row]) -> dict[int, int]:
    """Return where each batch size stands on the axis: beside each other, however far apart."""
    return {batch: place for place, batch in enumerate(sorted({row["batch"] for row in rows}))}


def _dodged(arms: Sequence[str]) -> list[tuple[str, float]]:
    middle = (len(arms) - 1) / 2
    return [(arm, DODGE * (i - middle) / max(len(arms), 1)) for i, arm in enumerate(arms)]


def _draw_ratios(
    axes: Axes,
    rows: Sequence[Row],
    arm: str,
    name: str,
    places: Mapping[int, int],
    shift: float,
    style: Style,
) -> None:
    found = {row["batch"]: ratio_of(row, name) for row in rows if row["arm"] == arm}
    known = {batch: ratio for batch, ratio in sorted(found.items()) if ratio is not None}
    if not known:
        return
    middle = [ratio.median for ratio in known.values()]
    below = [0.0 if r.low is None else r.median - r.low for r in known.values()]
    above = [0.0 if r.high is None else r.high - r.median for r in known.values()]
    axes.errorbar(
        [places[batch] + shift for batch in known],
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


def _draw_bounds(axes: Axes, ends: Mapping[float, float | None], style: Style) -> None:
    known = {place: value for place, value in ends.items() if value is not None}
    axes.plot(
        list(known),
        list(known.values()),
        linestyle="",
        marker="_",
        markersize=16,
        markeredgewidth=2.0,
        color=style.color,
    )


def _label_batches(axes: Axes, places: Mapping[int, int]) -> None:
    axes.set_xticks(list(places.values()), [str(batch) for batch in places])
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel("batch size")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", alpha=0.25)


def _add_legend(figure: Figure, has_bounds: bool) -> None:
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if has_bounds:
        # Drawn nowhere: it only stands for the marks of all arms.
        (mark,) = figure.axes[0].plot([], [], "_", color="0.2", markersize=12, markeredgewidth=2.0)
        entries["CAST's bound by the table"] = mark
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=min(len(entries), 5),
            frameon=False,
        )
