"""Run stages one after the other, each in a process of its own; sum up what came of them.

A stage that fails, hangs or kills its process does not stop the later ones. The summary is on disk
after every stage, so that a run that is cut off leaves what it found.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
# A stage ends with this code when it has nothing to do here, and says why in its result.
SKIP_CODE = 77
# What a stage has to stop its servers after its time is over.
GRACE_SECONDS = 15.0
MESSAGE_LINES = 6


class Stage(NamedTuple):
    """One part of a check."""

    name: str
    limit_s: float
    what: str
    needs: tuple[str, ...] = ()  # stages without whose success it is not tried


@dataclasses.dataclass
class Outcome:
    """What came of a stage."""

    name: str
    status: str
    seconds: float = 0.0
    limit_s: float = 0.0
    message: str = ""
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)


class Runner:
    """Runs stages and keeps `summary.json`, `summary.txt` and `logs.tar.gz` of a folder.

    Args:
        out: the folder; what an earlier run left there about other stages stays in the summary.
        logs: a folder for the log of each stage and whatever else stages put there.
        command: from a stage's name and the file for its result to the command that runs it.
        deadline: time.monotonic() at which everything must be over.
        facts: put at the head of the summary.
        env: the environment of the stages; None for this process's own.
    """

    def __init__(
        self,
        out: Path,
        logs: Path,
        command: Callable[[str, Path], Sequence[str]],
        deadline: float,
        facts: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._out, self._logs, self._command, self._env = out, logs, command, env
        self._deadline, self._facts = deadline, dict(facts)
        out.mkdir(parents=True, exist_ok=True)
        logs.mkdir(parents=True, exist_ok=True)
        self.outcomes = self._earlier()

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run the stages in order; return whether none of them failed."""
        for stage in stages:
            self.outcomes.pop(stage.name, None)
        for stage in stages:
            print(f"{stage.name}: {stage.what} ...", flush=True)
            outcome = self._run(stage)
            self.outcomes[stage.name] = outcome
            self._write()
            print(f"  {describe(outcome)}", flush=True)
        return all(self.outcomes[stage.name].status != FAILED for stage in stages)

    def _run(self, stage: Stage) -> Outcome:
        for need in stage.needs:
            if need in self.outcomes and self.outcomes[need].status == FAILED:
                return Outcome(stage.name, SKIPPED, message=f"needs {need}, which failed")
        limit = min(stage.limit_s, self._deadline - time.monotonic() - GRACE_SECONDS)
        if limit <= 0:
            return Outcome(stage.name, SKIPPED, message="no time was left")
        log, result = self._logs / f"{stage.name}.log", self._logs / f"{stage.name}.json"
        result.unlink(missing_ok=True)
        began = time.monotonic()
        code = run_limited(self._command(stage.name, result), log, limit, self._env)
        outcome = Outcome(stage.name, PASSED, round(time.monotonic() - began, 1), round(limit, 1))
        content: dict[str, Any] = {}
        with contextlib.suppress(OSError, json.JSONDecodeError):
            content = json.loads(result.read_text())
        outcome.numbers = content.get("numbers", {})
        outcome.message = content.get("message", "")
        if code is None:
            outcome.status, outcome.message = FAILED, f"not done after {limit:.0f} s"
        elif code == SKIP_CODE:
            outcome.status = SKIPPED
        elif code != 0:
            outcome.status = FAILED
            outcome.message = outcome.message or f"exit code {code}: {tail(log)}"
        return outcome

    def _earlier(self) -> dict[str, Outcome]:
        try:
            content = json.loads((self._out / "summary.json").read_text())
            return {entry["name"]: Outcome(**entry) for entry in content["stages"]}
        except (OSError, json.JSONDecodeError, KeyError, TypeError):
            return {}

    def _write(self) -> None:
        outcomes = list(self.outcomes.values())
        entries = [dataclasses.asdict(outcome) for outcome in outcomes]
        partial = self._out / "summary.partial"
        partial.write_text(json.dumps({**self._facts, "stages": entries}, indent=1) + "\n")
        os.replace(partial, self._out / "summary.json")
        lines = [f"{name}: {value}" for name, value in self._facts.items()]
        lines += ["", *map(describe, outcomes)]
        (self._out / "summary.txt").write_text("\n".join(lines) + "\n")
        with tarfile.open(self._out / "logs.tar.gz", "w:gz") as archive:
            archive.add(self._logs, "logs")


def run_limited(
    command: Sequence[str], log: Path, limit_s: float, env: Mapping[str, str] | None = None
) -> int | None:
    """Run a command with its output in a log; return its exit code, or None if it took too long.

    It is then asked to end, and after `GRACE_SECONDS` killed with every process it has started,
    also those in process groups of their own.
    """
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and its descendants."""
    import psutil  # here, so that --help works without it

    descendants = []
    # Asked for while it lives: after its end they are nobody's children.
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    if process.poll() is None:
        process.kill()
    process.wait()
    for descendant in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            descendant.kill()


def describe(outcome: Outcome) -> str:
    """Return an outcome as a line for people, with its numbers below."""
    line = f"{outcome.status.upper():8}{outcome.name:20}"
    if outcome.limit_s:
        line += f"{outcome.seconds:6.1f} s of {outcome.limit_s:.0f}"
    if outcome.message:
        line += f"  {outcome.message}"
    numbers = [f"    {name}: {_shown(value)}" for name, value in outcome.numbers.items()]
    return "\n".join([line.rstrip(), *numbers])


def tail(log: Path) -> str:
    """Return the last lines of a log, as one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-MESSAGE_LINES:])


def _shown(value: Any) -> str:
    """Return a number, or what holds numbers, for people; a list of records has a line for each."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(f"\n      {_shown(record)}" for record in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
