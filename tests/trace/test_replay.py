"""Replay against the loop that recorded, and against brute force."""

import msgspec
import numpy as np
import pytest

from cast_sglang.errors import TraceError
from cast_sglang.trace.candidates import recorded_reward
from cast_sglang.trace.records import packed, unpacked
from cast_sglang.trace.replay import Replay, make_policy
from cast_sglang.tree import parents_of
from tests.support.simulator import LAYERS, TOKENS, TOPK
from tests.support.traces import Recorder, default_policy, make_header, make_tables

HEADER = make_header(None)


@pytest.fixture(scope="module")
def tables():
    return make_tables()


@pytest.fixture(scope="module")
def full(tables):
    """A trace in which every step grew and verified the whole envelope."""
    trace = Recorder(make_policy("eagle", HEADER), tables, seed=3).run(80)
    return trace._replace(header=make_header(tables, is_full=True))


@pytest.mark.parametrize("name", ["auto", "fixed", "eagle", "full-width"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_recorded_policy_makes_the_recorded_choices(tables, name, batch_size):
    trace = Recorder(make_policy(name, HEADER), tables, batch_size).run(60)
    replay = Replay(trace, tables, make_policy(name, trace.header))
    was_plain = False
    for step, outcome in zip(trace.steps, replay, strict=True):
        grown = step.widths[: max(step.num_layers - 1, 0)]
        assert outcome.choice.widths == grown
        assert outcome.choice.num_layers == step.num_layers
        assert outcome.choice.is_plain == step.is_plain
        num_rows = [] if step.is_plain else [step.num_draft_tokens] * batch_size
        assert outcome.choice.num_rows == num_rows
        accepted = sum(len(request.accepted) for request in step.requests) / batch_size
        assert outcome.accepted == pytest.approx(accepted)
        assert outcome.assumed_accepted == 0.0
        # After a plain step the draft catches up, which is not part of the predicted time.
        assert was_plain or outcome.time_us == pytest.approx(step.predicted_us)
        was_plain = step.is_plain
        reward = None if step.is_plain else pytest.approx(recorded_reward(step, TOPK))
        assert outcome.reward == reward
        if name in ("auto", "full-width"):
            assert outcome.price == step.price


def test_chains_are_planned_where_the_server_planned_them(tables):
    trace = Recorder(default_policy(), tables).run(40)
    trace = trace._replace(header=make_header(tables, plans_chains=True))
    lengths = {}
    for name in ("auto", "eagle"):
        outcomes = Replay(trace, tables, make_policy(name, trace.header))
        drafted = [o.choice for o in outcomes if not o.choice.is_plain]
        assert all(set(choice.widths) <= {1} for choice in drafted)
        lengths[name] = {choice.num_layers for choice in drafted}
    assert lengths["eagle"] == {LAYERS} and len(lengths["auto"]) > 1


def test_plain_steps_are_replayed(tables):
    dear = make_tables(row_us=40_000.0, draft_us=200_000.0)
    trace = Recorder(default_policy(), dear, seed=1).run(150)
    assert 20 < sum(step.is_plain for step in trace.steps) < 150
    outcomes = list(Replay(trace, dear, default_policy()))
    # Catching up has its price here, and the recorder knows none, so tries may come later.
    same = [o.choice.is_plain == s.is_plain for s, o in zip(trace.steps, outcomes, strict=True)]
    assert np.mean(same) > 0.9
    plain = next(outcome for outcome in outcomes if outcome.choice.is_plain)
    assert plain.accepted == 0.0 and plain.mean_rows == 1.0 and plain.reward is None
    # By cheap tables the same steps would have drafted, on candidates that are drawn.
    cheap = list(Replay(trace, tables, default_policy()))
    drawn = [o for s, o in zip(trace.steps, cheap, strict=True) if s.is_plain]
    # But where it is the turn of plain decoding.
    assert sum(outcome.choice.is_plain for outcome in drawn) <= 3
    drawn = [outcome for outcome in drawn if not outcome.choice.is_plain]
    assert all(outcome.assumed_accepted == pytest.approx(outcome.accepted) for outcome in drawn)


def accepted_by_brute_force(step, num_layers, num_nodes):
    """Accepted drafts of EAGLE's tree of some depth and size, node by node."""
    total = 0
    for request in step.requests:
        probs = unpacked(request.probs, "float32")
        parents = parents_of(unpacked(request.expanded, "int32"), TOPK)
        scores, depths = {-1: np.float32(1.0)}, {-1: 0}
        for node, parent in enumerate(parents.tolist()):
            scores[node], depths[node] = scores[parent] * probs[node], depths[parent] + 1
        nodes = [node for node in range(len(probs)) if depths[node] <= num_layers]
        chosen = sorted(nodes, key=lambda node: (-scores[node], node))[:num_nodes]
        total += len(set(chosen) & set(request.follows))
    return total / len(step.requests)


class Shape:
    """A policy of one depth and size."""

    def __init__(self, num_layers, num_rows):
        self.num_layers, self.num_rows, self.layer = num_layers, num_rows, 1

    def speculate(self, *arguments):
        return True

    def weigh(self, weights):
        pass

    def breadth(self, scores, costs):
        return scores.shape[1]

    def deepen(self):
        self.layer += 1
        return self.layer <= self.num_layers

    def expanded(self, parent_scores, child_probs):
        pass

    def rerank(self, scores, costs):
        self.layer = 1
        return self.num_rows

    def observe(self, *arguments):
        pass


@pytest.mark.parametrize(("num_layers", "num_rows"), [(1, 2), (1, 9), (3, 8), (5, 20), (8, 31)])
def test_other_trees_of_a_full_trace_need_no_assumption(full, tables, num_layers, num_rows):
    replay = Replay(full, tables, Shape(num_layers, num_rows))
    for step, outcome in zip(full.steps, replay, strict=True):
        assert outcome.accepted == accepted_by_brute_force(step, num_layers, num_rows - 1)
        assert outcome.assumed_accepted == 0.0


def test_what_is_not_known_is_assumed_and_said(full, tables):
    narrow = Recorder(Shape(2, 4), tables, seed=3).run(200)
    outcomes = list(Replay(narrow, tables, make_policy("eagle", HEADER)))
    assumed = sum(o.assumed_accepted for o in outcomes) / sum(o.accepted for o in outcomes)
    assert 0.1 < assumed < 0.9
    # What is assumed is about right: other text of the same kind, all of it known.
    known = Recorder(Shape(LAYERS, TOKENS), tables, seed=4).run(200)
    truth = np.mean([len(r.accepted) for step in known.steps for r in step.requests])
    assert np.mean([o.accepted for o in outcomes]) == pytest.approx(truth, rel=0.5)


def test_the_end_of_a_request_is_not_known(tables):
    trace = Recorder(make_policy("eagle", HEADER), tables, 1).run(30)
    steps = []
    for step in trace.steps:
        [request] = step.requests
        cut = msgspec.structs.replace(request, accepted=[], follows=[], is_open=True)
        steps.append(msgspec.structs.replace(step, requests=[cut]))
    for outcome in Replay(trace._replace(steps=steps), tables, make_policy("eagle", HEADER)):
        assert outcome.assumed_accepted == pytest.approx(outcome.accepted)
        assert 0.0 < outcome.accepted <= LAYERS


def test_requests_that_want_no_drafts_accept_none(full, tables):
    steps = []
    for step in full.steps:
        off = msgspec.structs.replace(step.requests[0], weight=0.0)
        steps.append(msgspec.structs.replace(step, requests=[off, *step.requests[1:]]))
    whole = sum(o.accepted for o in Replay(full, tables, Shape(8, 32)))
    half = sum(o.accepted for o in Replay(full._replace(steps=steps), tables, Shape(8, 32)))
    own = sum(len(step.requests[0].accepted) for step in full.steps) / 2
    assert half == pytest.approx(whole - own)


def test_times_of_the_recording_correct_the_tables(tables):
    """All recorded times are 1.25 times what the tables say."""
    trace = Recorder(default_policy(), tables).run(150)

    def corrected(step):
        passes = [
            msgspec.structs.replace(
                timed, predicted_us=step.predicted_us / 9, measured_us=step.predicted_us / 9 * 1.25
            )
            for timed in step.passes
        ]
        return msgspec.structs.replace(step, passes=passes)

    trace = trace._replace(steps=[corrected(step) for step in trace.steps])
    outcomes = list(Replay(trace, tables, default_policy(), correct=True))
    pairs = list(zip(trace.steps, outcomes, strict=True))[100:]
    measured = sum(step.measured_us for step, _ in pairs)
    assert sum(o.time_us for _, o in pairs) == pytest.approx(measured, rel=0.05)
    assert sum(o.table_us for _, o in pairs) == pytest.approx(measured / 1.25, rel=0.05)


def test_thresholds_use_the_draft_probabilities(full, tables):
    """Calibrated chances change what `auto` chooses, and nothing that `fixed` does."""

    def doubted(step):
        requests = [
            msgspec.structs.replace(
                request, chances=packed(0.2 * unpacked(request.probs, "float32"), "float32")
            )
            for request in step.requests
        ]
        return msgspec.structs.replace(step, requests=requests)

    other = full._replace(steps=[doubted(step) for step in full.steps])
    for name, is_same in (("fixed", True), ("eagle", True), ("auto", False)):
        first, second = (
            [o.choice for o in Replay(trace, tables, make_policy(name, trace.header))]
            for trace in (full, other)
        )
        assert (first == second) == is_same


def test_a_trace_without_drafts_is_refused(tables):
    trace = Recorder(default_policy(), tables).run(3)
    plain = msgspec.structs.replace(trace.steps[0], num_layers=0, widths=[])
    with pytest.raises(TraceError, match="no step drafted"):
        Replay(trace._replace(steps=[plain]), tables, default_policy())
