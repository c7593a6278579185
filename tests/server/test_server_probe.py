"""`cast-sglang doctor --probe` with real models: a draft that fits, and drafts that do not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.pairs import Pair
from benchmarks.harness.servers import CPU_PLATFORM, Server
from cast_sglang.serving.launch.diagnosis import Check
from cast_sglang.serving.launch.probe import RunningServer, probe
from tests.support.launches import probe as probe_in_process
from tests.support.preloaded import run

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

LIMITS = ("--max-running-requests", "16", "--context-length", "1088", "--dtype", "float32")

Weights = dict[str, torch.Tensor]


def test_a_server_that_runs_is_probed(cast: Server):
    checks = {check.name: check for check in probe(RunningServer(cast.url))}
    assert {check.status for check in checks.values()} == {"ok"}, checks
    assert checks["probe"].found.startswith("10 prompts of ")
    assert "depth 1: " in checks["accept by depth"].found
    assert "1.00x at 1" not in checks["speed-up"].found


def permute_map(weights: Weights, config: dict[str, Any]) -> None:
    """Let the head's token i be another one of the target's."""
    size = len(weights["lm_head.weight"])
    weights["d2t"] = torch.arange(size).roll(7) - torch.arange(size)


def lose_lm_head(weights: Weights, config: dict[str, Any]) -> None:
    del weights["lm_head.weight"]


@pytest.fixture
def probed(pair: Pair, made_up_profile: Path, tmp_path: Path) -> Callable[..., dict[str, Check]]:
    """Return a function that starts an engine with a draft that was changed, and probes it."""

    def start(change: Callable[[Weights, dict[str, Any]], None] | None) -> dict[str, Check]:
        draft = tmp_path / "draft"
        shutil.copytree(pair.draft, draft)
        if change is not None:
            weights = load_file(draft / "model.safetensors")
            config = json.loads((draft / "config.json").read_text())
            change(weights, config)
            save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
            (draft / "config.json").write_text(json.dumps(config))
        argv = ["--model-path", pair.target, "--speculative-draft-model-path", str(draft), *LIMITS]
        argv += ["--cast-profile", str(made_up_profile), "--cast-residuals", "off"]
        env = {**CPU_PLATFORM, "CAST_ALLOW_FOREIGN_PROFILE": "1", "CAST_CALIBRATION_FILE": "none"}
        code, out = run(probe_in_process, argv, env, tmp_path / "probe.log")
        content = json.loads(next(line for line in out.splitlines() if line.startswith('{"ok"')))
        assert content["ok"] == (code == 0)
        return {check["name"]: Check(**check) for check in content["checks"]}

    return start


@pytest.mark.extended
def test_an_engine_is_started_and_a_draft_that_fits_is_said_to(probed):
    checks = probed(None)
    assert checks["head fits"].status == checks["draft head"].status == "ok", checks
    assert checks["accept by depth"].status == checks["speed-up"].status == "ok"
    assert not [check for check in checks.values() if check.status in ("fail", "skip")], checks


@pytest.mark.extended
@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        (permute_map, "warn", "may have been permuted"),
        (lose_lm_head, "fail", "lm_head.weight is missing"),
    ],
)
def test_a_draft_that_does_not_fit_is_named(probed, change, status, says):
    checks = probed(change)
    assert checks["head fits"].status == "fail", checks
    assert checks["draft head"].status == status and says in checks["draft head"].found
