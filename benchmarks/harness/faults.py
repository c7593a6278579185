"""What a soak does to a server: faults, restarts, spoiled files; and what the server holds."""

import asyncio
import itertools
import os
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.servers import Server, ServerError

# Waves at either end of a server's life that are compared.
WAVES = 3
# Ends that a fault explains, of every request of its wave. A fault that names none is to be unseen
# by the others.
FAULTS: dict[str, set[str]] = {
    "none": set(),
    "sigterm": {"aborted", "broken"},
    "kill": {"broken"},
    "vanish": set(),
    "abort": set(),
    "abort all": {"aborted"},
    "pause in place": set(),
    "pause and retract": set(),
    "flush": set(),
    "same weights": set(),
    "other weights": set(),
}
# Those that end the server.
ENDS = ("sigterm", "kill")
# SGLang looks for a SIGTERM every 5 s and then serves the running requests to their end.
END_SECONDS = 60.0
# SGLang waits for the answers of all requests before it updates weights, and then counts those as
# running that ended in the step before, so that it may not flush its cache. It asks to do so again.
UPDATE_TRIES, NOT_FLUSHED = 5, "the cache was not flushed"
RETRACTED = "sglang:num_retracted_requests_total"


def schedule(waves: int) -> list[str]:
    """Return the fault of each wave: all take turns.

    Behind the first third no server ends, so that its life is long enough to see what grows.
    """
    turns = itertools.cycle(FAULTS)
    return [
        next(fault for fault in turns if number < waves / 3 or fault not in ENDS)
        for number in range(waves)
    ]


class Subject:
    """A CAST server through its lives: it is started, made to suffer, killed and started again.

    Args:
        make: makes the server of this name, which is not started.
        targets: paths of the target's weights by name; each life begins with "own".
        cache: what the servers keep; a kill leaves it half written.

    Attributes:
        life: of the server, from 1.
        weights: name of those in use.
    """

    def __init__(
        self, make: Callable[[str], Server], targets: Mapping[str, str], cache: Path
    ) -> None:
        self._make, self._targets, self._cache = make, targets, cache
        self._server: Server | None = None
        self.life, self.weights = 0, "own"
        self._retracted = 0  # requests, up to the last call of `newly_retracted`

    @property
    def server(self) -> Server:
        """The server of this life."""
        assert self._server is not None
        return self._server

    def start(self) -> None:
        """Begin a life."""
        self.life += 1
        self.weights, self._retracted = "own", 0
        self._server = self._make(f"cast-{self.life}")
        self._server.launch()
        self._server.wait_until_ready()

    def stop(self) -> None:
        """End this life, if there is one."""
        if self._server is not None:
            self._server.stop()

    def load(self, weights: str) -> None:
        """Load these weights into the running server."""
        update_weights(self.server, self._targets[weights])
        self.weights = weights

    async def suffer(self, fault: str, client: httpx.AsyncClient) -> None:
        """Let a fault of `FAULTS` happen; those of single requests are not of the server."""

        async def post(path: str, body: Mapping[str, object]) -> None:
            (await client.post(path, json=body, timeout=60.0)).raise_for_status()

        if fault == "abort all":
            await post("/abort_request", {"abort_all": True})
        elif fault.startswith("pause"):
            mode = "in_place" if fault == "pause in place" else "retract"
            await post("/pause_generation", {"mode": mode})
            await asyncio.sleep(1.0)
            await post("/continue_generation", {})
        elif fault == "flush":
            for _ in range(5):  # refused while requests run
                await client.post("/flush_cache", timeout=60.0)
                await asyncio.sleep(0.2)
        elif fault == "same weights":
            await asyncio.to_thread(self.load, self.weights)
        elif fault == "sigterm":
            os.kill(self.server.pid, signal.SIGTERM)
        elif fault == "kill":
            os.killpg(self.server.pid, signal.SIGKILL)

    def restart(self, fault: str) -> str | None:
        """See the server end, spoil its files after a kill, and start the next one.

        Returns:
            what was wrong with its end; None for nothing.
        """
        deadline, problem = time.monotonic() + END_SECONDS, None
        while problem is None:
            try:
                self.server.check()
            except ServerError:
                break
            if time.monotonic() > deadline:
                problem = f"unending: the server still runs {END_SECONDS:.0f} s after {fault}"
            time.sleep(0.2)
        self.stop()
        if fault == "kill":
            halve(self._cache)
        self.start()
        return problem

    def newly_retracted(self) -> int:
        """Return how many requests were retracted since the last call."""
        lines = httpx.get(f"{self.server.url}/metrics", timeout=30).text.splitlines()
        now = sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(RETRACTED))
        before, self._retracted = self._retracted, int(now)
        return self._retracted - before


class Holding(NamedTuple):
    """What a server's processes hold after a wave."""

    life: int  # of the server, from start to end
    memory_mb: float  # not shared with other processes
    handles: int
    threads: int


def held_by(server: Server, life: int) -> Holding:
    """Return what the processes of a server hold now."""
    main = psutil.Process(server.pid)
    processes = [main, *main.children(recursive=True)]
    memory = sum(process.memory_full_info().uss for process in processes) / 2**20
    handles = sum(process.num_fds() for process in processes)
    threads = sum(process.num_threads() for process in processes)
    return Holding(life, round(memory, 1), handles, threads)


def largest_growth(holdings: Sequence[Holding]) -> dict[str, float]:
    """Return the relative growth of what a server holds, of the server that grew most.

    The median of a life's last waves over that of its first ones; 0 for lives too short to tell.
    """
    growth = dict.fromkeys(("memory_mb", "handles", "threads"), 0.0)
    for _, group in itertools.groupby(holdings, key=lambda holding: holding.life):
        life = list(group)[1:]  # the first wave warms up
        if len(life) < 2 * WAVES:
            continue
        for name in growth:
            first = statistics.median(getattr(each, name) for each in life[:WAVES])
            last = statistics.median(getattr(each, name) for each in life[-WAVES:])
            growth[name] = max(growth[name], round(last / first - 1.0, 4))
    return growth


def changed_target(source: Path, to: Path) -> Path:
    """Write a target with other weights than the source's, small changes in all of them."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(source, to)
    torch.manual_seed(0)
    weights = {
        name: (weight.float() + 0.02 * weight.float().std() * torch.randn(weight.shape)).to(
            weight.dtype
        )
        for name, weight in load_file(source / "model.safetensors").items()
    }
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def update_weights(server: Server, path: str) -> None:
    """Load a target's weights into a server that runs.

    Raises:
        ServerError: it refuses.
    """
    for _ in range(UPDATE_TRIES):
        answer = httpx.post(
            f"{server.url}/update_weights_from_disk", json={"model_path": path}, timeout=300
        ).json()
        if answer["success"] or NOT_FLUSHED not in answer["message"]:
            break
        time.sleep(0.5)
    if not answer["success"]:
        raise ServerError(f"server {server.name} refuses {path}: {answer['message']}")


def halve(cache: Path) -> list[str]:
    """Cut what a server keeps, as a kill in the middle of a write would leave it; name the files.

    The profile in use stays, and gets a half-written neighbour.
    """
    files = sorted((cache / "calibration").glob("*.json"))
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for profile in sorted((cache / "profiles").glob("made-up.json")):
        half = profile.with_name("half-written.json")
        half.write_bytes(profile.read_bytes()[: profile.stat().st_size // 2])
        files.append(half)
    return [f"{file.parent.name}/{file.name}" for file in files]
