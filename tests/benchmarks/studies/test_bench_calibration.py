"""Predictions of one half of the prompts by what the other half taught."""

import pytest

from benchmarks.studies.bench_calibration import (
    Point,
    confidence,
    depth_names,
    draw,
    error_of,
    parse_args,
    predict,
)


def row(depth, nodes, drafted, calibrated, accepted):
    return {
        "first_depth": depth,
        "num_nodes": nodes,
        "drafted": drafted * nodes,
        "calibrated": calibrated * nodes,
        "accepted": accepted * nodes,
    }


LEARNED = [row(1, 100, 0.2, 0.4, 0.41), row(1, 100, 0.6, 0.8, 0.8)]
SEEN = [row(1, 30, 0.4, 0.99, 0.62), row(2, 10, 0.5, 0.99, 0.5)]


def test_what_was_seen_is_predicted_by_what_was_learned_elsewhere():
    first, second = predict(LEARNED, SEEN)
    assert first == pytest.approx(Point(1, 30, 0.4, 0.6, 0.62))
    assert second == pytest.approx(Point(2, 10, 0.5, 0.5, 0.5))  # that depth was not met


def test_error_is_the_mean_distance_by_nodes():
    points = predict(LEARNED, SEEN)
    assert error_of(points, "drafted") == pytest.approx(0.22 * 30 / 40)
    assert error_of(points, "calibrated") == pytest.approx(0.02 * 30 / 40)


def test_the_picture_is_written(tmp_path):
    draw(predict(LEARNED, SEEN), str(tmp_path / "reliability.png"))
    assert (tmp_path / "reliability.png").stat().st_size > 5000


def test_points_are_drawn_with_names_and_confidence():
    assert depth_names([1, 2, 3, 5]) == {
        1: "depth 1",
        2: "depth 2",
        3: "depth 3 to 4",
        5: "depth 5 and deeper",
    }
    assert depth_names([]) == {}
    # Wilson's interval of 8 of 10, as in any table of it.
    assert confidence(Point(1, 10, 0.5, 0.5, 0.8)) == pytest.approx((0.490, 0.943), abs=1e-3)
    low, high = confidence(Point(1, 20, 0.5, 0.5, 1.0))
    assert low < 0.9 and high == pytest.approx(1.0)


def test_a_target_without_its_draft_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--model-path", "target"])
    assert "--draft-model-path" in capsys.readouterr().err
