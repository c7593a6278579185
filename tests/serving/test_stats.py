"""Counters: sums, means, the log line and what Prometheus sees."""

import json
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry

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
    stats = StepStats(labels, registry)
    assert list(registry.collect()) == []
    record_two_steps(stats)

    def value(name, **more):
        return registry.get_sample_value(name, {**labels, **more})

    snapshot = stats.snapshot()
    assert value("cast:steps_total") == 2
    for name in ("layers_grown", "nodes_drafted", "nodes_verified", "drafts_accepted"):
        assert value(f"cast:{name}_total") == snapshot[name]
    assert value("cast:step_seconds_predicted_total") == pytest.approx(0.003)
    assert value("cast:step_seconds_measured_total") == pytest.approx(0.003)
    assert value("cast:policy_seconds_total") == pytest.approx(1e-4)
    assert value("cast:layers") == 5 and value("cast:verify_rows") == 8
    assert value("cast:accept_lens_total", accept_len="2") == 2


def test_no_labels_no_metrics():
    registry = CollectorRegistry()
    record_two_steps(StepStats(None, registry))
    assert list(registry.collect()) == []


def test_multiprocess_directory_set_after_import_is_honoured(tmp_path):
    script = """
import os, sys
from cast_sglang.serving.stats import StepStats
assert "prometheus_client" not in sys.modules
stats = StepStats({"tp_rank": "0"})
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
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
