"""What is refused where it arrives: each of these requests would end the scheduler."""

from array import array
from types import SimpleNamespace

import pytest
from sglang.srt.managers.io_struct import SessionParams, TokenizedGenerateReqInput
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from sglang.srt.sampling.sampling_params import TOP_K_ALL, SamplingParams

from cast_sglang.errors import ConfigError
from cast_sglang.serving.host_patches import hooks
from cast_sglang.serving.request_checks import check_count, check_request, check_sampling

VOCABULARY = 100
MANAGER = SimpleNamespace(
    model_config=SimpleNamespace(vocab_size=VOCABULARY),
    enable_metrics=True,
    metrics_collector=SimpleNamespace(labels={"model_name": "m", "team": ""}),
)


@pytest.fixture(autouse=True)
def algorithm(monkeypatch):
    """Return a function that sets the algorithm of this process."""

    def choose(name):
        spec = SimpleNamespace(speculative_algorithm=name)
        monkeypatch.setattr(hooks, "get_spec", lambda: spec)

    choose("CAST")
    return choose


def checked(**params):
    """Return sampling parameters as the scheduler would get them."""
    made = SamplingParams(**params)
    made.normalize(SimpleNamespace(encode=lambda text, **kwargs: [1] * len(text)))
    made.verify(VOCABULARY)
    check_sampling(None, made, VOCABULARY)
    return made


def tokenized(params=None, input_ids=(0, VOCABULARY - 1), **fields):
    fields = {
        "rid": "a",
        "input_text": "a",
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": False,
        **fields,
    }
    return TokenizedGenerateReqInput(
        input_ids=array("q", input_ids), sampling_params=params or checked(), **fields
    )


def check(request, manager=MANAGER, **asked):
    asked = {"lora_path": None, "custom_labels": None, **asked}
    check_request(request, manager, SimpleNamespace(**asked))


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"custom_params": {"cast": "fast"}}, "custom_params.cast"),
        ({"custom_params": "off"}, "custom_params"),
        ({"custom_params": {"cast_pool": 5}}, "custom_params.cast_pool"),
        ({"temperature": 1e39}, "temperature=1e"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty=1e-40"),
        ({"logit_bias": {"3": float("nan")}}, r"logit_bias\[3\]=nan"),
        ({"logit_bias": {"3": float("inf")}}, r"logit_bias\[3\]=inf"),
        ({"logit_bias": {"3": float("-inf")}}, r"logit_bias\[3\]=-inf"),
        ({"logit_bias": {"3": 1e38}}, r"logit_bias\[3\]=1e\+38"),
        ({"logit_bias": {"3": "much"}}, r"logit_bias\[3\]='much'"),
    ],
)
def test_parameters_that_no_sampler_survives_are_refused(algorithm, params, named):
    with pytest.raises(ConfigError, match=named):
        checked(**params)
    algorithm("EAGLE3")
    checked(**params)


def test_parameters_of_every_day_are_left_alone():
    params = {
        "temperature": 3e38,
        "top_k": VOCABULARY + 1,
        "repetition_penalty": 1e-20,
        "logit_bias": {"0": -100, "99": 1e30},
        "stop_token_ids": [0, VOCABULARY - 1],
        "min_new_tokens": 3,
        "custom_params": {"cast": "off", "more": {"deep": [[1]]}},
    }
    made = checked(**params)
    params["stop_token_ids"] = set(params["stop_token_ids"])
    assert {name: getattr(made, name) for name in params} == params
    check(tokenized(made))


def test_numbers_beyond_the_tensors_become_the_largest_of_their_meaning(algorithm):
    params = {"top_k": 2**40, "max_new_tokens": None, "min_new_tokens": 2**40}
    made = checked(**params)
    assert (made.top_k, made.min_new_tokens) == (TOP_K_ALL, TOP_K_ALL)
    algorithm(None)
    assert checked(**params).top_k == 2**40


@pytest.mark.parametrize(
    ("ids", "left"),
    [([-1, 5, VOCABULARY, 2**62], {5}), ([VOCABULARY + 1, -(2**40)], None), ([], None)],
)
def test_stop_tokens_that_no_model_can_say_are_dropped(algorithm, ids, left):
    assert checked(stop_token_ids=ids).stop_token_ids == left
    algorithm("EAGLE")
    assert checked(stop_token_ids=ids).stop_token_ids == (set(ids) or None)


@pytest.mark.parametrize("ids", [[5, -1], [5, VOCABULARY], [5, 2**62], [5, -(2**62), 5]])
def test_tokens_outside_the_vocabulary_are_refused(algorithm, ids):
    request = tokenized(input_ids=ids)
    with pytest.raises(ConfigError, match=rf"input_ids\[1\]={ids[1]}: the vocabulary has 100"):
        check(request)
    # Tokens that stand for media are SGLang's business.
    request.mm_inputs = object()
    check(request)
    request.mm_inputs = None
    algorithm(None)
    check(request)


def test_a_prompt_without_a_token_is_refused(algorithm):
    with pytest.raises(ConfigError, match="text: the prompt has no token"):
        check(tokenized(input_ids=()))
    algorithm(None)
    check(tokenized(input_ids=()))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"top_logprobs_num": VOCABULARY + 1}, "top_logprobs_num=101"),
        ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len=-2"),
        ({"top_logprobs_num": [2]}, "top_logprobs_num"),
        ({"return_logprob": [True]}, "return_logprob"),
        ({"logprob_start_len": [0]}, "logprob_start_len"),
        ({"token_ids_logprob": [[1]]}, "token_ids_logprob"),
        ({"rid": 5}, "rid"),
        ({"priority": "high"}, "priority"),
        ({"token_indices_to_pool": [2]}, r"token_indices_to_pool\[0\]=2: the prompt has 2"),
        ({"multi_item_delimiter_indices": [0, -1]}, r"multi_item_delimiter_indices\[1\]=-1"),
        ({"custom_logit_processor": "much"}, "custom_logit_processor"),
        ({"lora_id": "a"}, "lora_id"),
    ],
)
def test_fields_that_the_scheduler_cannot_take_are_refused(algorithm, fields, named):
    with pytest.raises(ConfigError, match=named):
        check(tokenized(**fields))
    algorithm("EAGLE3")
    check(tokenized(**fields))


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"top_k": 5.5}, "top_k"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stream_interval": "2"}, "stream_interval"),
        ({"json_schema": {"type": "object"}}, "json_schema"),
    ],
)
def test_parameters_of_another_type_are_refused_by_name(params, named):
    """As `sgl.Engine` may bring them; SGLang's HTTP server checks these itself."""
    with pytest.raises(ConfigError, match=named):
        check(tokenized(checked(**params)))


def test_labels_that_no_metric_has_are_refused(algorithm):
    """Prometheus' client raises where the answer is counted, which ends SGLang's server."""
    labels = {"team": "a", "no": "b", "none": "c"}
    with pytest.raises(ConfigError, match=r"custom_labels.no: must be one of model_name, team"):
        check(tokenized(), custom_labels=labels)
    check(tokenized(), custom_labels={"team": "a"})
    check(
        tokenized(),
        SimpleNamespace(**{**vars(MANAGER), "enable_metrics": False}),
        custom_labels=labels,
    )
    algorithm(None)
    check(tokenized(), custom_labels=labels)


@pytest.mark.parametrize("params", [{"n": 2**40}, [{"n": 2**40}, {"n": 2**40}]])
def test_more_answers_than_memory_are_refused(algorithm, params):
    def count(params, text="a", input_ids=None):
        check_count(SimpleNamespace(sampling_params=params, text=text, input_ids=input_ids))

    with pytest.raises(ConfigError, match=rf"n={2**40}: must be in \[1, 65536\]"):
        count(params)
    for good in (None, [], {}, {"n": 65536}, {"n": None}, {"n": 0}, [{}]):
        count(good)
        count(good, None, [5])
    for several in ({"text": ["a", "b"]}, {"text": None, "input_ids": [[5], [6]]}):
        with pytest.raises(ConfigError, match="n=0"):
            count({"n": 0}, **several)
        count({"n": 1}, **several)
    algorithm("EAGLE")
    count(params)


def test_good_requests_pass():
    check(tokenized(input_ids=(), session_params=SessionParams(id="one that has a text")))
    check(tokenized(input_ids=(), input_embeds=[[0.5]]))
    check(tokenized(top_logprobs_num=VOCABULARY, return_logprob=True, token_ids_logprob=[1]))
    check(tokenized(token_indices_to_pool=[0, 1], multi_item_delimiter_indices=[1]))
    check(tokenized(lora_id="id"), lora_path="adapter")
    check(tokenized(logprob_start_len=-2))  # without log probabilities it is not read
    request = tokenized(custom_logit_processor=DisallowedTokensLogitsProcessor.to_str())
    check(request)
    assert request.sampling_params.custom_params == {}
    check(SimpleNamespace(input_ids=[-1]))  # of another kind, as those for embeddings
