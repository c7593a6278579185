"""The worker of a server without a draft model: its limits, and how its steps are counted."""

from types import SimpleNamespace

import pytest

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel
from cast_sglang.serving import worker as module
from cast_sglang.serving.drafting.copied import CopyDraftWorker
from cast_sglang.serving.draftless import DraftlessWorker
from cast_sglang.serving.step_room import Envelope
from cast_sglang.serving.worker import CastWorker
from tests.support.builders import make_profile


@pytest.fixture
def worker(monkeypatch):
    schedule = SimpleNamespace(max_running_requests=4)
    monkeypatch.setattr(module, "get_schedule", lambda: schedule)
    worker = DraftlessWorker.__new__(DraftlessWorker)
    runner = SimpleNamespace(model_config=SimpleNamespace(context_len=1024), attn_backend="backend")
    worker._target_worker = SimpleNamespace(model_runner=runner)
    worker._envelope = Envelope(7, 1, 8)
    return worker


def test_it_runs_no_pass_of_a_draft(worker):
    assert worker.draft_worker_class is CopyDraftWorker and not worker.has_draft
    assert worker.limits == Limits(4, 1024, max_verify_rows=8, max_width=0, max_extend_rows=0)
    assert [each.name for each in worker.limits.passes] == ["verify"]
    # The tables of a pair serve it as well, without those of the draft.
    costs = CostModel(make_profile(), worker.limits).step_costs(1, 128)
    assert len(costs.verify) == 8 and costs.draft.tolist() == costs.draft_extend.tolist() == [0.0]


def test_sglang_finds_the_target_where_it_asks_for_the_draft(worker):
    assert worker.last_shared_read_runner is worker.target_worker.model_runner
    assert worker.spec_v2_attn_backends == ("backend",)


def test_it_calibrates_nothing(monkeypatch):
    def init(self, *args):
        self.calibration = "of a draft"
        self._draft_worker = SimpleNamespace()

    monkeypatch.setattr(CastWorker, "__init__", init)
    worker = DraftlessWorker(None, 0, 0, None)
    assert worker.calibration is None
    assert worker._draft_worker.plain_input == worker._build_trivial_verify_input
