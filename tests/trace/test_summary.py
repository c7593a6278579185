"""Recorded against replayed steps: means, sums, and what is left out."""

import json
import math

import msgspec
import pytest
from rich.console import Console

from cast_sglang.errors import TraceError
from cast_sglang.trace.records import TracedChoice, TracedRequest, TracedStep
from cast_sglang.trace.replay import Replay, ReplayedStep
from cast_sglang.trace.summary import compare, print_summaries
from tests.support.traces import Recorder, default_policy, make_tables


@pytest.fixture(scope="module")
def recorded():
    """A trace, and the same steps replayed by its own policy and tables."""
    tables = make_tables()
    trace = Recorder(default_policy(), tables).run(40)
    return trace, list(Replay(trace, tables, default_policy()))


def test_the_measured_speed_counts_every_token(recorded):
    trace, outcomes = recorded
    untimed = msgspec.structs.replace(trace.steps[0], measured_us=None)
    trace = trace._replace(steps=[untimed, *trace.steps[1:]])
    [row] = compare(trace, outcomes)
    assert (row.batch_size, row.steps) == (2, 39)
    assert row.recorded.accept_length == pytest.approx(row.replayed.accept_length)
    # Measured times are 1.25 times the predicted ones; the recorder does not know that the draft
    # catches up after the turn of plain decoding.
    assert row.error == pytest.approx(0.25, abs=0.01)
    assert row.table_error == pytest.approx(0.25, abs=0.01)
    tokens = sum(2 + len(r.accepted) - 1 for s in trace.steps[1:] for r in s.requests)
    time = sum(s.measured_us for s in trace.steps[1:])
    assert row.recorded.tokens_per_second == pytest.approx(tokens / time * 1e6)
    with pytest.raises(TraceError, match="no step was measured"):
        compare(trace._replace(steps=[untimed]), outcomes[:1])


def plain_step(batch_size, measured_us=2000.0):
    return TracedStep(
        step=1,
        context=10.0,
        widths=[],
        num_layers=0,
        num_draft_tokens=1,
        extend_rows=0.0,
        requests=[TracedRequest(request=b, context=10) for b in range(batch_size)],
        measured_us=measured_us,
    )


PLAIN = ReplayedStep(TracedChoice(is_plain=True), 0.0, 0.0, 1000.0, 4000.0, math.nan, None)
DRAFTED = PLAIN._replace(choice=TracedChoice(num_layers=2, num_rows=[3, 5]), accepted=1.5)


def test_batch_sizes_met_in_passing_get_no_row(recorded):
    sizes = [1] * 20 + [3] * 19 + [2]  # of 40 steps, one is less than 5 %
    trace = recorded[0]._replace(steps=[plain_step(size) for size in sizes])
    rows = compare(trace, [PLAIN] * 40)
    assert [(row.batch_size, row.steps) for row in rows] == [(1, 20), (3, 19), (0, 40)]
    assert rows[1].recorded.tokens_per_second == pytest.approx(3 / 2e-3)
    assert rows[2].recorded.tokens_per_second == pytest.approx((20 + 57 + 2) / (40 * 2e-3))
    # Replayed steps take half as long, and by the tables as they are twice as long.
    assert (rows[2].error, rows[2].table_error) == pytest.approx((1.0, -0.5))


def test_shares_are_of_what_was_accepted(recorded):
    trace = recorded[0]._replace(steps=[plain_step(2)] * 4)
    drafted = [DRAFTED._replace(assumed_accepted=assumed) for assumed in (0.0, 0.5, 1.0)]
    [row] = compare(trace, [PLAIN, *drafted])
    assert row.assumed_share == pytest.approx(1.5 / 4.5)
    assert (row.replayed.plain_share, row.recorded.plain_share) == (0.25, 1.0)
    assert row.replayed.rows == pytest.approx((1 + 3 * 4) / 4)
    assert row.replayed.layers == pytest.approx(1.5)
    [row] = compare(trace, [PLAIN] * 4)
    assert row.assumed_share == 0.0


def test_what_is_not_known_is_null_in_json_and_blank_in_print(recorded, capsys):
    trace = recorded[0]._replace(steps=[plain_step(1)])
    rows = compare(trace, [PLAIN])
    assert math.isnan(rows[0].recorded.expected_length)
    found = json.loads(json.dumps(rows[0].as_dict(), allow_nan=False))
    assert found["recorded"]["expected_length"] is found["replayed"]["draft_tree_reward"] is None
    assert found["error"] == pytest.approx(1.0)
    print_summaries(rows, Console(width=80))
    out = capsys.readouterr().out
    first = next(line for line in out.splitlines() if "recorded" in line)
    assert first.split() == ["1", "1", "recorded", "0.00", "1.0", "1.00", "100%", "2", "500"]
    assert "nan" not in out


def test_one_line_for_all_batch_sizes_is_named_so(recorded, capsys):
    trace = recorded[0]._replace(steps=[plain_step(1), plain_step(8)])
    print_summaries(compare(trace, [PLAIN] * 2), Console(width=80))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "recorded" in line]
    assert [line[:2] for line in lines[:3]] == [["1", "1"], ["8", "1"], ["all", "2"]]
