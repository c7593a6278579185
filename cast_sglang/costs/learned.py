"""Learned: how far the passes of a server are off their table, and how sure that is."""

from __future__ import annotations

import math

import numpy as np

from cast_sglang.costs.passes import NAMES
from cast_sglang.ops.compiled import compiled

PASS, OCTAVE, BUCKET, SIZE = 0.35, 0.2, 0.15, 0.2
DRIFT_STEP = 0.02
NOISE = 0.15
OPTIMISM = 1.0
FORGET = 1 / 8192


@compiled("void(f8[:], f8[:], i8[:], f8[:], f8)")
def _learn(means, variances, where, state, log_ratio):
    """state: [3] drift, its variance, noise variance."""
    state[1] += state[3]
    known, total = state[0], state[1] + state[2]
    for place in where:
        known += means[place]
        total += variances[place]
    surprise = log_ratio - known
    most = 3.0 * math.sqrt(total)
    surprise = min(max(surprise, -most), most)
    # noise
    state[2] += 0.01 * (max(surprise * surprise - (total - state[2]), 0.0) - state[2])
    state[2] = max(state[2], 1e-4)
    gain = surprise / total
    state[0] += state[1] * gain
    state[1] -= state[1] * state[1] / total
    for place in where:
        means[place] += variances[place] * gain
        variances[place] -= variances[place] * variances[place] / total


class Learned:
    def __init__(self, limits, table_error=0.0):
        self.limits = limits
        self.num_oct = (limits.max_batch_size - 1).bit_length() + 1
        self.S = limits.max_verify_rows
        P, O, S = len(NAMES), self.num_oct, self.S
        self.T = 2 * S.bit_length() + 2
        sizes = [P, P * O, P * O * self.T, P * O * S]
        self.starts = np.cumsum([0, *sizes])
        self.means = np.zeros(self.starts[-1])
        self.prior = np.concatenate([np.full(n, v * v) for n, v in zip(sizes, (PASS, OCTAVE, BUCKET, SIZE))])
        self.vars = self.prior.copy()
        self.state = np.array([0.0, 0.01, NOISE**2, DRIFT_STEP**2])
        self.version = 0
        self.over = np.zeros(self.num_oct); self.over_n=np.zeros(self.num_oct)
        self._cache = {}

    def where(self, op, batch_size, n):
        p, o = NAMES.index(op), (batch_size - 1).bit_length()
        n = min(max(round(n), 1), self.S)
        oct_ = n.bit_length(); half = 2 * oct_ + (n >= 3 * 2 ** (oct_ - 2) if n > 1 else 0)
        st = self.starts
        po = p * self.num_oct + o
        return np.array([p, st[1] + po, st[2] + po * self.T + half, st[3] + po * self.S + n - 1])

    def record(self, op, batch_size, n, ratio):
        key = (op, (batch_size - 1).bit_length(), n)
        w = self._cache.get(key)
        if w is None: w = self._cache[key] = self.where(op, batch_size, n)
        _learn(self.means, self.vars, w, self.state, math.log(ratio))

    def record_step(self, batch_size, is_plain, ratio): pass

    def record_rest(self, batch_size, rest, predicted):
        """Time of a step outside of passes, in units of the plain unit."""
        o = (batch_size - 1).bit_length()
        k = max(1 / (self.over_n[o] + 1), 1 / 64); self.over_n[o] += 1
        self.over[o] += k * (rest / math.exp(self.state[0]) - self.over[o])

    def refresh(self):
        self.version += 1
        self.vars = np.minimum(self.vars + FORGET * 64 * self.prior, self.prior)

    def scales(self, op, batch_size, num):
        w = np.stack([self.where(op, batch_size, n) for n in range(1, num + 1)])
        m = self.means[w].sum(1); sd = np.sqrt(self.vars[w][:, 2:].sum(1))
        if self.means.any():
            m = m - OPTIMISM * sd
        return np.exp(np.clip(m, -1.5, 1.5)).astype(np.float32)

    def plain_ratio(self, batch_size): return 1.0
    def samples(self, op, batch_size): return np.full(64, 100)
    def batch_bucket(self, b): return (b - 1).bit_length()
    def token_bucket(self, n): return n
