"""Copies in a serving loop: texts stay those of the requests, whatever happens to these."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cast_sglang.config import CastConfig
from cast_sglang.copying.automaton import SuffixIndex, copy_of, descend, longest_match
from cast_sglang.ops import loops
from cast_sglang.serving.copies import _MOST_READ, Copies
from cast_sglang.serving.host_reads import HostReads
from cast_sglang.serving.step import Drafted, Verified
from cast_sglang.tree import DraftTree

TOPK, NODES, DEPTH, VOCAB = 3, 7, 6, 50


class Request:
    """Like SGLang's, one that equals itself alone."""

    def __init__(self, rid, text, num_prompt, top_k):
        self.rid, self.text = rid, text
        self.origin_input_ids, self.output_ids = list(text[:num_prompt]), [text[num_prompt]]
        self.sampling_params = SimpleNamespace(top_k=top_k, custom_params=None)


class Server:
    """Serves requests greedily: each has a text of its own that its target says, step by step."""

    def __init__(self, max_tokens=1 << 14, pool_tokens=0):
        self.copies = Copies(
            HostReads("cpu"),
            topk=TOPK,
            num_nodes=NODES,
            max_tokens=max_tokens,
            pool_tokens=pool_tokens,
            vocab_size=VOCAB,
        )
        self.rng = np.random.default_rng(0)
        self.num_copied = 0

    def request(self, rid, text, num_prompt, top_k=1):
        return Request(rid, text, num_prompt, top_k)

    def length(self, req):
        return len(req.origin_input_ids) + len(req.output_ids)

    def step(self, reqs, weights=None, is_plain=False):
        """Run a step; return the new tokens of each request."""
        if is_plain:
            paths, selection = [[] for _ in reqs], None
        else:
            paths, selection = self.draft(reqs, weights)
        new = [
            req.text[(size := self.length(req)) : size + len(path) + 1]
            for req, path in zip(reqs, paths, strict=True)
        ]
        rows = 1 if selection is None else selection.draft_tokens.shape[1] + 1
        tokens = np.full((len(reqs), rows + 1), -1)
        accept_index = np.full((len(reqs), rows + 1), -1, np.int32)
        for b, (row, path) in enumerate(zip(new, paths, strict=True)):
            tokens[b, : len(row)] = row
            accept_index[b, : len(path) + 1] = [b * rows, *(b * rows + r for r in path)]
        self.copies.on_verified(
            reqs,
            Verified(
                num_draft_tokens=rows,
                accept_index=torch.from_numpy(accept_index),
                accept_lens=torch.tensor([len(row) for row in new], dtype=torch.int32),
                tokens=torch.from_numpy(tokens).flatten().int(),
                logits=torch.empty(0),
                sampling_info=None,
            ),
        )
        for req, row in zip(reqs, new, strict=True):
            req.output_ids += row
        return new

    def draft(self, reqs, weights):
        batch = SimpleNamespace(
            reqs=list(reqs),
            spec_info=SimpleNamespace(bonus_tokens=torch.tensor([r.output_ids[-1] for r in reqs])),
            seq_lens=torch.tensor([self.length(req) - 1 for req in reqs]),
        )
        copies = self.copies
        drawn = np.array([req.sampling_params.top_k > 1 for req in reqs])
        least = np.full(len(reqs), 1e-3, np.float32)
        copies.begin_step(batch, weights, drawn if drawn.any() else None, DEPTH, least)

        def children(rows):
            tokens = np.stack([self.rng.permutation(VOCAB)[:TOPK] for _ in range(rows)])
            return torch.from_numpy(tokens), torch.full((rows, TOPK), 0.2)

        tree = DraftTree(*children(len(reqs)), DEPTH, loops)
        copies.start()
        found = copies.look(tree.newest)
        if found is not None:
            best, left = found
            assert best.shape == (len(reqs), NODES) and left.shape == (len(reqs), TOPK)
        tree.grow(tree.frontier(), 2, *children(2 * len(reqs)))
        copies.look(tree.newest)
        for b, req in enumerate(reqs):
            if req in copies.index:
                text, size = copies.index.text(req).tolist(), self.length(req)
                is_whole = req not in copies._reading
                assert text == req.text[: size if is_whole else len(text)], (req.rid, b)
        grafts = copies.graft_into(tree)
        if grafts is not None:
            self.num_copied += int(grafts.counts.sum())
        selection = tree.select(tree.ranked(NODES), NODES + 1)
        copies.on_drafted(Drafted(tree, (2,), selection))
        paths = []
        for b, req in enumerate(reqs):
            path, size = [], self.length(req)
            while True:
                at = path[-1] if path else 0
                wanted = req.text[size + len(path)]
                rows = [
                    row
                    for row in range(at + 1, NODES + 1)
                    if int(selection.parent_rows[b, row - 1]) == at
                    and int(selection.draft_tokens[b, row - 1]) == wanted
                ]
                if not rows:
                    break
                path.append(rows[0])
            paths.append(path)
        return paths, selection


def said_twice(seed, size=40):
    once = np.random.default_rng(seed).integers(0, VOCAB, size).tolist()
    return once * 8


def test_text_that_was_said_before_is_proposed_and_accepted():
    server = Server()
    req = server.request("a", said_twice(1), 40)
    counts = [len(server.step([req])[0]) for _ in range(30)]
    # The first tokens find their copies; from then on a step is as deep as it may be.
    assert min(counts[8:]) == DEPTH + 1
    assert server.copies.num_accepted > 20 * DEPTH
    state = server.copies.state()
    assert state["copies_accepted"] == server.copies.num_accepted
    assert state["copy_bytes"] == server.copies.num_bytes > 0
    chances = {row["chance"] for row in state["copies"] if row["num_copies"] > 20}
    assert chances and min(chances) > 0.9


def test_what_is_never_said_again_is_soon_not_trusted():
    server = Server()
    rng = np.random.default_rng(2)
    # Each token is followed by any other one.
    req = server.request("a", rng.integers(0, VOCAB, 1200).tolist(), 200)
    for _ in range(150):
        server.step([req])
    rows = [row for row in server.copies.state()["copies"] if row["num_copies"] > 40]
    assert rows and all(row["chance"] < 0.15 for row in rows)


def test_requests_come_and_go_and_come_back():
    """Between plain steps and trees, with one that samples and one that wants no drafts."""
    server = Server()
    reqs = {
        name: server.request(name, said_twice(ord(name)), 30 + ord(name) % 7) for name in "abcd"
    }
    reqs["c"].sampling_params.top_k = 20
    rng = np.random.default_rng(5)
    for number in range(60):
        present = [req for name, req in reqs.items() if rng.random() < 0.8 or name == "a"]
        weights = None
        if number % 5 == 0:
            weights = np.array([0.0 if req.rid == "d" else 1.0 for req in present])
        server.step(present, weights, is_plain=number % 4 == 3 or number in range(20, 30))
        for name, req in reqs.items():
            if server.length(req) > 250:  # it ends, and another one takes its name
                reqs[name] = server.request(name, said_twice(number), 33)
                reqs[name].sampling_params.top_k = 20 if name == "c" else 1
    assert reqs["c"] in server.copies.index and server.copies.num_accepted > 100
    assert {row["is_sampled"] for row in server.copies.state()["copies"]} == {False, True}


def test_a_text_that_is_not_the_served_one_is_not_copied():
    """As where a request was put together from embeddings, or its result is under way."""
    server = Server()
    # The last result of one has not arrived, and the other is longer than it says.
    late, other = server.request("b", said_twice(2), 40), server.request("c", said_twice(3), 40)
    batch = SimpleNamespace(
        reqs=[late, other],
        spec_info=SimpleNamespace(bonus_tokens=torch.tensor([late.text[41], 5])),
        seq_lens=torch.tensor([41, 77]),
    )
    copies = server.copies
    copies.begin_step(batch, None, None, DEPTH, np.full(2, 1e-3, np.float32))
    copies.start()
    tree = DraftTree(torch.zeros(2, TOPK).long(), torch.full((2, TOPK), 0.2), DEPTH, loops)
    copies.look(tree.newest)
    assert copies.index.num_tokens(late) == 42 and other not in copies.index


@pytest.mark.parametrize("period", [1, 3])
def test_text_that_repeats_one_token_is_copied_from_the_first_step_on(period):
    server = Server()
    req = server.request("a", (list(range(period)) * 1200)[:1200], 1000)
    counts = [len(server.step([req])[0]) for _ in range(20)]
    assert counts[0] > DEPTH // 2 and min(counts[2:]) == DEPTH + 1


def test_a_long_prompt_is_read_once_in_parts_and_then_copied():
    """Beside requests that are copied meanwhile, one of which comes back from a retraction."""
    server, size = Server(max_tokens=1 << 18), 3 * _MOST_READ + 1000
    text = np.random.default_rng(3).integers(0, VOCAB, size).tolist()
    req = server.request("a", text + text[:200], size)
    other, late = (server.request(name, said_twice(ord(name)), 40) for name in "bc")
    for _ in range(10):
        server.step([other, late])
    index, reads = server.copies.index, []
    add = index.add
    index.add = lambda request, tokens: reads[-1].append(len(tokens)) or add(request, tokens)
    counts, other_counts = [], []
    for number in range(12):
        reads.append([])
        server.copies._take_in(0)  # so that what it adds is not counted
        reads[-1].clear()
        rows = server.step([req, other, late] if number != 1 else [req, other])
        counts.append(len(rows[0]))
        other_counts.append(len(rows[1]))
    sizes = [sum(step) for step in reads]
    assert max(sizes) == _MOST_READ and sizes[:3] == [_MOST_READ] * 3 and max(sizes[4:]) < 500
    assert min(counts[8:]) == min(other_counts) == DEPTH + 1
    # It is known as if it had been read at once.
    known = index.text(req)
    once = SuffixIndex(1 << 18)
    assert known.tolist() == req.text[: len(known)] and once.add(req, known)
    found = []
    for each in (index, once):
        [[base, capacity]] = each.blocks([req]).tolist()
        block, answers = each.ints[base:], []
        state, length = longest_match(block, capacity)
        for token in [*text[:50], *range(VOCAB)]:
            copied, context, _, *evidence = copy_of(block, capacity, state, length)
            answers.append((length, copied, context, *evidence))
            state, length = descend(block, capacity, state, length, token)
        found.append(answers)
    assert found[0] == found[1]


def test_a_text_that_is_read_in_parts_is_dropped_with_its_request():
    """And read from its beginning where the request comes back."""
    server, size = Server(max_tokens=1 << 17), 2 * _MOST_READ + 1000
    text = np.random.default_rng(3).integers(0, VOCAB, size).tolist()
    req = server.request("a", text + text[:200], size)
    other = server.request("b", said_twice(2), 40)
    server.step([req, other])
    assert server.copies.index.num_tokens(req) == _MOST_READ
    server.step([other])
    assert req not in server.copies.index and not server.copies._reading
    for size in (_MOST_READ, 2 * _MOST_READ):
        server.step([req, other])
        assert server.copies.index.num_tokens(req) == size
    size = server.length(req)
    server.step([req, other])
    assert server.copies.index.num_tokens(req) == size and not server.copies._reading


def test_requests_that_end_in_the_middle_leave_no_text_and_no_outcome_to_others():
    """As where one is aborted while its step runs; its results are not read into another text."""
    server = Server()
    reqs = [server.request(name, said_twice(ord(name)), 40) for name in "abc"]
    for number in range(30):
        server.step(reqs)
        if number % 3 == 2:
            place = number % len(reqs)
            reqs[place] = server.request(f"new-{number}", said_twice(number), 37 + number % 5)
    server.step(reqs[:1])
    assert len(server.copies.index._blocks) == 1


def test_a_request_copies_from_its_pool_and_from_no_other():
    """The second one answers what the first has answered, behind a prompt of its own."""
    counts = {}
    for pool in ("one", "two", None):
        server = Server(pool_tokens=1 << 14)
        answer = np.random.default_rng(8).permutation(VOCAB * 4).tolist()
        answer = [token % VOCAB for token in answer]
        first, second = (
            server.request(name, said_twice(seed)[:40] + answer, 40)
            for seed, name in ((1, "a"), (2, "b"))
        )
        first.sampling_params.custom_params = {"cast_pool": "one"}
        second.sampling_params.custom_params = pool and {"cast_pool": pool}
        for _ in range(120):
            if server.length(first) < 180:
                server.step([first])
        tokens = sum(len(server.step([second])[0]) for _ in range(25))
        counts[pool] = tokens
    assert counts["one"] > 1.5 * counts["two"] and counts["two"] == counts[None]


def test_memory_beyond_the_limit_is_not_taken():
    server = Server(max_tokens=200)
    reqs = [server.request(name, said_twice(1), 60) for name in "ab"]
    for _ in range(6):
        server.step(reqs)
    assert server.copies.num_bytes <= 200 * 100
    assert (reqs[0] in server.copies.index) != (reqs[1] in server.copies.index)


def test_a_text_without_room_is_read_once_until_other_requests_run(monkeypatch):
    server = Server(max_tokens=200)
    reqs = [server.request(name, said_twice(1), 60) for name in "ab"]
    added = []
    add = server.copies.index.add
    monkeypatch.setattr(
        server.copies.index, "add", lambda req, tokens: added.append(req) or add(req, tokens)
    )
    for _ in range(4):
        server.step(reqs)
    without = next(req for req in reqs if req not in server.copies.index)
    added.clear()
    for _ in range(4):
        server.step(reqs)
    assert without not in added
    server.step([without])
    assert without in server.copies.index


def test_a_request_with_the_name_of_an_earlier_one_gets_none_of_its_text():
    server = Server()
    text = said_twice(1)
    first = server.request("a", text, 40)
    server.step([first])
    # As long as the first one with its latest tokens, and with the same last token.
    size = server.length(first)
    other = said_twice(2)[: size - 1] + [first.text[size - 1]] + said_twice(3)
    server.step([server.request("a", other, size - 1)])  # `draft` compares the texts


def test_running_requests_of_one_name_have_texts_of_their_own():
    """Two tokenizer workers do not know of each other's requests, whose names clients choose."""
    server = Server()
    reqs = [server.request("a", said_twice(seed), 40) for seed in (1, 2)]
    counts = [[len(row) for row in server.step(reqs)] for _ in range(30)]  # `draft` compares texts
    assert min(map(min, counts[8:])) == DEPTH + 1
    server.step(reqs[1:])
    assert reqs[0] not in server.copies.index and reqs[1] in server.copies.index


def test_a_text_that_ends_with_another_token_is_read_anew():
    server = Server()
    req = server.request("a", said_twice(1), 40)
    server.step([req])
    size = server.length(req)
    req.text = [*req.text[: size - 1], 49 - req.text[size - 1], *said_twice(4)]
    req.output_ids[-1] = req.text[size - 1]  # it was retracted, and prefill has put another one
    server.step([req])


def test_plain_steps_alone_leave_nothing_behind():
    server = Server()
    req = server.request("a", said_twice(1), 40)
    for _ in range(10):
        server.step([req], is_plain=True)
    assert not server.copies._outcomes


def test_results_of_measuring_are_forgotten():
    server = Server()
    req = server.request("a", said_twice(1), 40)
    server.step([req])
    server.copies.discard()
    size = server.length(req)
    assert server.copies.index.num_tokens(req) == 41 < size
    server.step([req])  # reads the text anew
    assert server.copies.index.num_tokens(req) == size


@pytest.mark.parametrize("has_draft", [True, False])
@pytest.mark.parametrize(
    ("settings", "copies"),
    [({}, False), ({"copying": "on"}, True), ({"copying": "on", "policy": "fixed"}, False)],
)
def test_policy_auto_copies_where_it_is_told_to_and_without_a_draft(settings, copies, has_draft):
    worker = SimpleNamespace(
        reads=HostReads("cpu"),
        topk=TOPK,
        has_draft=has_draft,
        token_to_kv_pool_allocator=SimpleNamespace(size=100),
        target_worker=SimpleNamespace(
            model_runner=SimpleNamespace(model_config=SimpleNamespace(vocab_size=VOCAB))
        ),
    )
    made = Copies.of(CastConfig(**settings), worker, NODES)
    assert (made is not None) == (copies or not settings and not has_draft)


def test_without_a_draft_texts_alone_are_looked_at():
    """Also by steps that verify nothing of what was found, which teach all the same."""
    server = Server()
    copies, req = server.copies, server.request("a", said_twice(1), 60)
    accepted = 0
    for number in range(40):
        size = server.length(req)
        batch = SimpleNamespace(
            reqs=[req],
            spec_info=SimpleNamespace(bonus_tokens=torch.tensor([req.output_ids[-1]])),
            seq_lens=torch.tensor([size - 1]),
        )
        copies.begin_step(batch, None, None, DEPTH, np.full(1, 1e-3, np.float32))
        copies.start()
        found = copies.look_at_text()
        assert copies.index.num_tokens(req) == size
        rows = 1 if number % 3 == 0 else 1 + min(NODES, int(found.counts[0]))
        selection = copies.verify_chains(rows)
        assert selection.draft_tokens.tolist() == [found.tokens[0, : rows - 1].tolist()]
        said = req.text[size : size + rows]
        length = 0
        while length < rows - 1 and selection.draft_tokens[0, length] == said[length]:
            length += 1
        new = torch.tensor(req.text[size : size + length + 1] + [-1] * (rows - 1 - length))
        index = torch.tensor([[*range(length + 1), *[-1] * (rows - 1 - length)]], dtype=torch.int32)
        verified = Verified(rows, index, torch.tensor([length + 1]), new.int(), new, None)
        copies.on_verified([req], verified)
        req.output_ids += req.text[size : size + length + 1]
        accepted += length
    copies._take_in(0)
    assert copies.num_accepted == accepted > 40
    assert sum(row.num_copies for row in copies.chances.classes()) > 30
