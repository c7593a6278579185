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
from tests.server.client import generate

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
    for step in trace.steps:
        for request in step.requests:
            assert request.follows[: len(request.accepted)] == request.accepted
            verified = set(unpacked(request.verified, "int32").tolist())
            assert set(request.accepted) <= verified
            # The text leaves the tree where verify did, or in a node that was not verified.
            if len(request.follows) > len(request.accepted):
                assert request.follows[len(request.accepted)] not in verified
        passes = [timed.operation for timed in step.passes]
        extend = [] if step.is_plain else ["draft_extend"]
        assert passes == ["draft"] * len(step.widths) + ["verify", *extend]


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
        # At temperature 0 the target's own probabilities are 1 on what it takes, and 0 elsewhere.
        accepted = sum(len(r.accepted) for r in step.requests) / step.batch_size
        assert recorded_reward(step, trace.header.topk).expected == pytest.approx(accepted)
    sampled = [unpacked(s.requests[0].target_probs, "float32") for s in trace.steps[len(greedy) :]]
    assert any(((probs > 0) & (probs < 1)).any() for probs in sampled)

    profile = load_profile(made_up_profile)
    policy = make_policy("auto", trace.header)
    for step, outcome in zip(
        trace.steps, Replay(trace, profile, policy, correct=True), strict=True
    ):
        assert outcome.choice.is_plain == step.is_plain
        if step.is_plain:
            break  # what catching up then takes is not recorded
        assert outcome.choice.widths == step.widths
        rows = [1 + len(unpacked(request.verified, "int32")) for request in step.requests]
        assert outcome.choice.num_rows == rows
        assert outcome.price == step.price

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
    for step in trace.steps:
        assert step.widths == [header.topk] * (header.num_steps - 1)
        assert step.mean_rows == header.num_draft_tokens
    outcomes = list(Replay(trace, load_profile(made_up_profile), make_policy("auto", header)))
    # The policy would have verified less, for nearly as much.
    accepted = sum(len(r.accepted) for s in trace.steps for r in s.requests)
    kept = sum(o.accepted * s.batch_size for o, s in zip(outcomes, trace.steps, strict=True))
    assert 0.5 * accepted < kept < 1.05 * accepted
