"""The scheduler's loop runs on requests of ours, and is its own again afterwards."""

from types import SimpleNamespace

import pytest

from cast_sglang.serving.host_patches.event_loop import fed_by


class Scheduler:
    def __init__(self):
        self.sent = []
        detokenizer = SimpleNamespace(send_output=self.sent.append)
        self.output_streamer = SimpleNamespace(send_to_detokenizer=detokenizer, rust_server="rust")
        self.gracefully_exit = False

    def ingest_requests(self):
        return ["the server's"]

    def run(self):
        """Loop as SGLang's scheduler does."""
        while not self.gracefully_exit:
            if not self.ingest_requests():
                self.output_streamer.send_to_detokenizer.send_output("an answer", None)


@pytest.mark.parametrize("fails", [False, True])
def test_requests_are_ours_and_nobody_sees_the_answers(fails):
    scheduler, calls = Scheduler(), []
    detokenizer = scheduler.output_streamer.send_to_detokenizer

    def ingest():
        calls.append(scheduler.output_streamer.rust_server)
        scheduler.gracefully_exit = len(calls) == 3
        if fails:
            raise ValueError

    try:
        with fed_by(scheduler, ingest):
            scheduler.run()
    except ValueError:
        assert fails
    assert calls == [None] if fails else [None] * 3
    assert scheduler.sent == [] and not scheduler.gracefully_exit
    assert scheduler.ingest_requests() == ["the server's"]
    assert scheduler.output_streamer.send_to_detokenizer is detokenizer
    assert scheduler.output_streamer.rust_server == "rust"
