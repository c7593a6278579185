"""Traces of a server that copies: replayed as it was, without copies, and with whole drafts."""

import json

import msgspec
import numpy as np
import pytest

from cast_sglang.cli import main
from cast_sglang.costs.profiles import save_profile
from cast_sglang.errors import TraceError
from cast_sglang.report.tree_svg import COPIED, legend_svg, tree_svg
from cast_sglang.trace.candidates import RecordedTrees, recorded_reward
from cast_sglang.trace.copied import whole_drafts
from cast_sglang.trace.file import read_trace
from cast_sglang.trace.records import candidate_parents, packed, unpacked
from cast_sglang.trace.replay import Replay, make_policy
from tests.support.copying_server import (
    COPY_DEPTH,
    LAYERS,
    ROWS,
    TOPK,
    VOCAB,
    CopyingServer,
    repeating_text,
)
from tests.support.traces import make_tables, write

STEPS = 60


@pytest.fixture(scope="module")
def profile():
    return make_tables(row_us=20.0, draft_us=300.0)


def recorded(server, texts, num_prompt=120, steps=STEPS):
    """Serve requests that come, end and follow each other."""
    reqs = [server.request(str(i), text, num_prompt) for i, text in enumerate(texts)]
    for number in range(steps):
        if number == steps // 2:
            reqs[-1] = server.request("new", repeating_text(99, 900), num_prompt)
        server.step(reqs[:1] if number < steps // 6 else reqs)
    return server.finish()


@pytest.fixture(scope="module", params=[True, False], ids=["ragged", "even"])
def trace(request, profile, tmp_path_factory):
    path = tmp_path_factory.mktemp("copied") / "t.jsonl"
    server = CopyingServer(path, profile, is_ragged=request.param)
    return recorded(server, [repeating_text(seed, 900) for seed in range(3)])


def replay(trace, profile, **options):
    return list(Replay(trace, profile, make_policy("auto", trace.header), **options))


def num_drafted(request):
    return len(request.probs) // 4


def test_the_recorded_policy_makes_the_recorded_choices(trace, profile):
    outcomes = replay(trace, profile)
    for step, outcome in zip(trace.steps, outcomes, strict=True):
        assert outcome.choice.is_plain == step.is_plain
        assert outcome.price == step.price
        if step.is_plain:
            continue
        assert outcome.choice.widths == step.widths
        rows = [1 + len(unpacked(request.verified, "int32")) for request in step.requests]
        if trace.header.is_ragged:
            assert outcome.choice.num_rows == rows
        else:  # rows of nodes that a small tree does not have are no candidates
            assert outcome.choice.num_rows == [step.num_draft_tokens] * step.batch_size
        accepted = sum(len(request.accepted) for request in step.requests) / step.batch_size
        assert outcome.accepted == pytest.approx(accepted)
        assert outcome.assumed_accepted == 0.0
        assert outcome.reward == pytest.approx(recorded_reward(step, TOPK))
    # Copies were accepted, in trees that grew one layer and several.
    copied = [
        node >= num_drafted(request)
        for step in trace.steps
        for request in step.requests
        for node in request.accepted
    ]
    assert sum(copied) > 50
    # And paths of them that are longer than the tree may have layers.
    assert max(len(request.accepted) for step in trace.steps for request in step.requests) > LAYERS
    assert len({len(step.widths) for step in trace.steps if not step.is_plain}) > 1


def test_candidates_know_their_source_and_their_parent(trace):
    both = 0
    for step in trace.steps:
        for request in step.requests:
            first = num_drafted(request)
            parents, scores = candidate_parents(request, TOPK), unpacked(request.scores, "float32")
            tokens = unpacked(request.tokens, "int32")
            if step.is_plain:
                continue
            assert len(parents) == len(scores) == len(tokens)
            rows = unpacked(request.copied, "int32").reshape(-1, 3)
            assert (parents[rows[:, 1]] == rows[:, 0]).all()
            # Each node has one copied child at most, and further candidates are copied ones.
            assert len(set(rows[:, 0].tolist())) == len(rows)
            assert set(range(first, len(parents))) <= set(rows[:, 1].tolist())
            both += (rows[:, 1] < first).sum()
            assert len(set(zip(parents.tolist(), tokens.tolist(), strict=True))) == len(parents)
            for node in unpacked(request.verified, "int32").tolist():
                above = 1.0 if parents[node] < 0 else scores[parents[node]]
                assert 0.0 < scores[node] <= above
    assert both > 20


def test_without_copies_it_is_the_trace_of_another_server(trace, profile):
    """Node for node, and whatever is known of copies is not looked at."""

    def stripped(request):
        first = num_drafted(request)
        verified = unpacked(request.verified, "int32")
        return msgspec.structs.replace(
            request,
            copy_parents=b"",
            copied=b"",
            scores=b"",
            match=0,
            tokens=packed(unpacked(request.tokens, "int32")[:first], "int32"),
            verified=packed(verified[verified < first], "int32"),
            target_probs=packed(
                unpacked(request.target_probs, "float32")[verified < first], "float32"
            ),
            # The text goes down the drafted part of the tree until it leaves it.
            accepted=[node for node in request.accepted if node < first],
            follows=[node for node in request.follows if node < first],
            is_open=request.is_open and max(request.follows, default=0) < first,
        )

    steps = [
        msgspec.structs.replace(
            step, copy_chances=b"", copy_depth=0, requests=[stripped(r) for r in step.requests]
        )
        for step in trace.steps
    ]
    plain = replay(trace._replace(steps=steps), profile, rewards=False)
    assert replay(trace, profile, copies=False, rewards=False) == plain
    with_copies = replay(trace, profile)
    assert sum(o.accepted for o in with_copies) > 1.5 * sum(o.accepted for o in plain)


def test_an_empty_index_changes_nothing(profile, tmp_path):
    """Texts that never say a token again: the records of a server that copies nothing."""
    traces = []
    for name, copies in (("on", True), ("off", False)):
        # Nor does the draft propose a token that has been said.
        kind = {"copies": copies, "least_token": VOCAB // 2}
        server = CopyingServer(tmp_path / f"{name}.jsonl", profile, **kind)
        text = np.random.default_rng(4).permutation(VOCAB // 2).tolist()
        request = server.request("a", text, 60)
        for _ in range(20):
            server.step([request])
        traces.append(server.finish())
    with_copies, without = traces
    for ours, theirs in zip(with_copies.steps, without.steps, strict=True):
        assert ours.is_plain or ours.copy_chances
        for request in ours.requests:
            assert request.match == 0 and not request.copied and not request.copy_parents
        requests = [msgspec.structs.replace(r, scores=b"") for r in ours.requests]
        bare = {"copy_chances": b"", "copy_depth": 0, "requests": requests}
        assert msgspec.structs.replace(ours, **bare) == theirs
    assert replay(with_copies, profile) == replay(without, profile)


@pytest.mark.parametrize("said", [[7], list(range(30))], ids=["one", "many"])
def test_where_copies_are_nearly_sure_no_layer_is_drafted(said, profile, tmp_path):
    """One path of them is as long as the rows, however few layers a tree may have."""
    server = CopyingServer(tmp_path / "t.jsonl", profile)
    request = server.request("a", (said * 2000)[:2000], 400)
    for _ in range(100):
        server.step([request])
    trace = server.finish()
    late = [step for step in trace.steps[40:] if not step.is_plain]
    sure = [step for step in late if not step.widths]
    assert len(sure) > 0.9 * len(late) > 40  # the others are turns of other trees
    lengths = [len(step.requests[0].accepted) for step in sure]
    assert sum(length == COPY_DEPTH for length in lengths) > 0.9 * len(lengths)
    for step, outcome in zip(trace.steps, replay(trace, profile, rewards=False), strict=True):
        assert outcome.price == step.price and outcome.choice.widths == step.widths


def test_other_policies_do_not_copy(trace, profile):
    for name in ("fixed", "eagle", "full-width"):
        policies = [make_policy(name, trace.header) for _ in range(2)]
        first, second = (
            list(Replay(trace, profile, policy, copies=copies, rewards=False))
            for policy, copies in zip(policies, (True, False), strict=True)
        )
        assert first == second


def test_dearer_rows_copy_less(trace):
    cheap, dear = (
        [o for o in replay(trace, make_tables(row_us=row_us)) if not o.choice.is_plain]
        for row_us in (20.0, 2_000.0)
    )
    assert np.mean([o.mean_rows for o in dear]) < 0.8 * np.mean([o.mean_rows for o in cheap])


def test_whole_drafts_are_what_followed_the_match(trace, profile):
    """By the tokens that the trace holds: the first copies below the root, one below the other."""
    lengths = []
    for step in trace.steps:
        if step.is_plain:
            continue
        accepted = RecordedTrees(step, TOPK).accepted
        found = whole_drafts(step, accepted, 3, ROWS - 1)
        for b, request in enumerate(step.requests):
            assert found.is_copied[b] == (request.match >= 3)
            if request.match >= 3:
                lengths.append(found.lengths[b])
                followed = [node for node in request.follows if accepted[b, node] == 1.0]
                assert found.accepted[b] <= len(followed) or request.is_open
    # What followed ends where the text does, if that comes first.
    assert len(lengths) > 20 and max(lengths) == COPY_DEPTH and np.mean(lengths) > LAYERS
    always = replay(trace, profile, switch_at=2)
    never = replay(trace, profile, switch_at=10_000)
    assert never == replay(trace, profile, copies=False)
    switched = [o for o in always if not o.choice.is_plain and o.choice.num_layers == 0]
    assert switched and all(o.choice.widths == [] and o.reward is None for o in switched)
    assert max(rows for o in switched for rows in o.choice.num_rows) == 1 + COPY_DEPTH
    assert sum(o.accepted for o in always) > sum(o.accepted for o in never)


def test_the_command_compares_the_three(trace, profile, tmp_path, capsys):
    path, tables = write(trace, tmp_path / "t.jsonl"), tmp_path / "p.json"
    save_profile(profile, tables)
    lengths = {}
    for flags in ((), ("--no-copies",), ("--switch-at", "3")):
        assert main(["replay", str(path), "--profile", str(tables), *flags, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["is_prediction"] == (not flags)
        lengths[found["policy"]] = found["rows"][-1]["replayed"]["accept_length"]
    names = ["auto", "auto, without copies", "auto, whole drafts copied where 3 tokens match"]
    assert list(lengths) == names
    assert lengths["auto"] > lengths["auto, without copies"]


def test_below_the_end_of_a_text_copies_are_assumed(trace, profile):
    steps = [
        msgspec.structs.replace(
            step,
            requests=[
                msgspec.structs.replace(r, accepted=[], follows=[], is_open=True)
                for r in step.requests
            ],
        )
        for step in trace.steps
    ]
    for options in ({}, {"switch_at": 2}):
        for outcome in replay(trace._replace(steps=steps), profile, **options):
            assert outcome.assumed_accepted == pytest.approx(outcome.accepted)


def test_copies_are_drawn(trace):
    drawn = 0
    for step in [step for step in trace.steps if not step.is_plain][:20]:
        for request in step.requests:
            svg = tree_svg(step, request, TOPK, LAYERS)
            drawn += svg.count("\ncopied")
            alone = sum(node >= num_drafted(request) for node in request.accepted)
            assert svg.count(COPIED) >= alone
            assert svg.count("\nverified") == len(unpacked(request.verified, "int32"))
    assert drawn > 20 and COPIED in legend_svg()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"copied": packed(np.array([0, 1]), "int32")}, "three numbers"),
        ({"copied": packed(np.array([0, 9999, 0]), "int32")}, "copy that does not exist"),
        ({"copied": packed(np.array([-1, 0, 999]), "int32")}, "copy that does not exist"),
        ({"copied": packed(np.array([2, 1, 0]), "int32")}, "copy that does not exist"),
        ({"copy_parents": packed(np.array([9999]), "int32"), "tokens": b"", "scores": b""},
         "before its parent"),
        ({"scores": packed(np.zeros(2), "float32")}, "scores"),
    ],
)  # fmt: skip
def test_damaged_copies_are_found(trace, tmp_path, changes, reason):
    place = next(i for i, step in enumerate(trace.steps) if not step.is_plain)
    step = trace.steps[place]
    requests = [msgspec.structs.replace(step.requests[0], **changes), *step.requests[1:]]
    damaged = msgspec.structs.replace(step, requests=requests)
    path = write(trace._replace(steps=[damaged]), tmp_path / "t.jsonl")
    with pytest.raises(TraceError, match=reason):
        read_trace(path)
