"""What a server learns is there at the next start, as far as it fits."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from cast_sglang.config import CastConfig
from cast_sglang.copying.chances import Chances
from cast_sglang.costs.correction import Residuals
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.profiles import FoundProfile
from cast_sglang.costs.schema import ServingRecord
from cast_sglang.errors import ConfigError
from cast_sglang.policy.acceptance import GREEDY
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.policy.fixed import EaglePolicy
from cast_sglang.policy.outcomes import VerifiedNodes
from cast_sglang.serving import learned as module
from cast_sglang.serving.calibration import Calibration
from cast_sglang.serving.learned import Learned, LearnedFile
from tests.support.builders import make_identity, make_profile
from tests.support.policies import costs

LIMITS = Limits(max_batch_size=4, max_context=1024, max_verify_rows=8, max_width=4)
NOT_LEARNED = {"format": 1, "pair": ["a" * 64, "b" * 64]}


@pytest.fixture(autouse=True)
def parallel(monkeypatch):
    state = SimpleNamespace(tp_rank=0, tp_size=1)
    monkeypatch.setattr(module, "get_parallel", lambda: state)
    return state


class Server:
    """What one server learns with, and its file."""

    def __init__(self, path=None, profile=None, calibrates=True, policy=None, copies=True):
        profile = make_profile() if profile is None else profile
        self.policy = AutoPolicy((2, 4, 8), 4) if policy is None else policy
        self.calibration = Calibration() if calibrates else None
        found = FoundProfile(profile, Path("some.json"), [])
        self.costs = SimpleNamespace(profile=found, residuals=Residuals(LIMITS))
        file = None if path is None else LearnedFile(path, make_identity())
        self.chances = Chances()
        copied = SimpleNamespace(chances=self.chances) if copies else None
        self.learned = Learned(file, self.policy, self.calibration, self.costs, copied)

    def serve(self):
        """Learn something of each kind."""
        for _ in range(8):
            self.policy.speculate(2, costs(verify=[1.0] * 8))
            self.policy.observe(2, 2.0, 1.5)
            self.costs.residuals.record("verify", 2, 4, 1.6)
            nodes = VerifiedNodes(
                shares=np.full((1, 4), 0.5),
                depths=np.ones((1, 4), dtype=np.int64),
                is_tried=np.ones((1, 4), dtype=bool),
                accepted=np.ones((1, 4), dtype=bool),
            )
            self.calibration.acceptance.update(nodes, np.array([GREEDY]))
            self.chances.update(np.array([3, 3, 40]), np.array([True, False, True]))
        self.costs.residuals.refresh()

    def scale(self):
        return float(self.costs.residuals.scales("verify", 2, 4)[-1])

    def curve(self):
        return self.calibration.acceptance.curves()


def test_what_was_learned_outlives_the_server(tmp_path):
    first, second = Server(tmp_path / "new" / "pair.json"), Server(tmp_path / "new" / "pair.json")
    assert first.learned.start() == {}
    first.serve()
    first.learned.save()
    start = second.learned.start()
    np.testing.assert_array_equal(second.curve(), first.curve())
    np.testing.assert_array_equal(second.chances.table(), first.chances.table())
    assert (second.chances.table() != Chances().table()).any()
    assert second.policy.price(2) == pytest.approx(first.policy.price(2), rel=1e-6)
    assert second.policy.price(2) != pytest.approx(AutoPolicy((2,), 1).price(2), rel=0.1)
    assert second.scale() == pytest.approx(first.scale(), rel=1e-3) and first.scale() > 1.1
    # What a trace needs so that a replay starts alike.
    assert set(start) == {"prices", "corrections"}


def test_a_server_that_copies_nothing_keeps_what_was_learned_of_copies(tmp_path):
    first, second, third = (
        Server(tmp_path / "pair.json", copies=copies) for copies in (True, False, True)
    )
    first.serve()
    first.learned.save()
    second.learned.start()
    second.learned.save()
    third.learned.start()
    np.testing.assert_array_equal(third.chances.table(), first.chances.table())


def test_the_file_is_written_soon_and_then_rarely(tmp_path):
    path, written = tmp_path / "pair.json", []
    server = Server(path)
    for step in range(1, 4200):
        server.learned.save_when_due(step)
        if path.exists():
            written.append(step)
            path.unlink()
    assert written == [64, 128, 256, 512, 1024, 2048, 3072, 4096]


def test_only_rank_0_writes(tmp_path, parallel):
    path = tmp_path / "pair.json"
    server = Server(path)
    parallel.tp_rank = 1
    server.serve()
    server.learned.save()
    assert not path.exists()


def test_every_rank_starts_from_what_rank_0_has(tmp_path, parallel, monkeypatch):
    path = tmp_path / "pair.json"
    first = Server(path)
    first.serve()
    first.learned.save()
    sent = []
    group = SimpleNamespace(
        broadcast_object=lambda own, src: sent[-1] if parallel.tp_rank else sent.append(own) or own
    )
    monkeypatch.setattr(module, "get_tp_group", lambda: group)
    parallel.tp_size = 2
    Server(path).learned.start()
    parallel.tp_rank = 1
    follower = Server()  # on another host, without the file
    follower.learned.start()
    assert follower.policy.price(2) == pytest.approx(first.policy.price(2), rel=1e-6)
    np.testing.assert_array_equal(follower.curve(), first.curve())


def recorded(server, **changes):
    """Return a profile with what this server learned in a short run, and maybe other tables."""
    record = ServingRecord(
        steps=8,
        median_ratio=1.6,
        median_error=0.4,
        p95_error=0.5,
        learned=server.learned.content(),
    )
    return msgspec.structs.replace(make_profile(**changes), serving=record)


def test_a_first_start_goes_on_from_the_short_run_of_its_profile():
    run = Server()
    run.serve()
    server = Server(profile=recorded(run))
    server.learned.start()
    assert server.policy.price(2) == pytest.approx(run.policy.price(2), rel=1e-6)
    np.testing.assert_array_equal(server.curve(), run.curve())
    assert server.scale() == pytest.approx(run.scale(), rel=1e-3)


def test_corrections_of_other_tables_are_left_out(tmp_path):
    served, run = Server(tmp_path / "pair.json"), Server()
    for server in (served, run):
        server.serve()
    served.serve()  # more than the run
    served.learned.save()
    profile = recorded(run)
    slower = msgspec.structs.replace(
        profile, step_overhead_us=[2.0] * len(profile.target.batch_sizes)
    )
    server = Server(tmp_path / "pair.json", profile=slower)
    start = server.learned.start()
    assert server.scale() == 1.0 and "corrections" not in start
    # What other trees take is measured anew.
    assert [row["turn"] for row in start["prices"]] == [0]
    assert server.policy.price(2) == pytest.approx(served.policy.price(2), rel=1e-6)
    # Text and prices are those of the server's own requests.
    np.testing.assert_array_equal(server.curve(), served.curve())
    # The run of the new tables knows their corrections.
    again = Server(tmp_path / "pair.json", profile=profile)
    assert [row["turn"] for row in again.learned.start()["prices"]] == [16]
    assert again.scale() == pytest.approx(served.scale(), rel=1e-3)


def test_a_new_profile_brings_corrections_of_its_own(tmp_path):
    old = Server(tmp_path / "pair.json")
    old.serve()
    old.learned.save()
    run = Server(profile=make_profile(step_overhead_us=[9.0, 9.0]))
    run.costs.residuals.record("verify", 2, 4, 0.5)
    run.costs.residuals.refresh()
    server = Server(tmp_path / "pair.json", profile=recorded(run, step_overhead_us=[9.0, 9.0]))
    server.learned.start()
    assert server.scale() == pytest.approx(run.scale(), rel=1e-3) and run.scale() < 1.0
    np.testing.assert_array_equal(server.curve(), old.curve())


def test_a_server_that_learns_less_keeps_the_rest(tmp_path):
    path = tmp_path / "pair.json"
    first = Server(path)
    first.serve()
    first.learned.save()
    eager = Server(path, calibrates=False, policy=EaglePolicy(8))
    eager.learned.start()
    eager.learned.save()
    third = Server(path)
    third.learned.start()
    np.testing.assert_array_equal(third.curve(), first.curve())
    assert third.policy.price(2) == pytest.approx(first.policy.price(2), rel=1e-6)


def test_a_profile_with_a_damaged_record_serves(caplog):
    run = Server()
    run.serve()
    profile = recorded(run)
    profile.serving.learned["prices"] = [{"batch_sizes": "many"}]
    server = Server(profile=profile)
    assert server.learned.start() == {}
    assert "serving.learned: prices" in caplog.text
    assert server.scale() == 1.0


BAD_FILES = [
    ("", "Expecting value"),
    ("[1]", "another pair"),
    ('{"pair": ["x", "y"]}', "another pair"),
    ('{"format": 2, "pair": PAIR}', "not of format 1"),
    ('{"format": 1, "pair": PAIR, "acceptance": {}}', "not an acceptance state"),
    ('{"format": 1, "pair": PAIR, "prices": [{}]}', "prices: a row is damaged"),
    ('{"format": 1, "pair": PAIR, "prices": 3}', "prices"),
    ('{"format": 1, "pair": PAIR, "corrections": {"pass": 1}}', "corrections"),
    ('{"format": 1, "pair": PAIR, "corrections": []}', "corrections"),
    ('{"format": 1, "pair": PAIR, "copies": {"copies": 1}}', "copies: a table is missing"),
    ("[" * 100_000, "recursion"),
]


@pytest.mark.parametrize(("content", "reason"), BAD_FILES)
def test_a_bad_file_that_was_named_stops_the_launch(tmp_path, content, reason):
    path = tmp_path / "pair.json"
    path.write_text(content.replace("PAIR", json.dumps(NOT_LEARNED["pair"])))
    with pytest.raises(ConfigError, match=reason) as caught:
        LearnedFile(path, make_identity()).load()
    assert f"--cast-calibration-file {path}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "reason"), BAD_FILES)
def test_a_bad_file_of_the_cache_is_left_out(tmp_path, content, reason, caplog):
    path = tmp_path / "pair.json"
    path.write_text(content.replace("PAIR", json.dumps(NOT_LEARNED["pair"])))
    with caplog.at_level(logging.WARNING):
        assert LearnedFile(path, make_identity(), is_named=False).load() == {}
    assert "starting without it" in caplog.text


def test_a_file_of_an_earlier_release_is_not_used_and_replaced(tmp_path, caplog):
    path = tmp_path / "pair.json"
    path.write_text(json.dumps({"pair": NOT_LEARNED["pair"], "acceptance": {"format": 2}}))
    file = LearnedFile(path, make_identity())
    assert file.load() == {}
    assert f"{path}: of an earlier release" in caplog.text
    file.save({})
    assert file.load() == NOT_LEARNED


def test_another_pairs_file_is_refused(tmp_path):
    identity = make_identity()
    other = msgspec.structs.replace(
        identity, draft=msgspec.structs.replace(identity.draft, config_hash="c" * 64)
    )
    file = LearnedFile(tmp_path / "pair.json", identity)
    file.save({})
    assert file.load() == NOT_LEARNED
    with pytest.raises(ConfigError, match="another pair"):
        LearnedFile(tmp_path / "pair.json", other).load()


def test_a_server_that_cannot_write_says_so_once_and_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    file = LearnedFile(tmp_path / "file" / "pair.json", make_identity())
    for _ in range(3):
        file.save({})
    [record] = caplog.records
    assert "--cast-calibration-file" in record.getMessage()


def test_the_file_is_in_the_users_cache_unless_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    identity = make_identity()
    LearnedFile.of(CastConfig(), identity).save({})
    [path] = (tmp_path / "cast_sglang" / "calibration").iterdir()
    assert path.name.startswith("nvidia-h200__target-8b__draft__tp1__bfloat16__")
    LearnedFile.of(CastConfig(calibration_file=str(tmp_path / "a.json")), identity).save({})
    assert (tmp_path / "a.json").exists()
    assert LearnedFile.of(CastConfig(calibration_file="none"), identity) is None
    assert LearnedFile.of(CastConfig(policy="eagle"), identity) is None
