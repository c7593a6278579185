"""Sampled tokens have the law of plain decoding, for every parameter that shapes it.

`--law-samples N` takes other numbers of samples, `-m extended` 5,000; `-rP --log-level INFO` shows
the p-values.
"""

import logging

import numpy as np
import pytest

from benchmarks.harness.servers import Server
from tests.server.client import generate, in_parallel
from tests.server.homogeneity import homogeneity_p_value

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(7200)]

# Far below what chance produces in the life of this suite, far above what a bias produces.
ALPHA = 1e-6
SAMPLES_PER_REQUEST = 240
NUM_TOKENS = 3

LAWS = {
    "cool": {"temperature": 0.6},
    "cool top_p": {"temperature": 0.6, "top_p": 0.8},
    "cool top_k": {"temperature": 0.6, "top_k": 6},
    "cool min_p": {"temperature": 0.6, "min_p": 0.1},
    "warm": {"temperature": 1.0},
    "warm top_p": {"temperature": 1.0, "top_p": 0.7},
    "warm top_k": {"temperature": 1.0, "top_k": 5},
    "warm top_k and top_p": {"temperature": 1.0, "top_k": 5, "top_p": 0.8},
    "warm min_p": {"temperature": 1.0, "min_p": 0.3},
    "warm logit_bias": {"temperature": 1.0, "top_p": 0.9, "logit_bias": {"221": 2.0, "201": -1.0}},
    "warm regex": {"temperature": 1.0, "regex": r"[a-z ]{10,40}\n"},
    "hot": {"temperature": 1.5},
    "hot top_p": {"temperature": 1.5, "top_p": 0.9},
    "hot min_p": {"temperature": 1.5, "min_p": 0.9},
    "hot with all cuts": {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}
PENALISED = {
    "cool penalties": {"temperature": 0.6, "frequency_penalty": 0.5},
    "warm penalties": {"temperature": 1.0, "frequency_penalty": 1.0, "presence_penalty": 0.5},
    "hot penalties": {"temperature": 1.5, "repetition_penalty": 1.3},
}


def sample(server: Server, prompt: str, num_samples: int, **sampling: object) -> list[np.ndarray]:
    """Return [n, NUM_TOKENS] sampled tokens and [n] the passes that they took, of n >= num_samples.

    The first token comes from prefill. Plain decoding counts no passes.
    """
    answers: list[dict] = []
    while len(answers) < num_samples:
        answers += generate(
            server, prompt, n=SAMPLES_PER_REQUEST, max_new_tokens=NUM_TOKENS, **sampling
        )
    passes = [answer["meta_info"].get("spec_verify_ct", 0) for answer in answers]
    return [np.array([answer["output_ids"] for answer in answers]), np.array(passes)]


@pytest.mark.parametrize("name", [*LAWS, *PENALISED])
def test_sampled_tokens_have_the_law_of_plain_decoding(plain, cast, prompts, name, pytestconfig):
    check_law(plain, cast, prompts[0], name, pytestconfig.getoption("--law-samples"))


@pytest.mark.extended
@pytest.mark.parametrize("name", [*LAWS, *PENALISED])
def test_many_sampled_tokens_have_it_too(plain, cast, prompts, name):
    check_law(plain, cast, prompts[0], name, 5000)


def check_law(plain: Server, cast: Server, prompt: str, name: str, num_samples: int) -> None:
    """Compare the laws of the first three tokens; log their p-values."""
    sampling = LAWS.get(name) or PENALISED[name]
    (ours, passes), (theirs, _) = in_parallel(
        lambda server: sample(server, prompt, num_samples, **sampling),
        [cast, plain],
        workers=2,
    )
    # Drafts are accepted as long as the law allows them; where one was, two tokens took one pass.
    assert (passes == 1).any() == (name in LAWS)
    p_values = [
        homogeneity_p_value(ours[:, of], theirs[:, of])
        for last in range(NUM_TOKENS)
        for of in (slice(last, last + 1), slice(0, last + 1))
    ]
    text = " ".join(f"{p:.2g}" for p in p_values)
    logging.info("%s: p %s of each token and of all up to it, %d samples", name, text, len(ours))
    assert min(p_values) > ALPHA


def test_the_comparison_of_laws_finds_a_biased_sampler():
    """A sampler that takes the likeliest token a little too often, as a wrong verify rule would."""
    rng = np.random.default_rng(0)
    probs = np.array([0.45, 0.25, 0.15, 0.1, 0.05])
    biased = 0.8 * probs + 0.2 * np.array([1.0, 0, 0, 0, 0])

    def draw(p: np.ndarray) -> np.ndarray:
        return rng.choice(len(p), size=(2400, 1), p=p)

    assert homogeneity_p_value(draw(probs), draw(probs)) > ALPHA
    assert homogeneity_p_value(draw(biased), draw(probs)) < ALPHA
