"""Compiled loops: the same numbers as the same function in plain Python, on odd sizes."""

import copy

import numba
import numpy as np
import pytest

from cast_sglang.costs import correction
from cast_sglang.ops.compiled import compiled
from cast_sglang.policy import acceptance, lookahead, select_count

BATCHES_AND_WIDTHS = [(1, 1), (1, 7), (3, 2), (5, 31), (8, 13), (33, 5)]


def floats(rng, *shape, dtype=np.float32):
    return rng.random(shape).astype(dtype)


def best_scores(rng, batch, n):
    return -np.sort(-floats(rng, batch, n), axis=1)


def arguments(function, rng, batch, n):
    """Return arguments of one of the loops, of this size."""
    shape = acceptance._SHAPE
    sums = np.sort(floats(rng, 3, *shape, dtype=np.float64), axis=0)[::-1].copy()
    flags = rng.random((2, batch, n)) < 0.5
    shares_out = bool(flags[0, 0, 0])
    nodes = (
        np.where(flags[0], rng.random((batch, n)), np.nan),
        rng.integers(1, 12, (batch, n)),
        *flags,
        rng.integers(0, shape[0], batch),
    )
    children = floats(rng, 4, n, dtype=np.float64)
    return {
        "_piece": (float(rng.random()),),
        "_bucket": (int(rng.integers(1, 12)),),
        "_add_nodes": (sums, 0.9, np.sort(floats(rng, *shape, dtype=np.float64)), *nodes),
        "_pack_curves": (np.sort(floats(rng, *shape, dtype=np.float64)),),
        "_isotonic": (
            floats(rng, batch * n, dtype=np.float64),
            0.1 + floats(rng, batch * n, dtype=np.float64),
        ),
        "_fit": (sums, 8.0),
        "_fill_means": (
            floats(rng, 3, n, dtype=np.float64),
            np.array([0.0, 2.0, 0.5]),
            floats(rng, 3, n, dtype=np.float64),
        ),
        "_insert": (best_scores(rng, 1, n)[0], np.float32(rng.random())),
        "_best_cut": (
            best_scores(rng, batch, n),
            np.sort(floats(rng, n + 2)),
            2.0,
            shares_out,
        ),
        "_best_width": (
            children,
            best_scores(rng, batch, n + 3),
            best_scores(rng, batch, n),
            np.sort(floats(rng, n + 2)),
            floats(rng, n + 2),
            2.0,
            1 + batch % 3,
            shares_out,
            bool(flags[1, 0, 0]),
        ),
        "_add_children": (
            floats(rng, 3, n, dtype=np.float64),
            np.array([0.0, 2.0, 0.5]),
            1,
            best_scores(rng, batch, n + 1),
            best_scores(rng, batch if shares_out else 2 * batch, n),
            shares_out,  # as good a coin as any
        ),
        "select_count": (best_scores(rng, batch, n), np.sort(floats(rng, n + 1)), 2.0),
        "share_out": (best_scores(rng, batch, n), np.sort(floats(rng, n + 1)), 0.3),
        "pooled": (best_scores(rng, batch, n), np.sort(floats(rng, 1 + n // 2))),
        "_share_out_surprise": (
            floats(rng, n + 3, dtype=np.float64),
            0.1 * floats(rng, n + 3, dtype=np.float64),
            np.arange(n + 3),
            np.zeros(5, np.int64),
            np.stack([rng.permutation(n + 3)[:4] for _ in range(n)], axis=1)[None, None],
            *(0, 0, n + batch % 2),
            np.array([0.1, 0.001, 0.02]),
            float(3.0 * rng.normal()),
        ),
        "_learn_rest": (
            *(0.1 * floats(rng, 2, 3, dtype=np.float64)),
            np.diag([0.04, 0.0004, 0.04]) + 1e-4,
            0.1 * floats(rng, 3, dtype=np.float64),
            np.array([0.1, 0.001, 0.02]),
            float(batch % 4),
            float(n * rng.random()),
            float(n),
        ),
    }[function.__name__]


LOOPS = [
    loop
    for module in (acceptance, select_count, lookahead, correction)
    for loop in vars(module).values()
    if hasattr(loop, "py_func")
]


@pytest.mark.parametrize("batch, n", BATCHES_AND_WIDTHS)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_compiled_is_the_function_itself(loop, batch, n):
    given = arguments(loop.py_func, np.random.default_rng(n), batch, n)
    compiled_given, plain_given = copy.deepcopy(given), copy.deepcopy(given)
    result, expected = loop(*compiled_given), loop.py_func(*plain_given)
    if not isinstance(expected, tuple):
        result, expected = (result,), (expected,)
    for ours, theirs in zip(result, expected, strict=True):
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    # What a loop writes into its arguments is part of what it does.
    for ours, theirs in zip(compiled_given, plain_given, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_place_to_keep_machine_code_is_not_needed(monkeypatch):
    njit = numba.njit

    def njit_without_cache(*args, cache=False, **kwargs):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **kwargs)

    monkeypatch.setattr(numba, "njit", njit_without_cache)

    @compiled("i8(i8)")
    def doubled(x):
        return 2 * x

    assert doubled(21) == 42
