"""CAST changes which tree is verified, never what comes out."""

import pytest

from tests.server.client import generate, greedy_ids
from tests.server.conftest import NUM_TOKENS, ServerFactory

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("batch", [1, 8])
def test_greedy_tokens_equal_plain_decoding(cast, prompts, expected_ids, batch):
    assert greedy_ids(cast, prompts, batch, NUM_TOKENS) == expected_ids


def test_plain_decoding_answers_alone_as_in_a_batch(plain, prompts, expected_ids):
    """So it does not matter how the answers were made that all others are compared with."""
    assert greedy_ids(plain, prompts[:8], 1, NUM_TOKENS) == expected_ids[:8]


def test_trees_differ_in_size_from_step_to_step(cast, prompts):
    def shapes() -> tuple[int, int, int]:
        stats = cast.get("/server_info")["internal_states"][0]["cast"]
        return stats["steps"], stats["requests"], stats["nodes_verified"]

    seen = set()
    for prompt in prompts[:10]:
        steps, _, verified = shapes()
        generate(cast, prompt, max_new_tokens=NUM_TOKENS)
        after, _, verified_after = shapes()
        seen.add((verified_after - verified) / (after - steps))
    assert len(seen) > 1


def test_long_prompts_in_chunks_and_shared_prefixes(plain, cast, prompts):
    # Some 1,500 tokens, a dozen chunks; then the same with another end.
    shared = "\n".join(prompts[:12])
    for ending in prompts[12:15]:
        outputs = {}
        for server in (plain, cast):
            answer = generate(server, shared + ending, max_new_tokens=NUM_TOKENS)
            outputs[server.name] = answer["output_ids"]
        assert outputs["cast"] == outputs["plain"]
    assert answer["meta_info"]["cached_tokens"] > 500


def test_prefix_of_an_answer_is_reused(plain, cast, prompts):
    # The KV of tokens that speculation committed becomes the prefix of the next request.
    first = generate(cast, prompts[0], max_new_tokens=96)["text"]
    again = generate(cast, prompts[0] + first, max_new_tokens=NUM_TOKENS)
    assert again["meta_info"]["cached_tokens"] > again["meta_info"]["prompt_tokens"] - 32
    plain_answer = generate(plain, prompts[0] + first, max_new_tokens=NUM_TOKENS)
    assert again["output_ids"] == plain_answer["output_ids"]


def test_eagle_policy_is_sglangs_own_tree(start_server: ServerFactory, prompts, expected_ids):
    """The same tree accepts the same drafts, so every request takes as many verify passes."""
    envelope = ("--speculative-num-steps", "5", "--speculative-eagle-topk", "4")
    envelope += ("--speculative-num-draft-tokens", "8")
    passes = {}
    for arm, flags in (("static:5-4-8", ()), ("cast:eagle", envelope)):
        with start_server(arm, *flags) as server:
            answers = generate(server, prompts[:16], max_new_tokens=NUM_TOKENS)
            assert [answer["output_ids"] for answer in answers] == expected_ids[:16]
            passes[arm] = [answer["meta_info"]["spec_verify_ct"] for answer in answers]
    assert passes["cast:eagle"] == passes["static:5-4-8"]
