"""`cast-sglang doctor --probe`: serve a few prompts, and say whether the draft fits the target."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import CostModel, plain_units, step_units
from cast_sglang.costs.profiles import load_profile
from cast_sglang.errors import HostError, ProfileError
from cast_sglang.serving.drift import COLLAPSED
from cast_sglang.serving.launch.diagnosis import FAIL, OK, SKIP, WARN, Check
from cast_sglang.serving.launch.head import check_head
from cast_sglang.serving.texts import read_texts

__all__ = ["EngineOfOurs", "RunningServer", "Served", "probe"]

# Prompts by how many of the texts each is made of, ten in all.
LENGTHS = (1, 1, 1, 1, 4, 4, 4, 8, 8, 8)
ANSWER_TOKENS = 48
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
REQUEST_SECONDS = 300.0
GREEDY = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": ANSWER_TOKENS}


class Served(Protocol):
    """A server, or an engine in this process."""

    def generate(self, prompt: str) -> Mapping[str, Any]:
        """Answer greedily, and return the answer's `meta_info`."""

    def info(self) -> Mapping[str, Any]:
        """Return what /server_info says."""


class RunningServer:
    """A server that runs, by its URL such as http://localhost:30000.

    Raises:
        HostError: whenever it does not answer, or with an error.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def generate(self, prompt: str) -> Mapping[str, Any]:
        answer = self._ask("/generate", {"text": prompt, "sampling_params": GREEDY})
        meta: Mapping[str, Any] = answer["meta_info"]
        return meta

    def info(self) -> Mapping[str, Any]:
        return self._ask("/server_info")

    def _ask(self, path: str, body: object = None) -> Mapping[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(self._url + path, data, headers)
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                answer: Mapping[str, Any] = json.load(response)
                return answer
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise HostError(f"--probe {self._url}{path}: {error}") from error


class EngineOfOurs:
    """An engine in this process (`engine.started_engine`)."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def generate(self, prompt: str) -> Mapping[str, Any]:
        meta: Mapping[str, Any] = self._engine.generate(prompt, GREEDY)["meta_info"]
        return meta

    def info(self) -> Mapping[str, Any]:
        info: Mapping[str, Any] = self._engine.get_server_info()
        return info


class _Answers(NamedTuple):
    """What the prompts brought."""

    # Of each prompt that was served: its tokens, and the tokens of its answer for each pass.
    contexts: list[tuple[int, float]]
    refused: int
    before: Mapping[str, Any]  # the server's state
    after: Mapping[str, Any]

    def gained(self, name: str) -> float:
        """Return how much a count has grown."""
        return float(self.after[name] - self.before[name])


def probe(served: Served) -> list[Check]:
    """Serve ten short prompts one after the other, and say how the draft did.

    Raises:
        HostError: the server does not answer, or does not serve with CAST.
    """
    info = served.info()
    before = _state(info)
    contexts, refused = [], 0
    for prompt in _prompts():
        try:
            meta = served.generate(prompt)
        except (HostError, ValueError) as error:  # as a prompt beyond the context limit
            refused += 1
            if refused == len(LENGTHS):
                raise HostError(f"--probe: no prompt was served: {error}") from error
            continue
        length = meta["completion_tokens"] / max(1, meta.get("spec_verify_ct", 0))
        contexts.append((int(meta["prompt_tokens"]), length))
    answers = _Answers(contexts, refused, before, _state(served.info()))
    checks = [_served(answers), _by_depth(answers), _by_context(answers)]
    if (draft := info["speculative_draft_model_path"]) is not None:
        checks += [
            _fit(answers),
            *check_head(info["model_path"], draft, info.get("context_length")),
        ]
    return [*checks, _speed_up(answers, info["speculative_eagle_topk"])]


def _prompts() -> list[str]:
    """Return ten prompts of the package's own texts."""
    texts = [text for _, text in read_texts()]
    return ["\n\n".join((texts[number:] + texts)[:count]) for number, count in enumerate(LENGTHS)]


def _state(info: Mapping[str, Any]) -> Mapping[str, Any]:
    states = info.get("internal_states") or [{}]
    state: Mapping[str, Any] | None = states[0].get("cast")
    if state is None:
        raise HostError("--probe: this server does not run with --speculative-algorithm CAST")
    return state


def _served(answers: _Answers) -> Check:
    text = f"{len(answers.contexts)} prompts of {min(answers.contexts)[0]} to "
    text += f"{max(answers.contexts)[0]} tokens, {ANSWER_TOKENS} tokens each, greedy"
    if answers.refused:
        text += f"; {answers.refused} were refused, as too long"
    return Check("probe", OK, text)


def _by_depth(answers: _Answers) -> Check:
    """Report how often a draft at each depth was accepted, given that the one before was."""
    counts = {int(length): count for length, count in answers.after["accept_lens"].items()}
    for length, count in answers.before["accept_lens"].items():
        counts[int(length)] -= count
    # Plain steps have drafted nothing.
    counts[1] = counts.get(1, 0) - int(answers.gained("plain_steps"))
    reached = [
        sum(count for length, count in counts.items() if length > depth)
        for depth in range(max(2, *counts))
    ]
    if not reached or not reached[0]:
        text = "every step was plain, so nothing was drafted"
        return Check(
            "accept by depth", WARN, text, "a server whose drafts do not pay drafts rarely"
        )
    shares = [
        f"{depth}: {here / above:.0%}"
        for depth, (above, here) in enumerate(zip(reached, reached[1:], strict=False), 1)
        if above
    ]
    mean = 1 + sum(reached[1:]) / reached[0]
    text = f"{mean:.2f} tokens a step that drafts; accepted at depth {', '.join(shares)}"
    return Check("accept by depth", OK, text)


def _by_context(answers: _Answers) -> Check:
    groups: dict[int, list[tuple[int, float]]] = {}
    for (tokens, length), count in zip(sorted(answers.contexts), LENGTHS, strict=False):
        groups.setdefault(count, []).append((tokens, length))
    parts, means = [], []
    for group in groups.values():
        means.append(sum(length for _, length in group) / len(group))
        parts.append(f"{means[-1]:.2f} at {group[0][0]}-{group[-1][0]} tokens")
    text = f"{', '.join(parts)} (tokens a step, plain ones included)"
    if means[-1] - 1 < COLLAPSED * (means[0] - 1):
        fix = "long contexts are drafted for worse: was the draft trained on such lengths?"
        return Check("accept by context", WARN, text, fix)
    return Check("accept by context", OK, text)


def _fit(answers: _Answers) -> Check:
    """Compare what the draft says of its tokens, and what is remembered, with what is accepted."""
    rows = [
        row
        for row in answers.after["reliability"]
        if row["first_depth"] == 1 and row["kind"] == "greedy"
    ]
    nodes = sum(row["num_nodes"] for row in rows)
    if not nodes:
        text = "not known: this server calibrates nothing, or has drafted nothing"
        return Check("head fits", SKIP, text)
    said = sum(row["drafted"] for row in rows) / nodes
    accepted = sum(row["accepted"] for row in rows) / nodes
    text = f"of first drafts {accepted:.0%} were accepted, and the draft says {said:.0%}"
    ratio = answers.after["acceptance_ratio"]
    if ratio is not None:
        text += f"; lately {ratio:.2f} times as many as calibration remembers"
    if accepted >= COLLAPSED * said and (ratio is None or ratio >= COLLAPSED):
        return Check("head fits", OK, text)
    fix = (
        "it is sure of what the target rejects: a permuted d2t, a head that reads other layers, "
        "an lm_head that is missing, a draft of another target or of its weights of before; see "
        "draft head"
    )
    return Check("head fits", FAIL, text, fix)


def _speed_up(answers: _Answers, topk: int) -> Check:
    """Predict speed by the server's cost profile, for the trees that the prompts have had.

    Policy auto takes smaller ones at larger batches, so there it is faster than this.
    """
    in_use = answers.after.get("profile")
    name = "speed-up"
    if in_use is None or not Path(in_use["path"]).is_file():
        return Check(name, SKIP, "not predicted: the server's cost profile is not here")
    try:
        profile = load_profile(in_use["path"])
    except ProfileError as error:
        return Check(name, SKIP, f"not predicted: {error}")
    plain = answers.gained("plain_steps")
    steps = answers.gained("steps") - plain
    if steps <= 0:
        return Check(name, SKIP, "not predicted: nothing was drafted")
    tokens = 1 + answers.gained("drafts_accepted") / steps
    layers = answers.gained("layers_grown") / steps
    rows = (answers.gained("nodes_verified") - plain) / steps
    # Each expanded node has K children, and so has the root; without a draft no one has.
    expanded = answers.gained("nodes_drafted") / steps / topk - 1
    below = max(0, round(layers) - 1)
    widths = [max(1, round(expanded / below))] * below if below else []
    limits = Limits.of_tables(profile)
    model = CostModel(profile, limits)
    context = sum(prompt for prompt, _ in answers.contexts) / len(answers.contexts)
    parts = []
    for batch_size in (size for size in BATCH_SIZES if size <= limits.max_batch_size):
        costs = model.step_costs(batch_size, context)
        extend_rows = tokens if limits.max_width else 0.0
        step = step_units(costs, widths, rows, extend_rows, drafts=True)
        gain = tokens * plain_units(costs) / step
        parts.append(f"{gain:.2f}x at {batch_size}")
    source = "ESTIMATED costs" if in_use["estimated"] else "the cost profile"
    text = f"by {source}, with these trees at every batch size: {', '.join(parts)}"
    return Check(name, OK, text)
