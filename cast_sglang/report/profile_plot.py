"""Draw cost profiles: the measured times of each pass, and the cost model over them."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cast_sglang.config import CastConfig
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel
from cast_sglang.costs.passes import PASSES, Pass
from cast_sglang.costs.profiles import describe_error
from cast_sglang.costs.schema import CostProfile, CostTable
from cast_sglang.errors import ProfileError

__all__ = ["plot_profiles"]

# Curves extend to this multiple of the last grid point, to show how the cost model extrapolates.
BEYOND = 1.25
CONTEXT_POINTS = 64
# More batch sizes are not told apart, by neither colour nor place.
MOST_SIZES = 6
# Ticks of contexts that are nearer than this, in octaves, would overlap.
TICK_GAP = 0.3
# The time axis is logarithmic if the largest time is this multiple of the smallest; otherwise small
# batches would be flat lines at the bottom.
LOG_FROM_RATIO = 8.0
LINE_STYLES = ("-", "--")
MARKERS = ("o", "s")
# Without the palest end of the colormap, which is hard to see on white.
COLOR_RANGE = (0.0, 0.88)
GREY = "0.2"


class _Source(NamedTuple):
    """One profile, its cost model, and the style in which it is drawn."""

    profile: CostProfile
    model: CostModel
    style: str
    marker: str

    def units(self, name: str, batch_size: int, context: float) -> np.ndarray:
        """Return the costs of 1, 2, ... tokens per request in 1-row target passes."""
        costs = self.model.step_costs(batch_size, context)
        units: np.ndarray = getattr(costs, name)
        return units

    def milliseconds(self, name: str, batch_size: int, context: float) -> np.ndarray:
        unit_us = self.model.step_costs(batch_size, context).unit_us
        return self.units(name, batch_size, context) * (unit_us / 1e3)


class _Scene(NamedTuple):
    """The data that all panels share."""

    sources: list[_Source]
    colors: dict[int, str]  # by batch size
    num_sizes: int  # that could be drawn
    context: int

    def curves(self) -> Iterator[tuple[_Source, int, str]]:
        """Yield each profile with each drawn batch size that it covers."""
        for source in self.sources:
            for batch_size, color in self.colors.items():
                if batch_size <= source.profile.target.batch_sizes[-1]:
                    yield source, batch_size, color


def plot_profiles(profiles: Sequence[CostProfile], path: Path) -> None:
    """Draw one profile, or two on top of each other, into a file.

    Lines are what `CostModel` returns at every token count and context; markers are the entries of
    the tables, hollow where they were not measured; bars are the samples' inter-quartile range.
    Lines are dotted where they are extrapolated: beyond the grid, and beyond the last context that
    was measured at a batch size. Two profiles are compared at the batch sizes and at the context
    that both have, the second one dashed. Of many batch sizes, some are drawn.

    Args:
        profiles: one or two that `load_profile` accepted.
        path: a file name that ends in .png or .svg.

    Raises:
        ProfileError: the file name has another ending, or the file cannot be written.
    """
    if path.suffix not in (".png", ".svg"):
        raise ProfileError(f"plot {path}: the file name must end in .png or .svg")
    scene = _scene(profiles)
    # Not pyplot: it would ask for a display and keep global state.
    figure = Figure(figsize=(16, 9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    times, (marginal, context, last, *_) = figure.subplots(2, len(PASSES))
    for axes, each in zip(times, PASSES, strict=True):
        _draw_times(axes, scene, each)
    _draw_marginal(marginal, scene)
    _draw_contexts(context, scene)
    if len(scene.sources) == 1:
        _draw_layer_price(last, scene)
    else:
        _draw_ratio(last, scene)
    for axes in (*times, marginal, last):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in figure.axes:
        if not axes.has_data():  # without a draft there are none of its passes
            axes.remove()
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    _add_legends(figure, scene)
    _add_title(figure, scene)
    try:
        figure.savefig(path)
    except OSError as error:
        raise ProfileError(
            f"plot {path}: cannot be written: {error.strerror}; name another file with --plot FILE"
        ) from error


def _scene(profiles: Sequence[CostProfile]) -> _Scene:
    sources = [
        _Source(profile, _model(profile), style, marker)
        for profile, style, marker in zip(profiles, LINE_STYLES, MARKERS, strict=False)
    ]
    every_size = _shared([profile.target.batch_sizes for profile in profiles])
    sizes = _spread_out(every_size)
    contexts = _shared([profile.quotable_contexts for profile in profiles])
    colormap = matplotlib.colormaps["viridis"]
    shades = np.linspace(*COLOR_RANGE, len(sizes))
    colors = {size: to_hex(colormap(shade)) for size, shade in zip(sizes, shades, strict=True)}
    return _Scene(sources, colors, len(every_size), contexts[len(contexts) // 2])


def _model(profile: CostProfile) -> CostModel:
    counts = {each.limit: profile.table_of(each).token_counts for each in profile.passes}
    beyond: dict[str, Any] = {limit: _beyond(of) for limit, of in counts.items()}
    return CostModel(profile, dataclasses.replace(Limits.of_tables(profile), **beyond))


def _shared(grids: Sequence[list[int]]) -> list[int]:
    """Return the points that all grids share, or those of the first grid if there are none."""
    return sorted(set(grids[0]).intersection(*grids[1:])) or grids[0]


def _spread_out(sizes: Sequence[int]) -> list[int]:
    """Return at most MOST_SIZES of the sizes, about as many octaves apart."""
    if len(sizes) <= MOST_SIZES:
        return list(sizes)
    ideal = np.geomspace(sizes[0], sizes[-1], MOST_SIZES)
    return sorted({min(sizes, key=lambda size: abs(math.log(size / place))) for place in ideal})


def _beyond(grid: list[int]) -> int:
    return max(grid[-1] + 1, math.ceil(BEYOND * grid[-1]))


def _draw_times(axes: Axes, scene: _Scene, of: Pass) -> None:
    for source, batch_size, color in scene.curves():
        if of not in source.profile.passes:
            continue
        table = source.profile.table_of(of)
        times_ms = source.milliseconds(of.name, batch_size, scene.context)
        _draw_line(axes, times_ms, table.token_counts[-1], color, source.style)
        if batch_size in table.batch_sizes and scene.context in table.contexts:
            b, c = table.batch_sizes.index(batch_size), table.contexts.index(scene.context)
            cells = table.time_us[b][c], table.spread_us[b][c], table.samples[b][c]
            _draw_entries(axes, source, color, table.token_counts, *cells)
    _label(axes, f"{of.title}, context {scene.context}", f"{of.unit} per request", "time, ms")
    _scale_times(axes)


def _draw_line(axes: Axes, values: np.ndarray, last: int, color: str, style: str) -> None:
    """Draw the values of the counts 1, 2, ...; dotted beyond `last`, the end of the grid."""
    counts = np.arange(1, len(values) + 1)
    axes.plot(counts[:last], values[:last], style, color=color, linewidth=1.6)
    axes.plot(counts[last - 1 :], values[last - 1 :], ":", color=color, linewidth=1.6)


def _draw_entries(
    axes: Axes,
    source: _Source,
    color: str,
    positions: Sequence[int],
    times_us: Sequence[float],
    spreads_us: Sequence[float],
    samples: Sequence[int],
) -> None:
    """Draw the entries of a table, hollow where `samples` is 0 (not measured)."""
    cells = zip(positions, times_us, spreads_us, samples, strict=True)
    for position, time_us, spread_us, count in cells:
        low, high = (time_us - spread_us / 2) / 1e3, (time_us + spread_us / 2) / 1e3
        axes.vlines(position, low, high, color=color, linewidth=1.0)
        axes.plot(
            position,
            time_us / 1e3,
            source.marker,
            markersize=5,
            color=color,
            markerfacecolor=color if count else "white",
            zorder=3,
        )


def _draw_marginal(axes: Axes, scene: _Scene) -> None:
    for source, batch_size, color in scene.curves():
        each = np.diff(source.units("verify", batch_size, scene.context))
        edges = np.arange(1, len(each) + 2)
        last = source.profile.target.token_counts[-1] - 1
        for part, style in ((slice(0, last), source.style), (slice(last, None), ":")):
            steps = each[part]
            bounds = edges[part.start : part.start + len(steps) + 1]
            if len(steps):
                axes.stairs(
                    steps, bounds, baseline=None, color=color, linestyle=style, linewidth=1.6
                )
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    title = f"target: cost of one more row, context {scene.context}"
    _label(axes, title, "rows per request", "in 1-row target passes")
    _draw_limit(axes, "C3", CastConfig().c3, "a row that costs more never pays")


def _draw_contexts(axes: Axes, scene: _Scene) -> None:
    for source, batch_size, color in scene.curves():
        table = source.profile.target
        contexts = np.geomspace(table.contexts[0], _beyond(table.contexts), CONTEXT_POINTS)
        beyond = contexts > _last_measured(table, batch_size)
        for count, width in ((table.token_counts[-1], 2.2), (1, 0.9)):
            times_ms = np.array(
                [source.milliseconds("verify", batch_size, c)[count - 1] for c in contexts]
            )
            for part, style in ((~beyond, source.style), (beyond, ":")):
                axes.plot(contexts[part], times_ms[part], style, color=color, linewidth=width)
            if batch_size in table.batch_sizes:
                b, n = table.batch_sizes.index(batch_size), table.token_counts.index(count)
                times_us = [row[n] for row in table.time_us[b]]
                spreads_us = [row[n] for row in table.spread_us[b]]
                samples = [row[n] for row in table.samples[b]]
                _draw_entries(axes, source, color, table.contexts, times_us, spreads_us, samples)
    most = dict.fromkeys(str(s.profile.target.token_counts[-1]) for s in scene.sources)
    title = f"target: {' / '.join(most)} rows (thick) and 1 row (thin)"
    _label(axes, title, "context, tokens", "time, ms")
    axes.set_xscale("log", base=2)
    ticks = sorted({c for source in scene.sources for c in source.profile.target.contexts})
    axes.xaxis.set_major_locator(FixedLocator(_apart(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.xaxis.set_minor_locator(NullLocator())
    _scale_times(axes)


def _last_measured(table: CostTable, batch_size: int) -> int:
    """Return the context beyond which a batch size is extrapolated."""
    contexts = table.contexts
    if batch_size in table.batch_sizes:
        missing = table.is_extrapolated[table.batch_sizes.index(batch_size)]
        # Nothing of an estimate was measured, and its title says so.
        contexts = [c for c, is_missing in zip(contexts, missing, strict=True) if not is_missing]
    return contexts[-1] if contexts else table.contexts[-1]


def _apart(ticks: Sequence[int]) -> list[float]:
    """Return the ticks of a logarithmic axis whose labels do not overlap."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or math.log2(tick / kept[-1]) >= TICK_GAP:
            kept.append(float(tick))
    return kept


def _short(value: float, _: object = None) -> str:
    return f"{value:.0f}" if value < 4096 else f"{value / 1024:.3g}k"


def _draw_layer_price(axes: Axes, scene: _Scene) -> None:
    for source, batch_size, color in scene.curves():
        if (table := source.profile.draft) is None:
            return
        units = source.units("draft", batch_size, scene.context)
        _draw_line(axes, units, table.token_counts[-1], color, source.style)
    axes.set_ylim(bottom=0.0)
    title = f"draft: cost of one layer, context {scene.context}"
    _label(axes, title, "nodes per request", "in 1-row target passes")
    _draw_limit(axes, "C2", CastConfig().c2, "a layer that costs more never pays", "left")


def _draw_ratio(axes: Axes, scene: _Scene) -> None:
    first, second = scene.sources
    for batch_size, color in scene.colors.items():
        times = [s.milliseconds("verify", batch_size, scene.context) for s in scene.sources]
        last = min(s.profile.target.token_counts[-1] for s in scene.sources)
        num_counts = min(map(len, times))
        ratio = times[1][:num_counts] / times[0][:num_counts]
        _draw_line(axes, ratio, last, color, first.style)
    axes.axhline(1.0, color="0.4", linewidth=0.8)
    title = f"target: second / first, context {scene.context}"
    _label(axes, title, "rows per request", "ratio of times")


def _draw_limit(axes: Axes, name: str, price: float, meaning: str, side: str = "right") -> None:
    """Mark the cost 1 / price: above it even a token that is surely accepted is not worth it."""
    place = 0.01 if side == "left" else 0.99
    limit = 1.0 / price
    low, high = axes.get_ylim()
    text = f"1 / {name} = {limit:.2g}: {meaning}"
    style: dict[str, Any] = {"color": "crimson", "fontsize": "small", "ha": side}
    if limit < 1.5 * high:
        axes.set_ylim(low, max(high, 1.1 * limit))
        axes.axhline(limit, color="crimson", linewidth=1.0, linestyle=(0, (6, 3)))
        low, high = axes.get_ylim()
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        where: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "bbox": box}
        where["va"] = "bottom"
        axes.text(place, limit + 0.01 * (high - low), text, **where, **style)
    else:
        axes.set_ylim(low, high + 0.12 * (high - low))
        axes.text(place, 0.97, f"all below {text}", transform=axes.transAxes, va="top", **style)


def _label(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def _scale_times(axes: Axes) -> None:
    low, high = axes.dataLim.intervaly
    if high < LOG_FROM_RATIO * low:
        axes.set_ylim(bottom=0.0)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _add_legends(figure: Figure, scene: _Scene) -> None:
    sizes = [
        Line2D([], [], color=color, linewidth=3, label=str(size))
        for size, color in scene.colors.items()
    ]
    styles = [
        _mark("o", "measured"),
        _mark("o", "not measured", fill="white"),
        Line2D([], [], color=GREY, marker="|", linestyle="", label="inter-quartile range"),
        Line2D([], [], color=GREY, label="cost model"),
        Line2D([], [], color=GREY, linestyle=":", label="extrapolated"),
    ]
    if len(scene.sources) > 1:
        styles[0] = _mark("o", "measured, first")
        styles.insert(1, _mark("s", "measured, second"))
        styles[4].set_label("cost model, first")
        styles.insert(5, Line2D([], [], color=GREY, linestyle="--", label="cost model, second"))
    title = "batch size"
    if len(sizes) < scene.num_sizes:
        title += f",\n{len(sizes)} of {scene.num_sizes}"
    figure.legend(handles=sizes, title=title, loc="outside right upper", frameon=False)
    figure.legend(handles=styles, loc="outside right lower", frameon=False)


def _mark(marker: str, label: str, fill: str = GREY) -> Line2D:
    return Line2D(
        [],
        [],
        color=GREY,
        linestyle="",
        marker=marker,
        markersize=5,
        markerfacecolor=fill,
        label=label,
    )


def _add_title(figure: Figure, scene: _Scene) -> None:
    names = ("",) if len(scene.sources) == 1 else ("first: ", "second (dashed): ")
    lines = []
    for name, source in zip(names, scene.sources, strict=True):
        lines += _title_lines(name, source.profile)
    is_estimated = any(source.profile.provenance.estimated for source in scene.sources)
    color = "crimson" if is_estimated else "black"
    # Names are free text, so a dollar sign must not start a formula.
    figure.suptitle("\n".join(lines), fontsize="medium", color=color, parse_math=False)


def _title_lines(name: str, profile: CostProfile) -> list[str]:
    source = profile.provenance
    dtype = source.dtype + (f" {source.quantization}" if source.quantization else "")
    mark = "ESTIMATED, not measured  |  " if source.estimated else ""
    return [
        f"{name}{mark}{source.device_name}  |  {source.target.name} + {source.draft.name}",
        f"{dtype}, tp {source.tp_size}  |  {source.date[:10]}",
        describe_error(profile),
    ]
