"""Counters: sums, means, the log line and what Prometheus sees."""

import json
import math
import re
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry

from cast_sglang.costs.correction import Residuals
from cast_sglang.costs.limits import Limits
from cast_sglang.serving.stats import StepStats


def record_two_steps(stats):
    stats.record_step(
        batch_size=2, num_layers=3, num_draft_nodes=10, num_verify_rows=5, policy_us=100.0
    )
    stats.record_step(batch_size=4, num_layers=5, num_draft_nodes=20, num_verify_rows=8)
    stats.record_accepts([1, 4])
    stats.record_accepts([2, 2, 3, 6])
    stats.record_time(predicted_us=900.0, measured_us=1000.0)
    stats.record_time(predicted_us=2100.0, measured_us=2000.0)


def test_snapshot():
    stats = StepStats()
    record_two_steps(stats)
    snapshot = stats.snapshot()
    assert snapshot["steps"] == 2 and snapshot["requests"] == 6
    assert snapshot["layers_grown"] == 8
    assert snapshot["nodes_drafted"] == 2 * 10 + 4 * 20
    assert snapshot["nodes_verified"] == 2 * 5 + 4 * 8
    assert snapshot["drafts_accepted"] == 0 + 3 + 1 + 1 + 2 + 5
    assert snapshot["mean_accept_len"] == pytest.approx((1 + 4 + 2 + 2 + 3 + 6) / 6)
    assert snapshot["accept_rate"] == pytest.approx(12 / (42 - 6))
    assert snapshot["mean_layers"] == 4.0 and snapshot["mean_verify_rows"] == 7.0
    assert snapshot["predicted_to_measured"] == 1.0
    assert snapshot["mean_measured_us"] == 1500.0 and snapshot["mean_policy_us"] == 50.0
    assert snapshot["accept_lens"] == {"1": 1, "2": 2, "3": 1, "4": 1, "6": 1}


def test_empty_snapshot_is_json():
    snapshot = json.loads(json.dumps(StepStats().snapshot(), allow_nan=False))
    assert snapshot["steps"] == 0 and snapshot["mean_accept_len"] is None


def test_log_line_covers_the_steps_since_the_last():
    stats = StepStats()
    record_two_steps(stats)
    line = stats.log_line()
    assert "\n" not in line and line.startswith("CAST: 2 steps, batch 3.0, layers 4.00")
    assert "accept len 3.00" in line and "step 1.50 ms (predicted 1.50)" in line
    stats.record_step(batch_size=1, num_layers=1, num_draft_nodes=1, num_verify_rows=2)
    assert stats.log_line().startswith("CAST: 1 steps, batch 1.0, layers 1.00")
    assert stats.log_line().startswith("CAST: 0 steps")


def test_metrics():
    registry = CollectorRegistry()
    labels = {"model_name": "m", "tp_rank": "0"}
    stats = StepStats()
    stats.export(labels, registry)
    record_two_steps(stats)
    stats.record_step(batch_size=3, num_layers=0, num_draft_nodes=0, num_verify_rows=1)

    def value(name, **more):
        return registry.get_sample_value(name, {**labels, **more})

    snapshot = stats.snapshot()
    assert value("cast:steps_total") == 3 and value("cast:plain_steps_total") == 1
    assert value("cast:request_steps_total") == snapshot["requests"] == 9
    for name in ("layers_grown", "nodes_drafted", "nodes_verified", "drafts_accepted"):
        assert value(f"cast:{name}_total") == snapshot[name]
    assert value("cast:step_predicted_seconds_total") == pytest.approx(0.003)
    assert value("cast:step_measured_seconds_total") == pytest.approx(0.003)
    assert value("cast:policy_seconds_total") == pytest.approx(1e-4)
    assert value("cast:layers") == 0 and value("cast:verify_rows") == 1
    assert value("cast:accept_lens_total", accept_len="2") == 2


def test_acceptance_is_unknown_until_it_is_measured():
    registry = CollectorRegistry()
    stats = StepStats()
    stats.record_acceptance(0.5)  # without metrics
    stats.export({"model_name": "m"}, registry)

    def value():
        return registry.get_sample_value("cast:acceptance_ratio", {"model_name": "m"})

    assert math.isnan(value()) and stats.snapshot()["acceptance_ratio"] == 0.5
    stats.record_acceptance(0.25)
    assert value() == stats.snapshot()["acceptance_ratio"] == 0.25


def test_names_follow_the_rules_of_prometheus():
    """Counters end in _total, a unit is a base unit and stands before that."""
    registry = CollectorRegistry()
    StepStats().export({"model_name": "m"}, registry)
    metrics = list(registry.collect())
    assert len(metrics) > 10
    for metric in metrics:
        name = metric.name
        assert re.fullmatch(r"cast:[a-z]+(_[a-z]+)*", name) and metric.documentation.endswith(".")
        words = name.split("_")
        assert not {"us", "ms", "microseconds", "mb"} & set(words), name
        assert "seconds" not in words[:-1] and "total" not in words  # the client appends _total


def test_ratios_of_costs_are_one_series_for_each_kind_of_pass():
    registry = CollectorRegistry()
    residuals = Residuals(Limits(max_batch_size=48, max_context=9, max_verify_rows=32, max_width=8))
    for batch_size in range(1, 49):
        for rows in range(1, 33):
            residuals.record("verify", batch_size, rows, 2.0)
            residuals.record("draft", batch_size, min(rows, 8), 2.0)
    stats = StepStats()
    stats.record_residuals(residuals)  # without metrics, without effect
    stats.export({"model_name": "m"}, registry)
    stats.record_residuals(residuals)
    [metric] = [each for each in registry.collect() if each.name == "cast:cost_ratio"]
    found = {sample.labels["operation"]: sample.value for sample in metric.samples}
    assert found.keys() == {"verify", "draft"} and len(list(residuals)) > 50
    for operation, ratio in found.items():
        rows = [row for row in residuals if row.operation == operation]
        logs = sum(row.samples * math.log(row.ratio) for row in rows)
        assert math.log(ratio) == pytest.approx(logs / sum(row.samples for row in rows))


def test_multiprocess_directory_set_after_import_is_honoured(tmp_path):
    script = """
import os, sys
from cast_sglang.serving.stats import StepStats
assert "prometheus_client" not in sys.modules
stats = StepStats()
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
stats.export({"tp_rank": 0})
stats.record_step(batch_size=2, num_layers=3, num_draft_nodes=10, num_verify_rows=5)
stats.record_accepts([1, 2])
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 'cast:steps_total{tp_rank="0"} 1.0' in done.stdout
    assert 'cast:verify_rows{tp_rank="0"} 5.0' in done.stdout
    assert 'cast:accept_lens_total{accept_len="2",tp_rank="0"} 1.0' in done.stdout
