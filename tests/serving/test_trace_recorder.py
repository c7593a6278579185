"""What is recorded of steps, and when it is written."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cast_sglang.config import CastConfig
from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.costs.limits import Limits
from cast_sglang.ops import reference
from cast_sglang.policy.decider import PromptFacts
from cast_sglang.serving.pass_clock import TimedPass
from cast_sglang.serving.step import PLAIN_SHAPE, Drafted, DraftShape, StepReport, Verified
from cast_sglang.serving.step_room import StepRoom
from cast_sglang.serving.trace_recorder import Recording, TraceRecorder
from cast_sglang.trace.file import read_trace
from cast_sglang.trace.records import tables_digest, unpacked
from cast_sglang.tree import DraftTree
from tests.support.builders import make_identity, make_profile

TOPK, VOCABULARY = 2, 8
# The root's children are tokens 1 and 2; token 1 is expanded into 3 and 4.
ROOT = torch.tensor([[0.6, 0.3]])
CHILDREN = torch.tensor([[0.7, 0.2]])
PROMPTS = PromptFacts(3.0, 20.0, 150.0, 1, 0.4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "t.jsonl"


def make(path, **settings):
    recording = Recording(
        config=CastConfig(trace=str(path), **settings),
        identity=make_identity(),
        limits=Limits(4, 1024, 8, TOPK),
        max_layers=3,
        verify_sizes=(2, 4),
        is_ragged=False,
        shares_out=False,
        extends_by_outcome=True,
        verify_graphs=GraphSizes({4: (2, 4)}),
        width_graphs=None,
        extend_graphs=None,
    )
    return TraceRecorder(recording)


class Request:
    """Like SGLang's, one that equals itself alone."""

    def __init__(self, rid):
        self.rid = rid


ONE = Request("a")


def batch_of(*reqs, context=10):
    return SimpleNamespace(reqs=list(reqs), seq_lens_cpu=torch.full((len(reqs),), context))


def verified(num_rows, new_tokens, accepted=()):
    """The outcome of a greedy request that got these tokens, over these accepted rows."""
    logits = torch.zeros(num_rows, VOCABULARY)
    for row, token in zip((0, *accepted), new_tokens, strict=True):
        logits[row, token] = 1.0
    return Verified(
        num_draft_tokens=num_rows,
        accept_index=torch.tensor([[0, *accepted]]),
        accept_lens=torch.tensor([len(new_tokens)]),
        tokens=torch.tensor([*new_tokens, 0]),
        logits=logits,
        sampling_info=SimpleNamespace(is_all_greedy=True),
    )


def report(number, shape, **changes):
    facts = {"extend_rows": 1.0, "weights": None, "predicted_us": 50.0, "policy_us": 7.0}
    facts |= {"expected_us": 55.0, "room": StepRoom(3, 8, 9)}
    return StepReport(number, shape, **facts | changes, price=None)


def run_tree(recorder, number, new_tokens, accepted):
    recorder.begin_step(batch_of(ONE))
    tree = DraftTree(torch.tensor([[1, 2]]), ROOT, 3, reference)
    recorder.on_layer(1, ROOT, 0.5 * ROOT)
    frontier = tree.frontier()
    chances = tree.grow(frontier, 1, torch.tensor([[3, 4]]), CHILDREN)
    recorder.on_layer(2, CHILDREN, chances)
    selection = tree.select(tree.ranked(3), 4)  # candidates 0, 1 and 2
    recorder.on_drafted(Drafted(tree, (1,), selection))
    recorder.on_verified(verified(4, new_tokens, accepted))
    recorder.on_step(report(number, DraftShape((1,), 4, None, 2)))


def run_plain(recorder, number, token):
    recorder.begin_step(batch_of(ONE))
    recorder.on_verified(verified(1, [token]))
    recorder.on_step(report(number, PLAIN_SHAPE, extend_rows=0.0, prompts=PROMPTS))


def test_a_tree_and_what_became_of_it(path):
    recorder, profile = make(path, trace_tokens=True), make_profile()
    learned = {"prices": [], "corrections": {"pass": [0.1]}}
    recorder.use_profile(profile, learned)
    # Row 1 is candidate 0, token 1; its child 2, token 3, is row 3.
    run_tree(recorder, 1, new_tokens=[1, 3, 5], accepted=[1, 3])
    recorder.on_step_timed(60.0)
    recorder.on_pass_timed(TimedPass("verify", 1, 4, 40.0, 45.0))
    recorder.flush()
    trace = read_trace(path)
    assert trace.header.tables == tables_digest(profile) and trace.header.learned == learned
    assert (trace.header.num_steps, trace.header.topk) == (3, TOPK)
    assert (trace.header.num_draft_tokens, trace.header.max_context) == (8, 960)
    [step] = trace.steps
    assert (step.step, step.widths, step.num_layers, step.num_draft_tokens) == (1, [1], 2, 4)
    assert (step.predicted_us, step.measured_us, step.policy_us) == (50.0, 60.0, 7.0)
    assert (step.expected_us, step.max_layers, step.max_rows) == (55.0, 3, 8)
    assert trace.header.verify_graphs == {4: [2, 4]} and trace.header.width_graphs is None
    assert [timed.measured_us for timed in step.passes] == [45.0]
    [request] = step.requests
    np.testing.assert_allclose(unpacked(request.probs, "float32"), [0.6, 0.3, 0.7, 0.2])
    np.testing.assert_allclose(unpacked(request.chances, "float32"), [0.3, 0.15, 0.7, 0.2])
    assert unpacked(request.expanded, "int32").tolist() == [0]
    assert unpacked(request.verified, "int32").tolist() == [0, 1, 2]
    assert unpacked(request.target_probs, "float32").tolist() == [1.0, 0.0, 1.0]
    assert unpacked(request.tokens, "int32").tolist() == [1, 2, 3, 4]
    assert request.accepted == request.follows == [0, 2] and request.context == 10


def test_a_step_is_written_when_the_text_has_left_its_tree(path):
    recorder = make(path)
    # The target takes token 1 alone as far as it has been asked: what follows is not known yet.
    run_tree(recorder, 1, new_tokens=[1], accepted=[])
    recorder.on_step_timed(60.0)
    assert not path.exists()
    run_plain(recorder, 2, token=4)
    recorder.on_step_timed(30.0)
    run_plain(recorder, 3, token=5)
    [step] = read_trace(path).steps
    assert step.requests[0].follows == [0, 3] and step.requests[0].accepted == []
    recorder.on_step_timed(None)
    recorder.flush()
    steps = read_trace(path).steps
    assert [step.measured_us for step in steps] == [60.0, 30.0, None]
    assert [step.is_plain for step in steps] == [False, True, True]
    assert {name: getattr(steps[1], name) for name in PROMPTS._fields} == PROMPTS._asdict()
    assert {step.requests[0].request for step in steps} == {0}


def test_what_follows_the_end_of_the_trace_stays_open(path):
    recorder = make(path)
    run_tree(recorder, 1, new_tokens=[1], accepted=[])
    recorder.on_step_timed(60.0)
    recorder.flush()
    [first] = read_trace(path).steps
    assert first.requests[0].is_open and first.requests[0].follows == [0]


def test_running_requests_of_one_name_are_two(path):
    recorder, other = make(path), Request(ONE.rid)
    for number in (1, 2):
        recorder.begin_step(batch_of(ONE, other))
        recorder.on_verified(
            Verified(
                num_draft_tokens=1,
                accept_index=torch.tensor([[0], [1]]),
                accept_lens=torch.tensor([1, 1]),
                tokens=torch.tensor([5, 6]),
                logits=torch.zeros(2, VOCABULARY),
                sampling_info=SimpleNamespace(is_all_greedy=True),
            )
        )
        recorder.on_step(report(number, PLAIN_SHAPE, extend_rows=0.0))
        recorder.on_step_timed(30.0)
    recorder.flush()
    numbers = [[request.request for request in step.requests] for step in read_trace(path).steps]
    assert numbers == [[0, 1], [0, 1]]


def test_steps_whose_results_never_come_are_forgotten(path):
    recorder = make(path)
    run_plain(recorder, 1, token=5)
    recorder.on_step_timed(30.0)
    run_plain(recorder, 2, token=5)
    recorder.discard()
    recorder.flush()
    assert [step.step for step in read_trace(path).steps] == [1]


def test_a_file_that_takes_no_more(path):
    recorder = make(path, trace_mb=1)
    assert not recorder.is_full
    for number in range(1, 20):
        run_plain(recorder, number, token=5)
        recorder.on_step_timed(30.0)
    assert not recorder.is_full
    recorder._writer.close()
    assert recorder.is_full
