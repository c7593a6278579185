"""What the plugin changes in SGLang's scheduler while it serves texts of the plugin's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

__all__ = ["fed_by"]


class _Nowhere:
    """Takes what is meant for the detokenizer; nobody waits for these answers."""

    def send_output(self, *payload: Any) -> None:
        pass


@contextlib.contextmanager
def fed_by(scheduler: Scheduler, ingest: Callable[[], None]) -> Iterator[None]:
    """Let the scheduler's event loop call `ingest` for requests, and drop all answers.

    `ingest` ends the loop by `scheduler.gracefully_exit`, which is reset here.
    """
    streamer, original = scheduler.output_streamer, scheduler.ingest_requests
    kept = streamer.send_to_detokenizer, streamer.rust_server
    streamer.send_to_detokenizer, streamer.rust_server = _Nowhere(), None

    def ingest_ours(*args: Any, **kwargs: Any) -> list[Any]:
        ingest()
        return []

    scheduler.ingest_requests = ingest_ours
    try:
        yield
    finally:
        scheduler.ingest_requests = original
        streamer.send_to_detokenizer, streamer.rust_server = kept
        scheduler.gracefully_exit = False
