"""Sampling along a tree: each emitted token must be an exact sample of the target."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

pytest.importorskip("sglang")

from cast_sglang.cpu import sampling

# Root 0 with children 1, 2, 3; node 1 with children 4, 5; node 4 with child 6.
PARENT = [None, 0, 0, 0, 1, 1, 4]
NEXT_TOKEN = [1, 4, -1, -1, 6, -1, -1]
NEXT_SIBLING = [-1, 2, 3, -1, 5, -1, -1]
TOKENS = [0, 3, 1, 4, 2, 0, 5]
NUM_NODES, DEPTH, VOCAB = len(PARENT), 4, 7


def run(probs, coins, final_coins, single=1.0, acc=1.0, depth=DEPTH):
    """Sample `len(coins)` copies of the tree above from [N, V] target probabilities."""
    batch = len(coins)
    rows = torch.arange(batch * NUM_NODES).view(batch, NUM_NODES)
    predicts = torch.zeros(batch * NUM_NODES, dtype=torch.int32)
    accept_index = torch.full((batch, depth), -1, dtype=torch.int32)
    num_accepted = torch.empty(batch, dtype=torch.int32)
    target = probs.expand(batch, -1, -1)
    sampling.tree_speculative_sampling(
        predicts=predicts,
        accept_index=accept_index,
        accept_token_num=num_accepted,
        candidates=torch.tensor(TOKENS).expand(batch, -1),
        retrive_index=rows,
        retrive_next_token=torch.tensor(NEXT_TOKEN).expand(batch, -1),
        retrive_next_sibling=torch.tensor(NEXT_SIBLING).expand(batch, -1),
        uniform_samples=coins,
        uniform_samples_for_final_sampling=final_coins,
        target_probs=target,
        draft_probs=torch.zeros(batch, NUM_NODES, VOCAB),
        threshold_single=single,
        threshold_acc=acc,
    )
    return predicts.view(batch, NUM_NODES), accept_index, num_accepted


def random_probs(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(NUM_NODES, VOCAB, generator=generator) * 1.5, dim=1)


def reference(probs, coins, final_coin, single, acc, depth):
    """The definition, one request: (path of nodes, emitted tokens)."""
    node, path, tokens = 0, [0], []
    rejected = set()
    while len(path) < depth:
        mass, accepted = 0.0, None
        rejected = set()
        for child in [i for i in range(NUM_NODES) if PARENT[i] == node]:
            prob = float(probs[node, TOKENS[child]])
            mass += prob
            if prob > 0 and (float(coins[node]) < mass / acc or prob >= single):
                accepted = child
                break
            rejected.add(TOKENS[child])
        if accepted is None:
            break
        tokens.append(TOKENS[accepted])
        path.append(accepted)
        node = accepted
        rejected = set()
    residual = [0.0 if t in rejected else float(p) for t, p in enumerate(probs[node])]
    u = float(final_coin) * sum(residual)
    running = 0.0
    final = len(residual) - 1
    for token, mass in enumerate(residual):
        running += mass
        if mass > 0:
            final = token
            if running > u:
                break
    return path, [*tokens, final]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1.0, 1.0), (0.3, 1.0), (1.0, 0.6), (0.0, 0.0)]),
    st.integers(1, DEPTH),
)
def test_matches_the_definition(seed, thresholds, depth):
    rng = random.Random(seed)
    probs = random_probs(seed)
    if rng.random() < 0.5:  # as top-k leaves them
        probs = sampling.top_k_renorm(probs, torch.full((NUM_NODES,), rng.randrange(1, 4)))
    coins = torch.tensor([[rng.random() for _ in range(NUM_NODES)] for _ in range(3)])
    final = torch.tensor([rng.random() for _ in range(3)])
    predicts, accept_index, num_accepted = run(probs, coins, final, *thresholds, depth)
    for b in range(3):
        acc = max(thresholds[1], 1e-9)
        path, tokens = reference(probs, coins[b], final[b], thresholds[0], acc, depth)
        assert num_accepted[b] == len(path) - 1
        flat = [b * NUM_NODES + node for node in path]
        assert accept_index[b].tolist() == flat + [-1] * (depth - len(path))
        assert predicts[b, path].tolist() == tokens


def test_emitted_tokens_are_samples_of_the_target():
    batch = 40_000
    generator = torch.Generator().manual_seed(1)
    probs = random_probs(5)
    probs[0] = torch.tensor([0.1, 0.15, 0.1, 0.35, 0.2, 0.06, 0.04])
    predicts, accept_index, num_accepted = run(
        probs,
        torch.rand(batch, NUM_NODES, generator=generator),
        torch.rand(batch, generator=generator),
    )
    first = torch.bincount(predicts[:, 0], minlength=VOCAB)
    assert chisquare(first, probs[0].double() / probs[0].double().sum() * batch).pvalue > 1e-3
    # Among requests that accepted node 1, the token after it follows node 1's distribution.
    at_node_1 = (num_accepted > 0) & (accept_index[:, 1] % NUM_NODES == 1)
    second = torch.bincount(predicts[at_node_1, 1], minlength=VOCAB)
    expected = probs[1].double() / probs[1].double().sum() * int(at_node_1.sum())
    assert int(at_node_1.sum()) > 1000
    assert chisquare(second, expected).pvalue > 1e-3


EDGE = 1e-12


def outcome(probs, coins, final_coin):
    """Return the accepted nodes and the token behind them, of the code in float64."""
    path, predicts = np.full((1, DEPTH), -1, np.int32), np.zeros(NUM_NODES, np.int32)
    sampling._sample_paths.py_func(
        np.array([TOKENS]), np.arange(NUM_NODES)[None], np.array([NEXT_TOKEN]),
        np.array([NEXT_SIBLING]), np.array([coins]), np.array([final_coin]), probs[None], 1.0, 1.0,
        np.zeros((1, NUM_NODES, VOCAB)), predicts, path, np.zeros(1, np.int32),
    )  # fmt: skip
    nodes = path[0][path[0] >= 0].tolist()
    return tuple(nodes), int(predicts[nodes[-1]])


@pytest.mark.parametrize("seed", range(5))
def test_its_law_is_the_target_s_up_to_rounding(seed, monkeypatch):
    """Every outcome has coins for just what the target gives it, so its law is exact.

    The outcome changes with a coin at these edges only: both ends of each stretch give the same.
    """
    monkeypatch.setattr(sampling, "_draw", sampling._draw.py_func)
    generator = np.random.default_rng(seed)
    probs = generator.dirichlet(np.full(VOCAB, 0.5), size=NUM_NODES)
    children = {n: [c for c, parent in enumerate(PARENT) if parent == n] for n in range(NUM_NODES)}

    def ends(path):
        """Check what may follow a path of accepted nodes, with coins that lead there."""
        last = path[-1]
        accepted = np.cumsum([0.0, *(probs[last, TOKENS[child]] for child in children[last])])
        for child, low, high in zip(children[last], accepted, accepted[1:], strict=False):
            # Longer paths check the rest.
            for coin in (low + EDGE, high - EDGE):
                coins = coins_of(path) | {last: coin}
                found, _ = outcome(probs, [coins.get(n, 1 - EDGE) for n in range(NUM_NODES)], 0.5)
                assert found[: len(path) + 1] == (*path, child)
            ends((*path, child))
        if accepted[-1] > 1 - 2 * EDGE:
            return
        left = probs[last].copy()
        left[[TOKENS[child] for child in children[last]]] = 0.0
        steps = np.cumsum([0.0, *left]) / left.sum()
        coins = coins_of(path)
        for token in np.flatnonzero(np.diff(steps) > 1e-9):
            for final_coin in (steps[token] + EDGE, steps[token + 1] - EDGE):
                for coin in (accepted[-1] + EDGE, 1 - EDGE):
                    ours = [(coins | {last: coin}).get(n, 1 - EDGE) for n in range(NUM_NODES)]
                    assert outcome(probs, ours, final_coin) == (path, token)

    def coins_of(path):
        """Return coins that accept this path."""
        coins = {}
        for node, child in zip(path, path[1:], strict=False):
            place = children[node].index(child)
            before = sum(probs[node, TOKENS[c]] for c in children[node][:place])
            coins[node] = before + probs[node, TOKENS[child]] / 2
        return coins

    ends((0,))


def test_greedy_rows_emit_the_argmax():
    probs = sampling.top_k_renorm(random_probs(3), torch.ones(NUM_NODES, dtype=torch.int32))
    coins = torch.rand(50, NUM_NODES)
    predicts, accept_index, num_accepted = run(probs, coins, torch.rand(50))
    for b in range(50):
        for node in accept_index[b, : num_accepted[b] + 1] % NUM_NODES:
            assert predicts[b, node] == probs[node].argmax()


@pytest.mark.parametrize("top_k", [1, 2, 5, VOCAB, 1 << 30])
def test_top_k_keeps_exactly_k(top_k):
    probs = torch.softmax(torch.randn(9, VOCAB), dim=1)
    probs[0] = torch.tensor([0.2, 0.3, 0.3, 0.1, 0.1, 0.0, 0.0])
    out = sampling.top_k_renorm(probs, torch.full((9,), top_k))
    torch.testing.assert_close(out.sum(dim=1), torch.ones(9))
    for row, kept in zip(probs, out, strict=True):
        order = sorted(range(VOCAB), key=lambda t: (-float(row[t]), t))[:top_k]
        assert set(kept.nonzero().flatten().tolist()) == {t for t in order if row[t] > 0}


def test_top_k_differs_per_row():
    probs = torch.softmax(torch.randn(3, VOCAB), dim=1)
    out = sampling.top_k_renorm(probs, torch.tensor([1, 3, 1 << 30]))
    assert (out > 0).sum(dim=1).tolist() == [1, 3, VOCAB]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_smallest_sufficient_set(top_p):
    probs = torch.softmax(torch.randn(20, VOCAB, dtype=torch.float64), dim=1)
    out = sampling.top_p_renorm(probs, torch.full((20,), top_p, dtype=torch.float64))
    for row, kept in zip(probs.tolist(), out, strict=True):
        order, mass, expected = sorted(range(VOCAB), key=lambda t: -row[t]), 0.0, set()
        for token in order:
            if mass > top_p:
                break
            expected.add(token)
            mass += row[token]
        assert set(kept.nonzero().flatten().tolist()) == expected


def test_zero_mass_never_wins():
    mass = np.array([0.0, 0.4, 0.0, 0.6, 0.0], dtype=np.float32)
    none = np.zeros(5, np.float32)
    tokens = [sampling._draw(mass, none, coin) for coin in (0.0, 0.39, 0.41, 1.0 - 2**-24)]
    assert tokens == [1, 1, 3, 3]
    taken = np.array([0.0, 0.5, 0.0, 0.0, 0.0], dtype=np.float32)
    assert sampling._draw(mass, taken, 0.0) == 3
    assert sampling._draw(none, none, 0.5) == 4


def test_murmur_hash_matches_a_scalar_computation():
    def murmur3(words):
        state = 0
        for word in words:
            word = word * 0xCC9E2D51 & 0xFFFFFFFF
            word = (word << 15 | word >> 17) & 0xFFFFFFFF
            state ^= word * 0x1B873593 & 0xFFFFFFFF
            state = (state << 13 | state >> 19) & 0xFFFFFFFF
            state = (state * 5 + 0xE6546B64) & 0xFFFFFFFF
        state ^= 4 * len(words)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            state = (state ^ state >> shift) * factor & 0xFFFFFFFF
        return state ^ state >> 16

    seeds, positions = [3, 2**63 + 12345], [7, 2**31 + 1]
    out = sampling.murmur_hash32(
        torch.tensor(seeds, dtype=torch.uint64), torch.tensor(positions), torch.arange(5)
    )
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for column in range(5):
            words = [seed & 0xFFFFFFFF, seed >> 32, position, column]
            assert int(out[row, column]) == murmur3(words)
