"""The pictures of the report: what is drawn, and that it can be read."""

import math
from itertools import combinations

import pytest
from matplotlib.colors import to_rgb

from benchmarks.harness.rows import row_fields
from benchmarks.report import figures
from benchmarks.report.figures import draw_speedups, draw_trees, styles_of

# In the order in which cells were measured.
BATCHES = (32, 8, 1, 4)
ARMS = ("plain", "static:5-4-8", "static:3-1-4", "cast:auto")


def row_of(arm: str, batch: int, **values: float) -> dict:
    speed = 1.0 if arm == "plain" else 2.0 + 1 / batch
    row = dict.fromkeys(row_fields()) | {"arm": arm, "batch": batch, "task": "t"}
    for name in ("vs_plain", "vs_best_static"):
        row |= {name: speed, f"{name}_min": 0.9 * speed, f"{name}_max": 1.1 * speed}
    if arm == "cast:auto":
        row |= {panel.field: 0.5 for panel in figures.TREE_PANELS} | {"mean_layers": batch / 8}
    return row | values


ROWS = [row_of(arm, batch) for batch in BATCHES for arm in ARMS]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    found = []
    monkeypatch.setattr(figures, "_as_svg", lambda figure: found.append(figure) or b"svg")
    return found


def ends_of(bars) -> list[tuple[float, float]]:
    """Return the ends of error bars."""
    return [(line[0][1], line[1][1]) for line in bars[2][0].get_segments()]


def test_lines_go_from_the_smallest_batch_to_the_largest(drawn):
    draw_trees(ROWS, styles_of(ARMS))
    lines = [
        line for axes in drawn[0].axes for line in axes.get_lines() if line.get_marker() != "None"
    ]
    assert len(lines) == len(figures.TREE_PANELS)
    for line in lines:
        assert list(line.get_xdata()) == sorted(line.get_xdata())
    assert list(lines[0].get_ydata()) == [1 / 8, 4 / 8, 1.0, 4.0]


def test_batch_sizes_stand_on_a_logarithmic_axis_by_their_names(drawn):
    draw_trees(ROWS, styles_of(ARMS))
    draw_speedups(ROWS, styles_of(ARMS))
    for axes in (axes for figure in drawn for axes in figure.axes):
        assert axes.get_xscale() == "log"
        assert list(axes.get_xticks()) == sorted(BATCHES)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4", "8", "32"]
        assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title(loc="left")


def test_ratios_have_their_spread_near_their_batch_size(drawn):
    draw_speedups(ROWS, styles_of(ARMS))
    plain, best = drawn[0].axes
    # Plain decoding relative to itself is the line at 1.
    assert [bars.get_label() for bars in plain.containers] == [
        *("EAGLE-3 5-4-8", "EAGLE-3 3-1-4", "CAST auto")
    ]
    assert len(best.containers) == len(ARMS)
    for axes in (plain, best):
        for bars in axes.containers:
            places, ratios = bars[0].get_data()
            for place, batch in zip(places, sorted(BATCHES), strict=True):
                assert abs(math.log2(place / batch)) < 0.25
            for (low, high), ratio in zip(ends_of(bars), ratios, strict=True):
                assert (low, high) == pytest.approx((0.9 * ratio, 1.1 * ratio))


def test_what_was_not_measured_has_no_panel(drawn):
    missing = [row | {"vs_plain": None, "policy_share": None} for row in ROWS]
    draw_speedups(missing, styles_of(ARMS))
    draw_trees(missing, styles_of(ARMS))
    titles = [[axes.get_title(loc="left") for axes in figure.axes] for figure in drawn]
    assert [len(texts) for texts in titles] == [1, len(figures.TREE_PANELS) - 1]
    assert "best static" in titles[0][0] and "Time of the policy" not in titles[1]


def test_where_there_is_one_batch_size_the_tables_are_enough(drawn):
    rows = [row for row in ROWS if row["batch"] == 8]
    assert draw_speedups(rows, styles_of(ARMS)) is None
    assert draw_trees(rows, styles_of(ARMS)) is None
    nothing = [row | {"vs_plain": None, "vs_best_static": None} for row in ROWS]
    assert draw_speedups(nothing, styles_of(ARMS)) is None


def test_arms_differ_by_colours_that_can_be_told_apart():
    arms = ["plain", "adaptive", *(f"static:{n}-1-2" for n in range(1, 5))]
    arms += ["cast:auto", "cast:fixed", "cast:eagle"]
    colors = {arm: to_rgb(style.color) for arm, style in styles_of(arms).items()}
    for one, other in combinations(arms, 2):
        assert math.dist(colors[one], colors[other]) > 0.25, (one, other)
