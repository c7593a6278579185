"""A probe: ten prompts, and what is said of a draft that does well, badly, or nothing."""

import copy
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.harness.pairs import tiny_pair
from cast_sglang.errors import HostError
from cast_sglang.serving.launch.probe import LENGTHS, RunningServer, probe
from tests.support.profiles import write_profile

TOPK = 4


class Served:
    """A server whose every prompt takes 20 steps of trees of 3 layers and 9 rows, 2 of them plain.

    Args:
        accepted: tokens of the steps that draft, over and over.
        said: what the draft says of its first drafts, and how many of them are accepted.
    """

    def __init__(self, tmp_path, accepted=(1, 2, 4), said=(0.8, 0.7), ratio=None, limit=10**9):
        pair = tiny_pair()
        self.accepted, self.limit = accepted, limit
        self.state = dict.fromkeys(
            ("steps", "plain_steps", "layers_grown", "nodes_drafted", "nodes_verified"), 100
        )
        self.state |= {"drafts_accepted": 50, "accept_lens": {"1": 90, "2": 10}}
        row = {"kind": "greedy", "first_depth": 1, "num_nodes": 10.0}
        row |= {"drafted": 10 * said[0], "accepted": 10 * said[1]}
        other = {"kind": "drawn", "first_depth": 1, "num_nodes": 999.0}
        other |= {"drafted": 999.0, "accepted": 1.0}
        self.state["reliability"] = [row, other]
        self.state["acceptance_ratio"] = ratio
        path = write_profile(tmp_path / "made-up.json")
        self.state["profile"] = {"path": str(path), "estimated": True}
        self.facts = {"model_path": pair.target, "speculative_draft_model_path": pair.draft}
        self.facts |= {"speculative_eagle_topk": TOPK, "context_length": 1024}
        self.prompts = []

    def info(self):
        return copy.deepcopy({**self.facts, "internal_states": [{"cast": self.state}]})

    def generate(self, prompt):
        self.prompts.append(prompt)
        if len(prompt) > self.limit:
            raise HostError("too long")
        state, lengths = self.state, self.state["accept_lens"]
        state["steps"] += 20
        state["plain_steps"] += 2
        lengths["1"] += 2
        tokens = 2
        for step in range(18):
            length = self.accepted[step % len(self.accepted)]
            lengths[str(length)] = lengths.get(str(length), 0) + 1
            tokens += length
        state["drafts_accepted"] += tokens - 20
        state["layers_grown"] += 18 * 3
        state["nodes_drafted"] += 18 * TOPK * (1 + 2 + 2)
        state["nodes_verified"] += 18 * 9 + 2
        return {"prompt_tokens": len(prompt), "completion_tokens": tokens, "spec_verify_ct": 20}


def probed(served):
    return {check.name: check for check in probe(served)}


def test_ten_prompts_of_three_lengths_are_served(tmp_path):
    served = Served(tmp_path)
    checks = probed(served)
    assert len(served.prompts) == len(set(served.prompts)) == 10
    assert len(max(served.prompts, key=len)) > 4 * len(min(served.prompts, key=len))
    assert checks["probe"].found.startswith("10 prompts of ")
    assert checks["draft head"].status == "ok"


def test_acceptance_is_said_by_depth_and_by_context(tmp_path):
    checks = probed(Served(tmp_path))
    # Of 18 steps that draft a third each brings 1, 2 and 4 tokens; those that drafted nothing, and
    # all of before, do not count.
    found = checks["accept by depth"].found
    assert found == "2.33 tokens a step that drafts; accepted at depth 1: 67%, 2: 50%, 3: 100%"
    found = checks["accept by context"].found
    assert found.count("2.20 at ") == 3 and checks["accept by context"].status == "ok"


def test_a_draft_of_which_nothing_is_accepted(tmp_path):
    served = Served(tmp_path, accepted=(1,))
    served.state["accept_lens"] = {"1": 100}
    found = probed(served)["accept by depth"].found
    assert found == "1.00 tokens a step that drafts; accepted at depth 1: 0%"


def test_a_head_that_fits_and_ones_that_do_not(tmp_path):
    assert probed(Served(tmp_path))["head fits"].status == "ok"
    wrong = probed(Served(tmp_path, said=(0.8, 0.1)))["head fits"]
    assert wrong.status == "fail" and "10% were accepted, and the draft says 80%" in wrong.found
    for cause in ("permuted d2t", "other layers", "lm_head", "another target"):
        assert cause in wrong.fix
    # What was learned of a draft that did well is still there, and lately it is rejected.
    assert probed(Served(tmp_path, ratio=0.1))["head fits"].status == "fail"
    assert probed(Served(tmp_path, ratio=0.9))["head fits"].status == "ok"


def test_a_context_that_is_drafted_for_worse_is_named(tmp_path):
    class Forgets(Served):
        def generate(self, prompt):
            meta = super().generate(prompt)
            return meta | ({"completion_tokens": 21} if len(self.prompts) > 7 else {})

    check = probed(Forgets(tmp_path))["accept by context"]
    assert check.status == "warn" and "such lengths" in check.fix


def test_speed_is_predicted_by_the_profile(tmp_path):
    """Plain decoding takes 20 ms and the draft 0.4 ms, and the table ends at batch size 16."""
    check = probed(Served(tmp_path))["speed-up"]
    assert check.status == "ok" and "ESTIMATED" in check.found
    ratios = [float(part.partition("x")[0]) for part in check.found.partition(": ")[2].split(", ")]
    assert len(ratios) == 5 and 1.9 < ratios[0] < 2.33 and ratios == sorted(ratios, reverse=True)


def test_a_server_without_a_profile_predicts_nothing(tmp_path):
    served = Served(tmp_path)
    served.state["profile"] = None
    assert probed(served)["speed-up"].status == "skip"
    served.state["profile"] = {"path": str(tmp_path / "gone.json"), "estimated": False}
    assert probed(served)["speed-up"].status == "skip"


def test_prompts_that_are_too_long_are_left_out(tmp_path):
    served = Served(tmp_path, limit=1000)
    found = probed(served)["probe"].found
    refused = sum(len(prompt) > 1000 for prompt in served.prompts)
    assert 0 < refused < 10 and f"{refused} were refused" in found
    with pytest.raises(HostError, match="no prompt was served: too long"):
        probe(Served(tmp_path, limit=1))


def test_a_server_that_drafts_nothing(tmp_path):
    class Plain(Served):
        def generate(self, prompt):
            self.state["steps"] += 9
            self.state["plain_steps"] += 9
            self.state["nodes_verified"] += 9
            self.state["accept_lens"]["1"] += 9
            return {"prompt_tokens": len(prompt), "completion_tokens": 10, "spec_verify_ct": 9}

    served = Plain(tmp_path)
    served.state["reliability"] = []
    checks = probed(served)
    assert checks["accept by depth"].status == "warn" and checks["head fits"].status == "skip"
    assert checks["speed-up"].status == "skip"


def test_a_server_of_another_algorithm_is_refused(tmp_path):
    served = Served(tmp_path)
    served.info = lambda: {**served.facts, "internal_states": [{}]}
    with pytest.raises(HostError, match="--speculative-algorithm CAST"):
        probe(served)


def test_what_is_no_server_is_named(tmp_path):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(500)
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(HostError, match=f"--probe {url}/server_info: HTTP Error 500"):
            RunningServer(f"{url}/").info()
        server.shutdown()
    with pytest.raises(HostError, match="refused"):
        RunningServer(url).info()
    with pytest.raises(HostError, match="unknown url type"):
        RunningServer("localhost:1").info()


def test_there_is_a_prompt_of_each_length():
    assert len(LENGTHS) == 10
