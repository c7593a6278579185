"""Mixed requests: every kind is drawn, and what is wrong with an answer is seen."""

import pytest

from benchmarks.harness.mixed_load import KINDS, Ask, Outcome, judge, make_asks, outcome_of

CONTEXT, POOL = 512, 1536
GREEDY = Ask("short", [1], {"temperature": 0.0, "max_new_tokens": 3}, {})
SAMPLED = GREEDY._replace(sampling={"temperature": 1.0, "max_new_tokens": 3})
ANSWER = Outcome("answered", [5, 6, 7], "length")


def test_requests_of_every_kind_fit_the_server():
    asks = make_asks(range(9000), CONTEXT, POOL, 3 * len(KINDS), seed=0)
    assert [ask.kind for ask in asks] == list(KINDS) * 3
    for ask in asks:
        length = len(ask.fields.get("input_ids", ask.prompt))
        assert (length > CONTEXT) == (ask.kind == "refused")
        if ask.kind != "refused":
            assert length + ask.sampling["max_new_tokens"] <= min(CONTEXT, POOL // 2)
        assert ask.is_greedy == (ask.kind != "sampled")
    assert max(len(ask.prompt) for ask in asks) > CONTEXT - 45
    turns = [ask for ask in asks if ask.kind == "turn"]
    assert [asks[ask.follows].kind for ask in turns] == ["short"] * 3
    first, second, _ = (ask.prompt for ask in asks if ask.kind == "prefix")
    assert first[:100] == second[:100] != first[-100:]
    assert asks == make_asks(range(9000), CONTEXT, POOL, 3 * len(KINDS), seed=0)


def test_answers_are_read():
    info = {"finish_reason": {"type": "length"}}
    assert outcome_of(200, {"output_ids": [5, 6, 7], "meta_info": info}) == ANSWER
    aborted = {"finish_reason": {"type": "abort", "message": "gone"}}
    assert outcome_of(200, {"output_ids": [5], "meta_info": aborted}).end == "aborted"
    aborted["finish_reason"]["status_code"] = 400
    assert outcome_of(200, {"output_ids": [], "meta_info": aborted}).end == "refused"
    queued = {"finish_reason": {**aborted["finish_reason"], "message": "Aborted by AbortReq."}}
    assert outcome_of(200, {"output_ids": [], "meta_info": queued}).end == "aborted"
    refused = {"error": {"message": "the input is longer than the context", "code": 400}}
    assert outcome_of(400, refused).end == outcome_of(200, refused).end == "refused"
    assert outcome_of(503, {"error": {"message": "no"}}).end == "aborted"


@pytest.mark.parametrize(
    ("ask", "outcome", "allowed", "problem"),
    [
        (GREEDY, ANSWER, set(), None),
        (GREEDY, ANSWER._replace(tokens=[5, 6, 8]), set(), "altered"),
        (GREEDY, ANSWER._replace(tokens=[5, 6]), {"aborted"}, "altered"),
        (GREEDY, ANSWER._replace(reason="stop"), set(), "altered"),
        (SAMPLED, ANSWER._replace(tokens=[9, 9, 9]), set(), None),
        (SAMPLED, ANSWER._replace(tokens=[9, 9, 9, 9]), set(), "altered"),
        (GREEDY, Outcome("aborted", [5, 6]), {"aborted"}, None),
        (GREEDY, Outcome("aborted", [5, 6, 7, 8]), {"aborted"}, None),
        (GREEDY, Outcome("aborted", [5, 7]), {"aborted"}, "altered"),
        (SAMPLED, Outcome("aborted", [5, 7]), {"aborted"}, None),
        (GREEDY, Outcome("aborted", [5]), {"vanished"}, "lost"),
        (GREEDY, Outcome("broken", []), {"broken"}, None),
        (GREEDY, Outcome("broken", []), set(), "lost"),
        (GREEDY, Outcome("lost", []), {"aborted", "broken", "vanished"}, "lost"),
        (GREEDY, Outcome("refused", []), {"aborted", "broken", "vanished"}, "lost"),
    ],
)
def test_what_is_wrong_is_seen(ask, outcome, allowed, problem):
    found = judge(ask, outcome, ANSWER, allowed)
    assert (found and found.partition(":")[0]) == problem


def test_what_plain_decoding_refuses_is_to_be_refused():
    refused = Outcome("refused", [])
    assert judge(GREEDY, refused, refused, set()) is None
    assert judge(GREEDY, ANSWER, refused, set()).startswith("lost")
