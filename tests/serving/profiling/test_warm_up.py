"""Warm-up: no step meets a shape that SGLang's kernels were not compiled for at the start."""

from types import SimpleNamespace

import pytest

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.serving.drafting.backlog import Backlog
from cast_sglang.serving.profiling import warm_up as module
from cast_sglang.serving.profiling.warm_up import warm_up

DEPTH, ROWS, EXTEND = 3, 8, 4


class Meter:
    """Notes the shapes of the passes."""

    def __init__(self, worker):
        self.verified, self.extended, self.is_closed = set(), set(), False
        worker.meter = self

    def verify_path(self, batch_size, context, rows, depth):
        assert context >= 1
        self.verified.add((batch_size, rows, depth))

    def draft_extend(self, batch_size, context, rows):
        self.extended.add((batch_size, rows))

    def close(self):
        self.is_closed = True


def worker_of(verify, extend, max_width=8):
    def graphs(tiers):
        return None if tiers is None else SimpleNamespace(sizes=GraphSizes(tiers))

    return SimpleNamespace(
        limits=SimpleNamespace(max_batch_size=6, max_extend_rows=EXTEND, max_width=max_width),
        speculative_num_steps=DEPTH,
        verify_graphs=graphs(verify),
        draft_worker=SimpleNamespace(extend_graphs=graphs(extend)),
        tools=SimpleNamespace(backlog=Backlog(2, ROWS), verify_sizes=(2, 5, ROWS)),
    )


@pytest.fixture
def warmed(monkeypatch):
    monkeypatch.setattr(module, "EngineMeter", Meter)

    def run(verify, extend, **limits):
        worker = worker_of(verify, extend, **limits)
        warm_up(worker)
        assert worker.meter.is_closed
        return worker.meter

    return run


def test_a_chain_of_copies_is_as_deep_as_its_rows(warmed):
    meter = warmed({1: (1, 2, 8), 4: (1, 4, 8)}, None, max_width=0)
    seen = {(rows, depth) for batch, rows, depth in meter.verified if batch == 1}
    # Five rows are of six requests, which run without a graph.
    assert seen == {(rows, min(DEPTH, rows - 1)) for rows in (1, 2, 4, 5, 8)}
    assert not meter.extended


def test_every_captured_size_runs_at_every_depth_and_every_power_of_two(warmed):
    meter = warmed({1: (1, 2, 8), 4: (1, 4, 8)}, {1: (2, 3), 4: (2, 3, 8)})
    at_one = {(rows, depth) for batch, rows, depth in meter.verified if batch == 1}
    # A path is no longer than the tree is deep, nor than its nodes. Sizes that are kept for other
    # batches alone, or run without a graph, are run at all their depths here.
    paths = {(rows, depth) for rows in (2, 4, 5, 8) for depth in range(1, DEPTH + 1)}
    assert at_one == {(1, 0), *(paths - {(2, 2), (2, 3)})}
    # Six requests have no graph, and are held by another power of two than four.
    assert {(b, rows) for b, rows, _ in meter.verified if b > 1} == {
        *((b, rows) for b in (2, 4) for rows in (1, 4, 8)),
        *((6, rows) for rows in (1, 2, 5, 8)),
    }
    # What the draft catches up on may be as much as the backlog keeps.
    assert meter.extended == {
        *((1, rows) for rows in (2, 3, 8)),
        *((b, rows) for b in (2, 4) for rows in (2, 3, 8)),
        *((6, rows) for rows in (2, 3, EXTEND, ROWS)),
    }


def test_without_graphs_the_allowed_sizes_run(warmed):
    meter = warmed(None, None)
    assert {rows for _, rows, _ in meter.verified} == {1, 2, 5, 8}
    assert {rows for _, rows in meter.extended} == {2, 3, EXTEND}
    beyond = warmed({1: (1, 8)}, {1: (2,)})
    assert {rows for b, rows, _ in beyond.verified if b == 4} == {1, 2, 5, 8}
    assert {rows for b, rows in beyond.extended if b == 4} == {2, 3, EXTEND, ROWS}


@pytest.mark.parametrize(("device", "warms"), [("cuda", True), ("cpu", False)])
def test_a_server_on_a_device_is_warm_before_it_measures(device, warms, monkeypatch):
    from cast_sglang.serving import plugin
    from cast_sglang.serving.profiling import first_start

    log = []
    monkeypatch.setattr(module, "warm_up", lambda worker: log.append("warm"))
    monkeypatch.setattr(first_start, "provide_profile", lambda scheduler: log.append("measure"))
    monkeypatch.setattr(plugin, "get_parallel", lambda: SimpleNamespace(tp_rank=1))
    worker = SimpleNamespace(device=device, lacks_profile=True, cast_stats=None)
    context = SimpleNamespace(current_scheduler_metrics_enabled=False)
    scheduler = SimpleNamespace(draft_worker=worker, metrics_collector_context=context)
    plugin._make_ready(None, scheduler)
    assert log == ["warm"] * warms + ["measure"]
