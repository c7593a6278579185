"""Arms that differ by settings only: what each setting brings, as a table and as pictures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.rows import shown
from benchmarks.harness.turns import Ratio
from benchmarks.report.data import (
    MEAN,
    Row,
    base_of,
    cell_of,
    geometric_mean,
    label_of,
    settings_of,
    speed_ratio,
    spread,
)
from benchmarks.report.page import Grid
from cast_sglang.config import CastConfig

HEADINGS = ("batch", "arm", "compared with", "speed", "by the table", "accept length")
# The paper's names of the rules that a price of 0 switches off.
RULES = {"c1=0": "BP", "c2=0": "DP", "c3=0": "DR"}
# Knobs of which several values are drawn as a line, in this order.
SWEPT = ("c1", "c2", "c3", "r")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^v*"
DODGE = 0.6


class Switched(NamedTuple):
    """One arm beside the arm that lacks a setting of it, at one batch size."""

    arm: str
    base: str
    batch: int
    speed: Ratio | None  # measured, of arm over base
    by_table: float | None  # the same by the cost table and what was accepted: without noise
    accept_lengths: tuple[float | None, float | None]

    @property
    def change(self) -> str:
        """What the arm has beyond its base, for people."""
        added = sorted(settings_of(self.arm)[1] - settings_of(self.base)[1])
        if all(setting in RULES for setting in added):
            return f"no {', '.join(RULES[setting] for setting in added)} ({', '.join(added)})"
        return ", ".join(added)


def switched(rows: Sequence[Row]) -> list[Switched]:
    """Return every comparison that rows of one task and temperature hold, arm by arm."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    found = []
    for arm in arms:
        base = base_of(arm, arms)
        if base is None:
            continue
        others = {cell_of(row): row for row in rows if row["arm"] == base}
        mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["batch"])
        for row in mine:
            if (other := others.get(cell_of(row))) is not None:
                rates = row["table_rate"], other["table_rate"]
                by_table = rates[0] / rates[1] if rates[0] and rates[1] else None
                lengths = row["accept_length"], other["accept_length"]
                ratio = speed_ratio(row, other)
                found.append(Switched(arm, base, row["batch"], ratio, by_table, lengths))
    return found


def table(found: Sequence[Switched]) -> Grid:
    """Return the comparisons of one task and temperature as a table."""
    lines: list[tuple[str, ...]] = []
    breaks = set()
    for mine in _by_arm(found):
        breaks.add(len(lines))
        names = label_of(mine[0].arm), label_of(mine[0].base)
        for one in mine:
            ours, theirs = one.accept_lengths
            cells = spread(one.speed), shown(one.by_table, "x"), f"{shown(ours)} to {shown(theirs)}"
            lines.append((str(one.batch), *names, *cells))
        if len(mine) > 1:
            speeds = geometric_mean([one.speed and one.speed.median for one in mine])
            rates = geometric_mean([one.by_table for one in mine])
            lines.append((MEAN, *names, shown(speeds, "x"), shown(rates, "x"), ""))
    return Grid(HEADINGS, lines, num_words=3, breaks=frozenset(breaks - {0}))


def draw_switched(figure: Figure, found: Sequence[Switched]) -> None:
    """Draw how fast each arm is relative to its base: a line for each, a mark for each batch size.

    Bars reach from the least to the greatest repeat; the small strokes are the ratios by the table.
    """
    axes = figure.subplots()
    batches = sorted({one.batch for one in found})
    ticks: list[str] = []
    base = None
    for mine in _by_arm(found):
        if mine[0].base != base:
            base = mine[0].base
            ticks.append(f"{label_of(base)} with")
        for one in mine:
            _draw_one(axes, one, len(ticks), batches)
        ticks.append(mine[0].change)
    axes.set_yticks(range(len(ticks)), ticks)
    axes.set_ylim(len(ticks) - 0.4, -0.6)
    axes.axvline(1.0, color="0.6", linewidth=0.8, zorder=0)
    strokes = "; strokes: by the cost table" if any(one.by_table for one in found) else ""
    axes.set_xlabel(f"tokens/s relative to the arm without the setting{strokes}")
    axes.grid(axis="x", alpha=0.25)
    _legend(figure, axes)


def _draw_one(axes: Axes, one: Switched, place: int, batches: Sequence[int]) -> None:
    index = batches.index(one.batch)
    at = place + DODGE * (index - (len(batches) - 1) / 2) / len(batches)
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    if one.speed is not None:
        low, high = _ends(one.speed)
        axes.errorbar(
            [one.speed.median],
            [at],
            xerr=[[one.speed.median - low], [high - one.speed.median]],
            color=color,
            marker=marker,
            linestyle="",
            capsize=2,
            label=f"batch {one.batch}",
        )
    if one.by_table is not None:
        axes.plot([one.by_table], [at], marker="|", color=color, markersize=11, linestyle="")


def sweeps(found: Sequence[Switched]) -> dict[tuple[str, str], dict[float, list[Switched]]]:
    """Return, by base and knob, the comparisons by the knob's value, where there are several."""
    swept: dict[tuple[str, str], dict[float, list[Switched]]] = {}
    for one in found:
        added = settings_of(one.arm)[1] - settings_of(one.base)[1]
        knob, _, value = next(iter(added)).partition("=")
        if len(added) == 1 and knob in SWEPT:
            swept.setdefault((one.base, knob), {}).setdefault(float(value), []).append(one)
    many = {key: values for key, values in swept.items() if len(values) > 1}
    return dict(sorted(many.items(), key=lambda item: (item[0][0], SWEPT.index(item[0][1]))))


def draw_sweeps(
    figure: Figure, swept: Mapping[tuple[str, str], Mapping[float, Sequence[Switched]]]
) -> None:
    """Draw the speed against the value of each knob; at the base's own value it is 1."""
    panels = figure.subplots(1, len(swept), sharey=True, squeeze=False)[0]
    for axes, ((base, knob), values) in zip(panels, swept.items(), strict=True):
        own = own_value(base, knob)
        places = {value: place for place, value in enumerate(sorted({*values, own}))}
        batches = sorted({one.batch for found in values.values() for one in found})
        for index, batch in enumerate(batches):
            points = {own: Ratio(1.0)}
            for value, found in values.items():
                for one in found:
                    if one.batch == batch and one.speed is not None:
                        points[value] = one.speed
            known = sorted(points.items())
            shift = 0.3 * (index - (len(batches) - 1) / 2) / len(batches)
            ends = [_ends(ratio) for _, ratio in known]
            middle = [ratio.median for _, ratio in known]
            axes.errorbar(
                [places[value] + shift for value, _ in known],
                middle,
                yerr=[
                    [m - low for m, (low, _) in zip(middle, ends, strict=True)],
                    [high - m for m, (_, high) in zip(middle, ends, strict=True)],
                ],
                color=COLORS[index % len(COLORS)],
                marker=MARKERS[index % len(MARKERS)],
                linewidth=0.9,
                capsize=2,
                label=f"batch {batch}",
            )
        axes.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
        axes.set_xticks(list(places.values()), [f"{value:g}" for value in places])
        axes.set_xlabel(f"{knob.upper()}, {own:g} in {label_of(base)}", fontsize="small")
        axes.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel("tokens/s relative to the base")
    _legend(figure, *panels)


def own_value(base: str, knob: str) -> float:
    """Return the value of a knob that an arm has without naming it as a setting."""
    prices = settings_of(base)[0].split(":")[2:]
    if prices and knob != "r":
        return float(prices[0].split("-")[SWEPT.index(knob)])
    return float(getattr(CastConfig(), knob))


def _by_arm(found: Sequence[Switched]) -> Iterator[list[Switched]]:
    for arm in dict.fromkeys(one.arm for one in found):
        yield [one for one in found if one.arm == arm]


def _ends(ratio: Ratio) -> tuple[float, float]:
    low = ratio.median if ratio.low is None else ratio.low
    return low, ratio.median if ratio.high is None else ratio.high


def _legend(figure: Figure, *panels: Axes) -> None:
    entries = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    order = sorted(entries, key=lambda label: int(label.split()[-1]))
    if order:
        figure.legend(
            [entries[label] for label in order],
            order,
            loc="outside lower center",
            ncols=len(order),
            frameon=False,
        )
