"""The figure of a profile: what is drawn is what the cost model returns and the tables hold."""

from itertools import pairwise

import msgspec
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel
from cast_sglang.errors import ProfileError
from cast_sglang.report.profile_plot import plot_profiles
from tests.support.builders import make_draftless_profile, make_identity, make_profile, make_table


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Return a function that draws profiles and returns the figure."""
    figures = []
    original = FigureCanvasAgg.__init__

    def keep(canvas, figure=None):
        figures.append(figure)
        original(canvas, figure)

    monkeypatch.setattr(FigureCanvasAgg, "__init__", keep)

    def run(*profiles):
        plot_profiles(list(profiles), tmp_path / "p.png")
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return run


def lines(axes, style):
    return [line for line in axes.get_lines() if line.get_linestyle() == style]


def markers(axes, hollow):
    found = [line for line in axes.get_lines() if line.get_marker() in ("o", "s")]
    return [line for line in found if (line.get_markerfacecolor() == "white") == hollow]


def test_lines_are_the_cost_model(draw):
    profile = make_profile()
    target = draw(profile).axes[0]
    model = CostModel(profile, Limits.of_tables(profile))
    solid = lines(target, "-")
    assert len(solid) == 2
    for line, batch_size in zip(solid, (1, 4), strict=True):
        costs = model.step_costs(batch_size, 1024)
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 9))
        expected = costs.verify * costs.unit_us / 1e3
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-5)
    # The part beyond the grid goes on where the other ends.
    for inside, beyond in zip(solid, lines(target, ":"), strict=True):
        assert beyond.get_xdata()[0] == 8 and beyond.get_xdata()[-1] > 8
        assert beyond.get_ydata()[0] == inside.get_ydata()[-1]
        assert beyond.get_color() == inside.get_color()


def test_entries_that_were_not_measured_are_hollow(draw):
    samples = make_table().samples
    samples[1][1][3] = 0
    table = msgspec.structs.replace(make_table(), samples=samples)
    target = draw(make_profile(target=table)).axes[0]
    [hollow] = markers(target, hollow=True)
    assert hollow.get_xdata()[0] == 8
    assert hollow.get_ydata()[0] == pytest.approx(table.time_us[1][1][3] / 1e3)
    assert len(markers(target, hollow=False)) == 7


def test_marginal_cost_is_in_units_of_a_row(draw):
    profile = make_profile()
    marginal = draw(profile).axes[3]
    costs = CostModel(profile, Limits.of_tables(profile)).step_costs(4, 1024)
    inside = [p for p in marginal.patches if p.get_linestyle() in ("-", "solid")]
    values, edges, _ = inside[1].get_data()
    np.testing.assert_allclose(values, np.diff(costs.verify), rtol=1e-5)
    np.testing.assert_array_equal(edges, np.arange(1, 9))


def test_title_says_where_and_how_well(draw):
    profile = make_profile(make_identity(device_name="A $b$ C"))
    title = draw(profile).get_suptitle()
    for words in (
        "A $b$ C",
        "org/Target-8B + org/Draft",
        "bfloat16",
        "2026-01-01",
        "error unknown",
    ):
        assert words in title
    assert "ESTIMATED" not in title


def test_title_of_an_estimate(draw):
    profile = make_profile()
    provenance = msgspec.structs.replace(profile.provenance, estimated=True)
    assert "ESTIMATED" in draw(make_profile(provenance=provenance)).get_suptitle()


def test_comparison(draw):
    table = make_table(2000.0, batch_sizes=(1, 2, 4), contexts=(128, 512))
    slower = make_profile(target=table, step_overhead_us=None)
    figure = draw(make_profile(), slower)
    target, *_, ratio = figure.axes
    assert len(lines(target, "-")) == len(lines(target, "--")) == 2
    assert "context 128" in target.get_title(loc="left")
    for line in lines(ratio, "-")[:2]:
        np.testing.assert_allclose(line.get_ydata(), 2.0, rtol=1e-5)


def test_smallest_profile(draw):
    one = make_table(batch_sizes=(1,), contexts=(128,), token_counts=(1,))
    tables = {"target": one, "draft": one, "draft_extend": one}
    smallest = make_profile(**tables, step_overhead_us=None)
    draw(smallest)
    draw(make_profile(), smallest)


def test_what_was_not_measured_is_dotted_and_never_the_panels_context(draw):
    """A second context that does not fit at batch 4, and a third that fits nowhere."""
    table = make_table(contexts=(128, 1024, 4096))
    samples = [[[6] * 4, [6] * 4, [0] * 4], [[6] * 4, [0] * 4, [0] * 4]]
    table = msgspec.structs.replace(table, samples=samples)
    figure = draw(make_profile(target=table))
    assert "context 128" in figure.axes[0].get_title(loc="left")
    contexts = figure.axes[4]
    for style, spans in (("-", [(128, 1024), (128, 128)]), (":", [(1024, 6000), (128, 6000)])):
        for line, (low, high) in zip(lines(contexts, style)[::2], spans, strict=True):
            assert low <= line.get_xdata()[0] and line.get_xdata()[-1] <= high
    assert {marker.get_xdata()[0] for marker in markers(contexts, hollow=True)} == {1024, 4096}
    assert len(markers(contexts, hollow=True)) == 2 * 3


def test_many_batch_sizes_and_contexts_stay_legible(draw):
    sizes = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 28, 32)
    table = make_table(batch_sizes=sizes, contexts=(128, 192, 320, 512, 576, 704, 960))
    tables = {"target": table, "draft": table, "draft_extend": table}
    figure = draw(make_profile(**tables, step_overhead_us=None))
    assert len(lines(figure.axes[0], "-")) == 6
    drawn, _ = figure.legends
    assert [text.get_text() for text in drawn.get_texts()] == ["1", "2", "4", "8", "16", "32"]
    assert drawn.get_title().get_text().endswith("6 of 15")
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in figure.axes[4].get_xticklabels() if t.get_text()]
    assert len(boxes) > 3
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_entries_have_the_spread_of_their_samples(draw):
    profile = make_profile()
    bars = [segment for c in draw(profile).axes[0].collections for segment in c.get_segments()]
    table = profile.target
    assert len(bars) == 2 * len(table.token_counts)
    (_, low), (_, high) = bars[0]
    assert high - low == pytest.approx(table.spread_us[0][1][0] / 1e3)


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(ProfileError, match="cannot be written: No such file.*--plot"):
        plot_profiles([make_profile()], tmp_path / "none" / "p.png")


def test_a_profile_without_a_draft_has_no_panels_of_it(draw):
    figure = draw(make_draftless_profile())
    assert len(figure.axes) == 3
    assert not [axes for axes in figure.axes if "draft" in axes.get_title(loc="left")]
    assert len(draw(make_draftless_profile(), make_profile()).axes) == 6
