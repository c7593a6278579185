"""Pools: what is shared, with whom, and how much of it is kept."""

import numpy as np
import pytest

from cast_sglang.copying.automaton import SuffixIndex
from cast_sglang.copying.chances import Chances
from cast_sglang.copying.contexts import roots_of
from cast_sglang.copying.graft import graft
from cast_sglang.copying.pools import Pools, pool_key

PROMPT = 20


class Server:
    """Requests with texts of their own, and the pools of some of them."""

    def __init__(self, room=1 << 15, pool_room=1 << 14):
        self.room, self.pool_room = room, pool_room
        self.index = SuffixIndex(room + pool_room)
        self.pools = Pools(self.index, pool_room)
        self.running = {}

    def run(self, **pools):
        """Let requests run, each of the pool of this name; None for none."""
        self.running = {request: pool and pool_key(pool) for request, pool in pools.items()}
        self.pools.run((request, pool, PROMPT) for request, pool in self.running.items())
        self.index.keep([*self.running, *self.pools.keys])

    def say(self, request, tokens):
        assert self.index.add(request, np.array(tokens, np.int64))

    def copies_of(self, request, max_depth=8):
        """Return what is copied below the root of a request's tree, whatever it is worth."""
        self.pools.update()
        pools = self.pools.blocks([request])
        roots = roots_of(self.index.ints, self.index.blocks([request]), pools)
        nothing = np.empty((1, 0), np.int64)
        found = graft(
            *(self.index.ints, roots, nothing, nothing.astype(np.float32), nothing, 1),
            *(Chances().table(), np.zeros(1, np.int64)),
            num_nodes=max_depth,
            max_depth=max_depth,
            least_scores=np.zeros(1, np.float32),
            vocab_size=10_000,
        )
        return found.tokens[0, : found.counts[0]].tolist()


def text(seed, size=200):
    return np.random.default_rng(seed).permutation(9_000)[:size].tolist()


def test_a_request_copies_what_another_of_its_pool_answered():
    """While both run, and when the other has ended, down to its last token."""
    server, answer = Server(), text(1)
    server.run(a="one", b="one")
    server.say("a", [*range(9_000, 9_000 + PROMPT), *answer[:150]])
    server.say("b", [*range(9_100, 9_100 + PROMPT), *answer[:40]])
    assert server.copies_of("b") == answer[40:48]
    server.say("a", answer[150:])
    server.run(b="one")
    server.say("b", answer[40:190])
    assert server.copies_of("b") == answer[190:198]
    # The request's own text comes first where it says as much.
    server.say("b", [*answer[:5], 7, *answer[:5]])
    assert server.copies_of("b")[0] == 7


def test_a_match_goes_on_from_piece_to_piece():
    server, answer = Server(), text(2, 1500)
    server.run(a="one")
    server.say("a", range(9_000, 9_000 + PROMPT))
    for start in range(0, 1500, 7):
        server.say("a", answer[start : start + 7])
        server.copies_of("a")
    server.run(b="one")
    server.say("b", [*range(9_100, 9_100 + PROMPT), answer[0]])
    copied, place = 0, 1
    while place < 1490:
        copies = server.copies_of("b")
        assert copies == answer[place : place + len(copies)]
        copied += len(copies)
        server.say("b", answer[place : place + max(1, len(copies))])
        place += max(1, len(copies))
    assert copied > 1400


def test_of_a_prompt_its_end_alone_is_shared():
    """By which the beginning of an answer is found."""
    server, prompt, answer = Server(), text(3, PROMPT), text(4, 100)
    server.run(a="one", b="one", c="one")
    server.say("a", [*prompt, *answer])
    server.say("b", prompt[:3])
    server.say("c", [7, *prompt])
    assert server.copies_of("b") == [] and server.copies_of("c") == answer[:8]


@pytest.mark.parametrize("name", [None, "two", "one ", "ONE", "one" * 10_000])
def test_no_text_reaches_a_request_of_another_pool(name):
    server, answer = Server(), text(5)
    server.run(a="one", b=name)
    server.say("a", [*range(9_000, 9_000 + PROMPT), *answer])
    server.say("b", [*range(9_100, 9_100 + PROMPT), *answer[:40]])
    assert server.copies_of("b") == []
    server.run(b=name)  # the other has ended
    assert server.copies_of("b") == []
    server.run(c=name)  # and a request that comes later
    server.say("c", [*range(9_200, 9_200 + PROMPT), *answer[80:120]])
    assert server.copies_of("c") == []


def test_two_answers_do_not_run_into_each_other():
    """What stands between them is in no vocabulary, so nothing is copied beyond an answer's end."""
    server, first, second = Server(), text(6, 100), text(7, 100)
    for name, answer in (("a", first), ("b", second)):
        server.run(**{name: "one"})
        server.say(name, [*range(9_000, 9_000 + PROMPT), *answer])
    server.run(c="one")
    server.say("c", [*range(9_100, 9_100 + PROMPT), *first[90:98]])
    assert server.copies_of("c") == first[98:]


@pytest.mark.parametrize("room", [100, 1000, 4097, 30_000])
def test_memory_is_bounded_whatever_is_said(room):
    """Also where the room is no power of two."""
    server = Server(pool_room=room)
    rng = np.random.default_rng(0)
    for number in range(60):
        pools = {f"{number}-{i}": f"pool {rng.integers(12)}" for i in range(3)}
        server.run(**pools)
        for request in pools:
            server.say(request, rng.integers(0, 9_000, PROMPT + rng.integers(0, 900)))
        server.copies_of(next(iter(pools)))
        held = sum(server.index.capacity(key) for key in server.pools.keys)
        assert held <= room
        assert all(server.index.capacity(key) <= max(64, room // 4) for key in server.pools.keys)
    assert server.index.num_bytes <= (server.room + room) * 100 + 4 * 4 * 100


def test_a_pool_that_is_full_forgets_its_older_half():
    server = Server(pool_room=4096)  # of which one pool may take 1,024 tokens
    answers = [text(seed, 400) for seed in range(10, 16)]
    for number, answer in enumerate(answers):
        server.run(**{str(number): "one"})
        server.say(str(number), [*range(9_000, 9_000 + PROMPT), *answer])
    server.run(last="one")
    server.say("last", [*range(9_100, 9_100 + PROMPT), *answers[-1][:40]])
    assert server.copies_of("last") == answers[-1][40:48]
    server.say("last", answers[0][:40])
    assert server.copies_of("last") == []
    assert server.index.capacity(pool_key("one")) <= 1024


def test_pools_that_run_do_not_wipe_each_other():
    """The least recently used goes, and none that runs; a new one waits for room."""
    server = Server(pool_room=512)  # four pools of 128 tokens
    answers = {name: text(seed, 90) for seed, name in enumerate("abcde", start=20)}
    server.run(**{f"first {name}": name for name in "abcd"})
    for name in "abcd":
        server.say(f"first {name}", [*range(9_000, 9_000 + PROMPT), *answers[name]])
    server.pools.update()
    assert len(server.pools.keys) == 4
    server.run(**{f"first {name}": name for name in "abcd"}, new="e")
    server.say("new", [*range(9_000, 9_000 + PROMPT), *answers["e"]])
    server.pools.update()
    assert server.pools.keys == [pool_key(name) for name in "abcd"]
    # One of them has ended, and another one that has was used since.
    server.run(**{"first c": "c", "first d": "d"}, second="a", new="e")
    server.say("second", [*range(9_300, 9_300 + PROMPT), *answers["a"][:20]])
    assert server.copies_of("second") == answers["a"][20:28]
    server.say("new", text(30, 90))
    server.pools.update()
    assert {pool_key("a"), pool_key("c"), pool_key("d")} <= set(server.pools.keys)
    assert pool_key("b") not in server.pools.keys and pool_key("e") in server.pools.keys
