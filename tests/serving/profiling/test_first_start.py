"""A start without a profile: which tables a server gets, on every rank, and what it says."""

import logging
from types import SimpleNamespace

import msgspec
import pytest
import torch

from cast_sglang.config import CastConfig
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.profiles import find_profile, user_profile_path
from cast_sglang.costs.schema import ServingRecord
from cast_sglang.profiling.roofline import DeviceRates
from cast_sglang.serving.profiling import first_start
from cast_sglang.serving.profiling.first_start import provide_profile
from tests.support.builders import make_identity, make_profile
from tests.support.meters import BrokenMeter, FlatMeter

RECORD = ServingRecord(steps=9, median_ratio=1.5, median_error=0.3, p95_error=0.4)


class Runner:
    """A model of two layers beside its embedding, and its cache."""

    dtype = torch.bfloat16

    def __init__(self, is_tied=False):
        self.model = torch.nn.ModuleDict(
            {
                "embed_tokens": torch.nn.Embedding(50, 4),
                "layer": torch.nn.Linear(4, 8, bias=False),
                "lm_head": torch.nn.Linear(4, 50, bias=False),
            }
        )
        if is_tied:
            del self.model["lm_head"]
        config = SimpleNamespace(tie_word_embeddings=True) if is_tied else SimpleNamespace()
        self.model_config = SimpleNamespace(hf_config=config)
        self.token_to_kv_pool = SimpleNamespace(size=10, get_kv_size_bytes=lambda: (120.0, 40.0))


class Worker:
    def __init__(self, profile):
        self.config, self.device, self.server_args = CastConfig(profile=profile), "cpu", None
        self.limits = Limits(max_batch_size=2, max_context=130, max_verify_rows=2, max_width=2)
        self.token_to_kv_pool_allocator = SimpleNamespace(size=1000)
        self.target_worker = SimpleNamespace(model_runner=Runner())
        self.draft_worker = SimpleNamespace(draft_runners=[Runner(is_tied=True)])
        self.used = []

    def use_profile(self, found):
        self.used.append(found)


class Group:
    """A rank of a group of one or two; rank 1 gets what rank 0 has sent."""

    def __init__(self, rank, world_size, sent=None):
        self.rank_in_group, self.world_size, self.sent = rank, world_size, sent

    def broadcast_object(self, content, src):
        if self.rank_in_group == src:
            self.sent = content
        return self.sent


@pytest.fixture(autouse=True)
def host(monkeypatch, tmp_path):
    """A host of a made-up device, and a cache directory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    identity = make_identity()
    monkeypatch.setattr(first_start, "resolving_view", lambda args: args)
    monkeypatch.setattr(first_start, "host_identity", lambda args: identity)
    monkeypatch.setattr(first_start, "profile_command", lambda args, identity: "COMMAND")
    rates = DeviceRates(bytes_per_second=1e6, flops_per_second=1e9)
    monkeypatch.setattr(first_start, "measure_rates", lambda device, dtype: rates)
    return identity


def start(monkeypatch, profile="auto", meter=None, group=None):
    """Start a rank; return its worker and its group."""
    scheduler = SimpleNamespace(draft_worker=Worker(profile), tp_group=group or Group(0, 1))
    meter = meter or FlatMeter()

    def measure(scheduler, run):
        return run(meter) if scheduler.tp_group.rank_in_group == 0 else None

    def complete(scheduler, found):
        scheduler.completed = True
        profile = msgspec.structs.replace(found.profile, serving=RECORD)
        found = found._replace(profile=profile)
        scheduler.draft_worker.use_profile(found)
        return found

    monkeypatch.setattr(first_start, "measure_on_all_ranks", measure)
    monkeypatch.setattr(first_start, "complete_profile", complete)
    provide_profile(scheduler)
    assert hasattr(scheduler, "completed") == (profile == "auto")
    [found] = scheduler.draft_worker.used
    return found, scheduler.tp_group


def test_a_measured_profile_is_found_by_the_next_start(monkeypatch, host, caplog):
    with caplog.at_level(logging.INFO):
        found, _ = start(monkeypatch)
    assert not found.profile.provenance.estimated and found.path == user_profile_path(host)
    assert found.profile.target.time_us[0][0][0] == pytest.approx(1000.0)
    again = find_profile(host)
    assert again.path == found.path and again.warnings == []
    assert again.profile.target == found.profile.target and again.profile.serving == RECORD
    assert found.command == "COMMAND"
    begins, ends = [record.getMessage() for record in caplog.records]
    assert begins == "CAST: measuring a quick cost profile, for 60 s at most"
    assert ends.startswith(f"CAST: decides by {found.path}, measured on NVIDIA H200 on ")
    assert ends.endswith("; for better tables run: COMMAND")


def test_an_estimate_is_not_kept_and_says_what_it_is(monkeypatch, host, caplog):
    found, _ = start(monkeypatch, profile="estimate", meter=BrokenMeter())
    assert found.profile.provenance.estimated and not found.path.exists()
    assert "ESTIMATED" in caplog.text and "better tables run: COMMAND" in caplog.text
    target, draft = found.profile.target, found.profile.draft
    assert target.token_counts[-1] == 2 and draft.token_counts[-1] == 2
    # Reading the weights bounds the passes: 4 x 8 and 4 x 50 numbers; of the draft its embedding.
    for table, num_weights in ((target, 4 * 8 + 4 * 50), (draft, 4 * 8 + 50 * 4)):
        read = num_weights * 4 + (table.contexts[0] + 1) * 16
        assert table.time_us[0][0][0] == pytest.approx(read)


def test_where_measuring_fails_the_server_starts_with_an_estimate(monkeypatch, caplog):
    found, _ = start(monkeypatch, meter=BrokenMeter())
    assert found.profile.provenance.estimated and not found.path.exists()
    assert "measuring failed" in caplog.text and "ESTIMATED" in caplog.text


def test_a_profile_that_cannot_be_kept_is_used_all_the_same(monkeypatch, tmp_path, caplog):
    (tmp_path / "cast_sglang").write_text("a file where the directory should be")
    with caplog.at_level(logging.INFO):
        found, _ = start(monkeypatch)
    assert not found.profile.provenance.estimated
    assert "the next start will measure again" in caplog.text
    assert "decides by what was measured in" in caplog.text


@pytest.mark.parametrize("profile", ["auto", "estimate"])
def test_all_ranks_decide_by_the_tables_of_rank_0(monkeypatch, profile, caplog):
    first, group = start(monkeypatch, profile, group=Group(0, 2))
    monkeypatch.setattr(first_start, "measure_rates", None)  # another rank's would differ
    caplog.clear()
    with caplog.at_level(logging.INFO):
        second, _ = start(monkeypatch, profile, group=Group(1, 2, group.sent))
    assert not caplog.records  # one rank speaks for all
    assert second.profile == first.profile and second.path == first.path


def test_tables_survive_the_way_to_the_other_ranks(monkeypatch):
    profile = make_profile()
    monkeypatch.setattr(first_start, "_measured", lambda meter, identity: profile)
    found, group = start(monkeypatch, group=Group(0, 2))
    assert found.profile == msgspec.structs.replace(profile, serving=RECORD)
    assert msgspec.json.decode(group.sent)["step_overhead_us"]


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_pass_reads_an_embedding_only_where_it_is_the_output_layer(is_tied):
    runner = Runner(is_tied)
    size = first_start._size(runner)
    assert size.num_weights == 4 * 8 + 4 * 50 and size.weight_bytes == 4 * size.num_weights
    assert size.kv_bytes_per_token == 16  # keys and values
    runner.token_to_kv_pool.get_kv_size_bytes = lambda: 250.0
    assert first_start._size(runner).kv_bytes_per_token == 25
