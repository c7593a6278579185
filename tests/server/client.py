"""How the tests talk to a server: SGLang's native interface, with token ids."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from benchmarks.harness.servers import Server

REQUEST_SECONDS = 300.0
GREEDY = {"temperature": 0.0, "ignore_eos": True}


def generate(
    server: Server, prompt: str | list[str] | list[int] | list[list[int]], **sampling: Any
) -> Any:
    """Generate from one prompt, or from a list of prompts at once; return SGLang's answer.

    Args:
        prompt: text or token ids.
        sampling: sampling parameters; `return_logprob` and the like go to the request itself.
    """
    outer = {key: sampling.pop(key) for key in list(sampling) if key.startswith("return_")}
    first = prompt[0] if isinstance(prompt, list) else prompt
    kind = "text" if isinstance(first, str) else "input_ids"
    body = {kind: prompt, "sampling_params": {**GREEDY, **sampling}, **outer}
    response = httpx.post(f"{server.url}/generate", json=body, timeout=REQUEST_SECONDS)
    assert response.is_success, response.text
    return response.json()


def greedy_ids(
    server: Server, prompts: Sequence[str], batch: int, num_tokens: int
) -> list[list[int]]:
    """Decode the prompts greedily, `batch` at a time, and return the tokens of each."""
    outputs: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        wave = list(prompts[start : start + batch])
        answers = generate(server, wave, max_new_tokens=num_tokens)
        outputs += [answer["output_ids"] for answer in answers]
    return outputs


def in_parallel(call: Any, arguments: Sequence[Any], workers: int) -> list[Any]:
    """Call with each argument, `workers` at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(call, arguments))


def loads(server: Server) -> dict[str, Any]:
    """Return what the scheduler holds: running requests, used tokens, ..."""
    return dict(server.get("/v1/loads")["loads"][0])
