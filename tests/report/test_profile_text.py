"""Profiles as tables: the numbers are those of the tables, and people see what to doubt."""

import msgspec
import numpy as np
import pytest
from rich.console import Console

from cast_sglang.costs.schema import Heldout
from cast_sglang.report.profile_text import print_comparison, print_profile
from tests.support.builders import make_draftless_profile, make_identity, make_profile, make_table


@pytest.fixture
def printed(capsys):
    """Return a function that prints to a terminal of 80 columns and returns its lines."""

    def run(show, *profiles):
        show(*profiles, Console(width=80))
        return [line.rstrip() for line in capsys.readouterr().out.splitlines()]

    return run


def with_provenance(profile, **changes):
    provenance = msgspec.structs.replace(profile.provenance, **changes)
    return msgspec.structs.replace(profile, provenance=provenance)


def rows_below(lines, title):
    """Return the cells of the table that follows a title."""
    first = next(i for i, line in enumerate(lines) if line.startswith(title))
    end = lines.index("", first + 2)
    return [line.split() for line in lines[first + 1 : end] if line.split() and "─" not in line]


def test_the_summary_is_relative_to_one_row(printed):
    lines = printed(print_profile, make_profile())
    line = next(line for line in lines if line.startswith("      4 "))
    # Batch 4 at context 1024: (1 + 0.02 * 4 + 0.4096) ms, 8 rows (1 + 0.02 * 32 + 0.4096) ms.
    assert line.split() == ["4", "1.49", "1.38x", "0.10x", "0.14x"]


def test_tables_are_in_milliseconds(printed):
    profile = make_profile()
    [heading, *rows] = rows_below(printed(print_profile, profile), "draft: one layer, ms by nodes")
    assert heading == ["batch", "context", "1", "2", "4", "8"]
    cells = [row[-4:] for row in rows]
    assert np.array(cells, float) == pytest.approx(
        np.array(profile.draft.time_us).reshape(4, 4) / 1e3, rel=5e-3
    )
    # The batch size stands in the first line of its contexts.
    assert [len(row) for row in rows] == [6, 5, 6, 5]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 40])
def test_long_tables_show_seven_columns_with_both_ends(printed, count):
    counts = tuple(range(1, count + 1))
    lines = printed(print_profile, make_profile(target=make_table(token_counts=counts)))
    [heading, first, *_] = rows_below(lines, "target: one verify pass")
    assert heading[2] == "1" and heading[-1] == str(count)
    assert len(heading) - 2 == min(count, 7) == len(first) - 2
    assert all(len(line) <= 80 and "…" not in line for line in lines)


def test_an_estimate_is_told_first_and_names_are_no_markup(printed):
    profile = make_profile(make_identity(device_name="[H200]"))
    lines = printed(print_profile, with_provenance(profile, estimated=True))
    assert lines[0].startswith("ESTIMATED") and any("[H200]" in line for line in lines)
    assert any(line.endswith("estimated, not measured") for line in lines)


def test_the_error_of_the_tables_is_told_where_it_is_known(printed):
    assert any("error unknown" in line for line in printed(print_profile, make_profile()))
    heldout = Heldout(points=9, median_error=0.0123, p95_error=0.3)
    lines = printed(print_profile, with_provenance(make_profile(), heldout=heldout))
    assert any("single passes: error median 1.2%, p95 30.0%" in line for line in lines)


def test_overhead_is_left_out_where_it_was_not_measured(printed):
    lines = printed(print_profile, make_profile())
    assert lines[-1] == "Step overhead, us by batch size: 1: 50, 4: 80"
    bare = printed(print_profile, make_profile(step_overhead_us=None))
    assert not any("overhead" in line for line in bare)


def test_a_comparison_is_on_the_grid_of_the_first(printed):
    """The second's target takes half the time everywhere, on a grid of its own."""
    second = make_profile(
        make_identity(device_name="B200"),
        target=make_table(500.0, batch_sizes=(1, 2, 4), token_counts=(1, 2, 3, 4, 8)),
        step_overhead_us=None,
    )
    lines = printed(print_comparison, make_profile(), second)
    assert any("B200" in line for line in lines) and any("H200" in line for line in lines)
    [heading, *rows] = rows_below(lines, "target: one verify pass, second / first")
    assert heading[2:] == ["1", "2", "4", "8"]
    assert {cell for row in rows for cell in row[-4:]} == {"0.50"}
    [_, *rows] = rows_below(lines, "draft: one layer, second / first")
    assert {cell for row in rows for cell in row[-4:]} == {"1.00"}


def profile_with_gaps():
    """Batch 4 does not fit at context 1024; at batch 1, two counts are measured there."""
    samples = [[[6] * 4, [6, 0, 0, 6]], [[6] * 4, [0] * 4]]
    return make_profile(target=msgspec.structs.replace(make_table(), samples=samples))


@pytest.mark.parametrize("show", [print_profile, print_comparison])
def test_what_was_not_measured_is_marked(printed, show):
    profiles = [profile_with_gaps()] * (1 if show is print_profile else 2)
    lines = printed(show, *profiles)
    [_, *rows] = rows_below(lines, "target: one verify pass, ")
    marks = [[cell.strip("0123456789.") for cell in row[-4:]] for row in rows]
    assert marks == [[""] * 4, ["", "~", "~", ""], [""] * 4, ["*"] * 4]
    [_, *rows] = rows_below(lines, "draft: one layer, ")
    assert not any("~" in cell or "*" in cell for row in rows for cell in row)
    assert any("* extrapolated from other shapes" in line for line in lines)


def test_the_summary_quotes_nothing_that_is_extrapolated(printed):
    lines = printed(print_profile, profile_with_gaps())
    assert any(line.startswith("summary at context 128:") for line in lines)
    # Batch 4 at context 128: (1 + 0.02 * 4 + 0.0512) ms.
    assert next(line for line in lines if line.startswith("      4 ")).split()[:2] == ["4", "1.13"]
    whole = printed(print_profile, make_profile())
    assert any(line.startswith("summary at context 1024:") for line in whole)


def test_nothing_of_an_estimate_is_marked(printed):
    bare = msgspec.structs.replace(make_table(), samples=[[[0] * 4] * 2] * 2)
    profile = make_profile(target=bare, draft=bare, draft_extend=bare)
    lines = printed(print_profile, with_provenance(profile, estimated=True))
    [_, *rows] = rows_below(lines, "target: one verify pass")
    assert not any("*" in cell for row in rows for cell in row)
    assert any(line.startswith("summary at context 1024:") for line in lines)


def test_seconds_are_whole_milliseconds(printed):
    lines = printed(print_profile, make_profile(target=make_table(1234567.0)))
    [_, first, *_] = rows_below(lines, "target: one verify pass")
    assert first[2] == "1349"  # 1234.567 ms * (1 + 0.02 * 4 + 0.0128)


def test_a_comparison_beyond_the_seconds_grid_says_so(printed, caplog):
    small = make_profile(target=make_table(batch_sizes=(1, 2)), step_overhead_us=None)
    lines = printed(print_comparison, make_profile(), small)
    assert "of the second: extrapolated beyond the end of its grid in target.batch_sizes" in lines
    same = printed(print_comparison, make_profile(), make_profile())
    assert not any(line.startswith("of the second") for line in same)
    # It says nothing of servers, and so through the log, which is theirs.
    assert not caplog.records


def test_a_profile_without_a_draft_shows_what_it_has(printed):
    bare = make_draftless_profile()
    lines = printed(print_profile, bare)
    assert any(line.startswith("target: one verify pass") for line in lines)
    assert not any(line.startswith("draft: ") or "layer of" in line for line in lines)
    lines = printed(print_comparison, bare, make_profile())
    assert not any(line.startswith("draft: ") for line in lines)
    lines = printed(print_comparison, make_profile(), bare)
    assert lines.count("draft: one layer: not in the second") == 1
