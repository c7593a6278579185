"""Odd requests end alone: with an answer or an error of their own, and nobody else notices.

All are sent at once, beside greedy ones, to a server so small that it retracts requests.
Lengths and memory at their limits have `limits`, modes `modes`.
"""

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

from benchmarks.harness.servers import Server
from tests.server.client import GREEDY, REQUEST_SECONDS, generate, in_parallel, loads
from tests.server.conftest import REQUEST_FLAGS, ServerFactory
from tests.server.test_server_limits import token_ids

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

CONTEXT, VOCABULARY = 512, 2048
PROCESSOR = DisallowedTokensLogitsProcessor.to_str()
NUM_GOOD, GOOD_TOKENS = 12, 48
NAN, INFINITY = float("nan"), float("inf")
NUMBERS = ("temperature", "top_p", "min_p", "frequency_penalty", "max_new_tokens")


def sampled(**params: Any) -> dict[str, Any]:
    return {"sampling_params": {"temperature": 1.0, "max_new_tokens": 12, **params}}


def greedy(**params: Any) -> dict[str, Any]:
    return {"sampling_params": {**GREEDY, "max_new_tokens": 12, **params}}


def processed(**params: Any) -> dict[str, Any]:
    return greedy(**params) | {"custom_logit_processor": PROCESSOR}


# What is asked for, and what the error says; None where there may be an answer as well.
ODD: list[tuple[dict[str, Any], str | None]] = [
    *(({"input_ids": [5, token, 7]}, "input_ids[1]") for token in (-1, VOCABULARY, 10**6, 2**62)),
    ({"input_ids": [-1], **sampled()}, "input_ids[0]"),
    ({"input_ids": [[5, 6], [5, VOCABULARY]], **greedy()}, "input_ids[1]"),
    ({"input_ids": [2**64]}, ""),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [0]}, None),
    ({"input_ids": [VOCABULARY - 1], **greedy()}, None),
    ({"input_ids": [5] * CONTEXT}, ""),
    ({"text": ""}, "no token"),
    ({"text": "\ud800"}, None),
    *((sampled(max_new_tokens=count), None) for count in (0, 1, None)),
    (sampled(max_new_tokens=2**62), ""),
    (sampled(max_new_tokens=-1), "max_new_tokens"),
    (greedy(max_new_tokens=0), None),
    *((sampled(n=count), None) for count in (0, -1, 3)),
    (sampled(n=2**40), "n="),
    ({"input_ids": [[5], [6]], **sampled(n=0)}, "n="),
    ({"text": ["a", "b"], **sampled(n=-1)}, "n="),
    *((sampled(temperature=value), None) for value in (1e-9, 1e-6, 1e-5, 3e38)),
    *((sampled(temperature=value), "temperature") for value in (-1.0, 1e300)),
    (sampled(temperature=1e300, regex="[a-z]+"), "temperature"),
    *((sampled(top_p=value), None) for value in (1e-50, 1e-7, 0.999999999)),
    *((sampled(top_p=value), "top_p") for value in (0.0, -0.5, 1.5)),
    *((sampled(top_k=value), None) for value in (-1, 1, VOCABULARY + 1, 2**31, 2**62)),
    *((sampled(top_k=value), "top_k") for value in (0, -2)),
    *((sampled(min_p=value), None) for value in (1e-50, 1.0)),
    (sampled(top_k=2**40, top_p=1e-30, min_p=1.0), None),
    *((sampled(frequency_penalty=value), "frequency_penalty") for value in (-2.1, 1e9)),
    # Python's JSON has numbers that are none; SGLang's does not take them.
    *((sampled(**{name: value}), "JSON") for name in NUMBERS for value in (NAN, INFINITY)),
    *((sampled(repetition_penalty=value), "repetition_penalty") for value in (0.0, 1e-40, 2.5)),
    *((sampled(repetition_penalty=value), None) for value in (1e-20, 2.0)),
    *((sampled(logit_bias={key: 1.0}), "logit_bias") for key in ("-1", "2048", "9" * 30)),
    (sampled(logit_bias={"x": 1.0}), "invalid literal"),
    *((sampled(logit_bias={"5": value}), "logit_bias") for value in (1e39, 1e38)),
    (sampled(logit_bias={"5": "x"}), "invalid type"),
    (sampled(logit_bias={str(token): -1e30 for token in range(VOCABULARY)}), None),
    (sampled(logit_bias={"5": -1e30}, temperature=1e-6), None),
    *((sampled(stop_token_ids=ids), None) for ids in ([-1], [VOCABULARY], [2**62], [])),
    *(
        (sampled(min_new_tokens=4, stop_token_ids=ids), None)
        for ids in ([-1, 5], [VOCABULARY], [VOCABULARY + 1], [2**31], [-(2**62)])
    ),
    (sampled(min_new_tokens=2**40, max_new_tokens=None), None),
    (sampled(min_new_tokens=20), "min_new_tokens"),
    (sampled(min_new_tokens=-1), "min_new_tokens"),
    *((sampled(stop=stop), None) for stop in ("", [""], ["", "x"], ["x" * 5000], [])),
    (sampled(stop=["x"] * 40), "stop"),
    *((sampled(stop_regex=stop), None) for stop in ("", ".*", "()")),
    *((sampled(regex=regex), None) for regex in ("", "()", "[", "(", "a{3,1}", "\\", "a?" * 50)),
    *((sampled(json_schema=text), None) for text in ("", "{", "5", '{"type": "no"}')),
    *((sampled(ebnf=text), None) for text in ("", "root ::=", "x", 'root ::= "a" root')),
    *((sampled(structural_tag=text), None) for text in ("", "{", "{}", '{"structures": 1}')),
    (sampled(regex="a+", json_schema="{}"), "Only one"),
    (sampled(regex="ab", min_new_tokens=8), None),  # the end alone is allowed, and forbidden
    (greedy(regex="ab", min_new_tokens=8), None),
    *((sampled(sampling_seed=seed), None) for seed in (0, -(2**63), 2**63 - 1)),
    *((sampled(stream_interval=value), None) for value in (0, -1, 2**40)),
    *((sampled(custom_params=params), "custom_params") for params in ("x", [1], {"cast": [1]})),
    (sampled(custom_params={"cast": "off", "deep": {"er": [[{}]]}, "__req__": 1}), None),
    (processed(), "token_ids"),
    (processed(custom_params={"token_ids": "x"}), ""),
    (processed(custom_params={"token_ids": [VOCABULARY]}), ""),
    *((processed(custom_params={"token_ids": [token]}), None) for token in (5, 6)),
    ({**greedy(), "custom_logit_processor": "{}"}, "custom_logit_processor"),
    *(({"return_logprob": True, "logprob_start_len": n}, None) for n in (-1, 0, 1, 11)),
    ({"return_logprob": True, "logprob_start_len": -5}, "logprob_start_len"),
    ({"return_logprob": True, "logprob_start_len": 10**6}, "logprob_start_len"),
    ({"return_logprob": True, "logprob_start_len": [0]}, "logprob_start_len"),
    *(({"return_logprob": True, "top_logprobs_num": n}, None) for n in (-1, 0, VOCABULARY)),
    *(({"return_logprob": True, "top_logprobs_num": n}, "top_logprobs") for n in (2049, 2**40)),
    *(({"return_logprob": True, "token_ids_logprob": ids}, "") for ids in ([-1], [VOCABULARY])),
    ({"return_logprob": [True], **greedy()}, "return_logprob"),
    ({"return_hidden_states": True}, "hidden"),
    ({"token_indices_to_pool": [10**6], **greedy(max_new_tokens=0)}, "token_indices_to_pool"),
    ({"multi_item_delimiter_indices": [-9], **greedy(max_new_tokens=0)}, "multi_item"),
    ({"return_routed_experts": True, **greedy()}, None),
    ({"return_routed_experts": True, "routed_experts_start_len": -1}, None),
    ({"session_params": {"id": "nobody"}}, ""),
    ({"session_params": {"id": 5}}, ""),
    ({"lora_path": "nobody"}, ""),
    ({"lora_id": "nobody"}, "lora_id"),
    ({"custom_labels": {"of": "mine"}}, "custom_labels.of"),
    ({"priority": 2**62}, None),
    ({"rid": ""}, None),
]


@pytest.fixture(scope="module")
def server(start_server: ServerFactory) -> Iterator[Server]:
    flags = (*REQUEST_FLAGS, "--enable-metrics", "--cast-residuals", "off", "--cast-copying", "on")
    # The cache has room for one of the longest, and for the rows that some of the others reserve;
    # nearly all are let in, so some are retracted.
    limits = ("--context-length", str(CONTEXT), "--max-total-tokens", "768")
    lets_in = ("--schedule-conservativeness", "0.1")
    with start_server("cast", *flags, *limits, *lets_in, name="cast-hostile") as server:
        yield server


@pytest.fixture(scope="module")
def good() -> list[list[int]]:
    """Prompts of some ten tokens, two of each."""
    text = token_ids()
    return [text[40 * i : 40 * i + 10 + i] for i in range(NUM_GOOD)] * 2


@pytest.fixture(autouse=True)
def still_well(server):
    """After every test the server is healthy, and holds nothing."""
    yield
    assert httpx.get(f"{server.url}/health_generate", timeout=60.0).is_success
    server.check()
    server.flush_cache()
    assert loads(server)["num_used_tokens"] == 0


def post(server: Server, body: dict[str, Any], path: str = "/generate") -> httpx.Response:
    content, headers = json.dumps(body), {"Content-Type": "application/json"}
    url = f"{server.url}{path}"
    return httpx.post(url, content=content, headers=headers, timeout=REQUEST_SECONDS)


def answer_of(server: Server, prompt: list[int]) -> list[int]:
    ids: list[int] = generate(server, prompt, max_new_tokens=GOOD_TOKENS)["output_ids"]
    return ids


def send_odd(server: Server, odd: tuple[dict[str, Any], str | None]) -> str | None:
    """Send an odd request; return what is wrong with its end, None for nothing."""
    body, says = odd
    if not {"text", "input_ids"} & body.keys():
        body = {"input_ids": list(range(5, 17)), **body}
    if "sampling_params" not in body:
        body = {**body, **greedy()}
    response = post(server, body)
    if response.is_success and says is None:
        return None
    if 400 <= response.status_code < 500 and (says or "") in response.text:
        return None
    return f"{body} got {response.status_code}: {response.text[:200]}"


def test_odd_requests_end_alone(server, good):
    alone = [answer_of(server, prompt) for prompt in good[:NUM_GOOD]] * 2
    jobs: list[tuple[str, int]] = [("odd", number) for number in range(len(ODD))]
    jobs += [("good", number) for number in range(len(good))] * 3
    random.Random(0).shuffle(jobs)

    def run(job: tuple[str, int]) -> str | None:
        kind, number = job
        if kind == "odd":
            return send_odd(server, ODD[number])
        ids = answer_of(server, good[number])
        return None if ids == alone[number] else f"good {number}: {ids} is not {alone[number]}"

    wrong = [result for result in in_parallel(run, jobs, workers=16) if result is not None]
    assert not wrong, "\n".join(wrong)


def test_requests_that_vanish_or_share_a_name(server, good):
    alone = [answer_of(server, prompt) for prompt in good[:NUM_GOOD]]

    def run(number: int) -> None:
        kind = number % 3
        body = {"input_ids": good[number], **greedy(max_new_tokens=200), "rid": f"odd-{kind}"}
        if kind == 0:  # many of one name: one is served at a time, the others are refused
            response = post(server, body)
            assert response.is_success or "Duplicate request ID" in response.text
        elif kind == 1:  # aborted at once, whichever has the name
            post(server, {"rid": body["rid"]}, "/abort_request")
            with contextlib.suppress(httpx.ReadTimeout):
                url = f"{server.url}/generate"
                httpx.post(url, json={**body, "rid": f"odd-{number}"}, timeout=0.05)
            post(server, {"rid": f"odd-{number}"}, "/abort_request")
        else:
            assert answer_of(server, good[number]) == alone[number % NUM_GOOD]

    in_parallel(run, list(range(len(good))), workers=12)


def test_min_new_tokens_are_counted_through_retractions(server, good):
    prompts = good[:NUM_GOOD]
    said = Counter(token for prompt in prompts for token in answer_of(server, prompt))
    # So common that an answer ends soon after it may.
    params = {
        "min_new_tokens": 80,
        "stop_token_ids": [token for token, _ in said.most_common(12)],
        "ignore_eos": False,
    }

    def ask(prompt: list[int]) -> dict[str, Any]:
        answer: dict[str, Any] = generate(server, prompt, max_new_tokens=160, **params)
        return answer

    alone = [ask(prompt)["output_ids"] for prompt in prompts]
    lengths = {len(ids) for ids in alone}
    assert 80 < min(lengths) < max(lengths)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, prompt) for prompt in prompts]
        while not all(answer.done() for answer in asked):
            time.sleep(0.5)
            post(server, {"mode": "retract"}, "/pause_generation").raise_for_status()
            post(server, {}, "/continue_generation").raise_for_status()
    together = [answer.result() for answer in asked]
    assert [answer["output_ids"] for answer in together] == alone
    # Those that were, when their answers were still too short to end, count on.
    assert sum(answer["meta_info"]["num_retractions"] for answer in together) >= NUM_GOOD // 2


def test_other_front_doors_have_the_same_guard(server):
    for fields in (
        {"prompt": [5, VOCABULARY]},
        {"prompt": [[5], [-1]]},
        {"logit_bias": {"99999": 1}},
        {"logprobs": 10**6},
        {"temperature": "hot"},
        {"max_tokens": -1},
    ):
        body = {"model": "default", "max_tokens": 4, "prompt": "x", **fields}
        response = post(server, body, "/v1/completions")
        assert 400 <= response.status_code < 500, f"{fields}: {response.text}"
    messages = [{"role": "user", "content": "x"}]
    body = {"model": "default", "messages": messages, "logprobs": True, "top_logprobs": 10**6}
    assert post(server, body, "/v1/chat/completions").status_code == 400
