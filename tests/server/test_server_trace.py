"""A real server records; what it recorded is replayed, tuned by and drawn."""

import re
from pathlib import Path

import pytest

from benchmarks.harness.servers import Server
from cast_sglang.cli import main
from cast_sglang.costs.profiles import load_profile
from cast_sglang.trace.candidates import recorded_reward
from cast_sglang.trace.file import read_trace
from cast_sglang.trace.records import Trace, unpacked
from cast_sglang.trace.replay import Replay, make_policy
from tests.server.client import generate, in_parallel
from tests.support.altered_servers import GraphSizesServer
from tests.support.preloaded import PreloadedServer

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

NUM_TOKENS = 40


def record(server: Server, prompts: list[str], path: Path) -> Trace:
    """Serve one request, four at once, and one at temperature 1; return the trace."""
    answers = [generate(server, prompts[0], max_new_tokens=NUM_TOKENS)]
    answers += generate(server, prompts[1:5], max_new_tokens=NUM_TOKENS)
    answers.append(generate(server, prompts[5], max_new_tokens=NUM_TOKENS, temperature=1.0))
    state = server.get("/server_info")["internal_states"][0]["cast"]  # also writes the last steps
    trace = read_trace(path)
    assert len(trace.steps) == state["steps"]
    assert sum(len(r.accepted) for s in trace.steps for r in s.requests) == state["drafts_accepted"]
    assert sum(s.batch_size for s in trace.steps) == state["requests"]
    rows = sum(s.batch_size * s.mean_rows for s in trace.steps)
    assert rows == pytest.approx(state["nodes_verified"])
    timed = [step for step in trace.steps if step.measured_us is not None]
    assert sum(s.measured_us for s in timed) == pytest.approx(
        state["mean_measured_us"] * state["timed_steps"]
    )
    return trace


def check_consistent(trace: Trace) -> None:
    was_plain = None
    for step in trace.steps:
        for request in step.requests:
            assert request.follows[: len(request.accepted)] == request.accepted
            verified = set(unpacked(request.verified, "int32").tolist())
            assert set(request.accepted) <= verified
            # The text leaves the tree where verify did, or in a node that was not verified.
            if len(request.follows) > len(request.accepted):
                assert request.follows[len(request.accepted)] not in verified
        passes = [timed.operation for timed in step.passes]
        # A plain step leaves the draft behind.
        extend = [] if step.is_plain else ["draft_extend"]
        # Behind a step of the other kind nothing is timed, unless a prefill is between.
        if passes or was_plain in (None, step.is_plain):
            assert passes == ["draft"] * len(step.widths) + ["verify", *extend]
        was_plain = step.is_plain


def check_replayed(trace: Trace, profile: Path) -> None:
    """The recorded policy, asked again, makes every choice of the server."""
    policy = make_policy(str(trace.header.settings["policy"]), trace.header)
    replay = Replay(trace, load_profile(profile), policy, correct=True)
    for number, (step, outcome) in enumerate(zip(trace.steps, replay, strict=True)):
        assert outcome.choice.is_plain == step.is_plain, number
        if not step.is_plain:
            rows = [1 + len(unpacked(request.verified, "int32")) for request in step.requests]
            assert (outcome.choice.widths, outcome.choice.num_rows) == (step.widths, rows), number
        if step.price is not None:
            assert outcome.price == step.price, number


# Policy auto without graphs is the test below.
@pytest.mark.parametrize(("arm", "has_graphs"), [("cast", True), ("cast:fixed:1-0.5-1", False)])
def test_replay_makes_the_choices_of_the_server(
    start_server, prompts, made_up_profile, tmp_path, arm, has_graphs
):
    path = tmp_path / "t.jsonl"
    kind = GraphSizesServer if has_graphs else PreloadedServer
    with start_server(arm, "--cast-trace", str(path), name="decided", kind=kind) as server:
        for batch in (1, 3, 1, 4, 2, 6):
            generate(server, prompts[:batch], max_new_tokens=2 * NUM_TOKENS)
            prompts = prompts[batch:]
        # Requests that come, end and are sampled while others run.
        lengths = [12, 160, 35, 190, 7, 148, 21, 175, 40, 90]
        in_parallel(
            lambda n: generate(server, prompts[n], max_new_tokens=lengths[n], temperature=n % 2),
            range(len(lengths)),
            workers=5,
        )
        server.get("/server_info")  # also writes the last steps
    trace = read_trace(path)
    assert len(trace.steps) > 200
    assert (trace.header.verify_graphs is not None) == has_graphs
    assert len({tuple(step.widths) for step in trace.steps}) > 5
    if has_graphs:
        for step in trace.steps:
            bucket = 1 if step.batch_size == 1 else 4
            if step.batch_size <= 4 and not step.is_plain:
                sizes, rows = trace.header.verify_graphs[bucket], step.num_draft_tokens
                # What a drawn request verifies is settled; a small tree has no nodes to fill a
                # graph with then.
                whole = 1 + trace.header.topk * (1 + sum(step.widths))
                assert rows in sizes or not [size for size in sizes if rows < size <= whole]
                assert set(step.widths) <= set(trace.header.width_graphs[bucket])
    check_replayed(trace, made_up_profile)


def test_recorded_replayed_and_shown(
    start_server, pair, prompts, made_up_profile, tmp_path, capsys
):
    path = tmp_path / "t.jsonl"
    flags = ("--cast-trace", str(path), "--cast-trace-tokens")
    with start_server("cast", *flags, name="traced") as server:
        trace = record(server, prompts, path)
    check_consistent(trace)
    last = trace.steps[-1].requests[0].request  # the one at temperature 1
    greedy = [step for step in trace.steps if step.requests[0].request != last]
    for step in greedy:
        if step.is_plain:
            continue
        # At temperature 0 the target's own probabilities are 1 on what it takes, and 0 elsewhere.
        accepted = sum(len(r.accepted) for r in step.requests) / step.batch_size
        assert recorded_reward(step, trace.header.topk).expected == pytest.approx(accepted)
    sampled = [unpacked(s.requests[0].target_probs, "float32") for s in trace.steps[len(greedy) :]]
    assert any(((probs > 0) & (probs < 1)).any() for probs in sampled)

    check_replayed(trace, made_up_profile)
    assert main(["replay", str(path), "--profile", str(made_up_profile)]) == 0
    assert re.search(r"predicted speed is [+-][\d.]+% off", capsys.readouterr().out)
    out = ["--out", str(tmp_path / "out"), "--tokenizer", pair.target]
    assert main(["trace", "show", str(path), *out]) == 0
    assert (tmp_path / "out" / "index.html").read_text().count("</svg>") == 7


def test_full_trace(start_server, prompts, made_up_profile, tmp_path):
    path = tmp_path / "full.jsonl"
    flags = ("--cast-trace", str(path), "--cast-trace-full")
    with start_server("cast", *flags, name="traced-full") as server:
        trace = record(server, prompts, path)
    check_consistent(trace)
    header = trace.header
    assert not any(request.tokens for step in trace.steps for request in step.requests)
    for step in trace.steps:  # the envelope, as far as the answers have room for it
        assert step.widths == [header.topk] * (step.max_layers - 1)
        # Where one token is missing, the target is asked for it alone.
        num_nodes = header.topk * (1 + sum(step.widths)) if step.max_layers else 0
        assert step.mean_rows == min(step.max_rows, 1 + num_nodes)
    assert sum(step.max_layers == header.num_steps for step in trace.steps) > len(trace.steps) / 2
    outcomes = list(Replay(trace, load_profile(made_up_profile), make_policy("auto", header)))
    # The policy would have verified less, for nearly as much.
    accepted = sum(len(r.accepted) for s in trace.steps for r in s.requests)
    kept = sum(o.accepted * s.batch_size for o, s in zip(outcomes, trace.steps, strict=True))
    assert 0.5 * accepted < kept < 1.05 * accepted
