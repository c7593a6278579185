"""The automaton against a look through the whole text."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.copying.automaton import (
    HEADER,
    MAX_LINKS,
    SuffixIndex,
    copy_of,
    descend,
    longest_match,
)
from cast_sglang.copying.reference import Text


def add(index, request, tokens):
    return index.add(request, np.array(tokens, np.int64))


def block_of(index, request):
    [(base, capacity)] = index.blocks([request]).tolist()
    return index.ints[base : base + HEADER + 25 * capacity], capacity


def num_further_edges(block, capacity):
    return int((block[HEADER + 17 * capacity :].reshape(-1, 4)[:, 0] >= 0).sum())


def check(index, request, text, paths):
    """Compare all that a step asks, below the text's end and along paths of further tokens."""
    block = block_of(index, request)
    state, length = longest_match(*block)
    context = text.longest_match()
    assert length == len(context)
    for path in [(), *paths]:
        at, known, expected = state, length, context
        for token in path:
            at, known = descend(*block, at, known, token)
            expected = text.descend(expected, token)
            assert known == len(expected)
        token, known, _, count, same = copy_of(*block, at, known)
        assert (token, known, count, same) == text.copy_of(expected), (text.tokens, path)


@settings(max_examples=120, deadline=None)
@given(
    texts=st.lists(st.lists(st.integers(0, 3), max_size=24), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 9), min_size=24, max_size=24),
    paths=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), max_size=4),
)
def test_it_finds_what_a_look_through_the_text_finds(texts, cuts, paths):
    """Texts short enough for every context to be noted, in pieces, several requests in turn."""
    index = SuffixIndex(1 << 12)
    told = [[] for _ in texts]
    for cut in cuts:
        for request, text in enumerate(texts):
            piece = text[len(told[request]) : len(told[request]) + cut]
            if piece and len(told[request]) + len(piece) <= MAX_LINKS:
                assert add(index, request, piece)
                told[request] += piece
                assert index.num_tokens(request) == len(told[request])
                assert index.text(request).tolist() == told[request]
                check(index, request, Text(told[request]), paths)


def test_a_block_grows_with_all_that_it_knows():
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 40, 700).tolist()
    index = SuffixIndex(1 << 14)
    sizes = set()
    for start in range(0, 700, 50):
        assert add(index, "a", tokens[start : start + 50])
        sizes.add(block_of(index, "a")[1])
        paths = [tokens[at : at + 3] for at in rng.integers(0, start + 1, 3)]
        check(index, "a", Text(tokens[: start + 50]), paths)
    assert sizes == {64, 128, 256, 512, 1024}


@pytest.mark.parametrize("tokens", [[7] * 1000, [7, 8] * 500, [1, 2, 3] * 333 + [1, 2]])
def test_text_that_repeats_itself_costs_no_more_than_other_text(tokens):
    """And goes on as it did; the counts of what is much shorter than the match may lag."""
    index = SuffixIndex(1 << 14)
    for token in tokens:
        assert add(index, "a", [token])
    block = block_of(index, "a")
    state, length = longest_match(*block)
    period = len(set(tokens))
    assert length == len(tokens) - period
    for step in range(2 * period):
        token, *_ = copy_of(*block, state, length)
        assert token == tokens[len(tokens) - period + step % period]
        state, length = descend(*block, state, length, token)
    assert block[0][1] <= 2 * len(tokens) and num_further_edges(*block) < len(tokens)


def test_memory_is_bounded_and_used_again():
    index = SuffixIndex(max_tokens=300)
    assert add(index, "a", range(64)) and add(index, "b", range(64))
    held = index.num_bytes
    assert held <= 300 * 100 and not add(index, "c", range(129)) and "c" not in index
    assert add(index, "c", range(64))
    for request in map(str, range(20)):
        index.keep(["a"])
        assert "b" not in index and "c" not in index
        assert add(index, request, range(100, 164))
    assert index.num_bytes <= 300 * 100
    # What was there before has moved, and is whole.
    check(index, "a", Text(range(64)), [[3, 4]])
    assert index.blocks(["a", "gone"]).tolist()[1] == [-1, 0]
    # A request that outgrows the room is forgotten, not cut.
    assert not add(index, "a", range(250)) and "a" not in index and index.num_tokens("a") == 0
    index.drop("a")


def test_a_long_prompt_takes_states_and_memory_by_its_length_alone():
    """30,000 tokens, as of a file of code that repeats itself, and what it knows is right."""
    rng = np.random.default_rng(0)
    lines = [rng.integers(0, 2000, rng.integers(3, 20)) for _ in range(500)]
    tokens = np.concatenate([lines[i] for i in rng.integers(0, 500, 3000)])[:30_000]
    index = SuffixIndex(1 << 16)
    assert index.add("a", tokens)
    assert index.num_tokens("a") == 30_000 and index.num_bytes <= 100 * 32768 + 100
    block, capacity = block_of(index, "a")
    assert block[1] <= 2 * 30_000 and num_further_edges(block, capacity) < 30_000
    # It goes on as after the latest place before where the longest end of the text stands.
    state, length = longest_match(block, capacity)
    text = tokens.tolist()
    places = [at for at in range(length, 30_000) if text[at - length : at] == text[-length:]]
    assert length > 0 and copy_of(block, capacity, state, length)[0] == text[places[-1]]
    assert not any(
        text[at - length - 1 : at] == text[-length - 1 :] for at in range(length + 1, 30_000)
    )


def test_all_texts_of_two_tokens():
    for size in range(1, 9):
        for tokens in itertools.product((0, 1), repeat=size):
            index = SuffixIndex(1 << 10)
            assert add(index, "a", tokens)
            check(index, "a", Text(tokens), [(0,), (1, 1), (0, 1, 0)])
