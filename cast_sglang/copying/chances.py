"""Chances: how likely the target is to say what followed a context before, learned while serving.

A copied token has no probability of its own. What is known of it is how long the context is that it
followed, whether that context was always followed by it, what the draft model says of it, and
whether the request samples. So each such class has a chance of its own, learned from the text that
the target went on with. A class without data goes by all that the draft may say of such a copy,
that by shorter contexts, and the shortest ones by the share that prediction by partial matching
gives a token: of c + 1 for c times that the context occurred, one is kept for what did not follow
it yet.

A copy is judged wherever the text went on behind its context, verified or not. So what is verified
does not decide about what is learned.

Source of the first guess: Cleary and Witten, "Data compression using adaptive coding and partial
string matching" (IEEE Transactions on Communications 32, 1984), method A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cast_sglang.ops.compiled import compiled
from cast_sglang.policy.acceptance import HALF_LIFE, PRIOR_WEIGHT

__all__ = ["AGREEMENTS", "CLASSES_OF_KIND", "EVIDENCE", "Chances", "CopyClass", "class_of"]

# Longest context of each class of lengths: 1, 2, 3-4, 5-8, 9-16, 17-32, longer.
_NUM_LENGTHS = 7
# What a context was followed by: once, always by the token, at times by another one.
EVIDENCE = ("once", "always", "at times")
# What the draft model says of the token: its likeliest child of the node, another of its children,
# none of them, nothing as it did not expand the node.
AGREEMENTS = ("likeliest", "proposed", "not proposed", "not asked")
# How the target chooses, of a greedy request and of one that samples.
_CHOICES = ("likeliest", "sampled")
_SHAPE = (len(_CHOICES), _NUM_LENGTHS, len(EVIDENCE), len(AGREEMENTS))
# Classes of greedy requests; those of requests that sample follow in the same order.
CLASSES_OF_KIND = _NUM_LENGTHS * len(EVIDENCE) * len(AGREEMENTS)
# The share c / (c + 1), and for contexts with several continuations 1 / (c + 1), each of the lowest
# c of its class.
_FIRST_GUESS = np.array([1 / 2, 2 / 3, 1 / 3])
_KEEP = 0.5 ** (1.0 / HALF_LIFE)


class CopyClass(NamedTuple):
    """What was observed of one class of copies; recent ones count more."""

    longest: int | None  # of the contexts; None for no limit
    evidence: str
    agreement: str
    is_sampled: bool
    num_copies: float
    chance: float  # as it is given to the next copy
    followed: float  # copies that the text went on with


class Chances:
    """Online estimate of the chance that a copied token is accepted, given that its parent is."""

    def __init__(self) -> None:
        self._sums = np.zeros((2, *_SHAPE))  # copies, and those that the text went on with
        self._table: np.ndarray | None = None

    def table(self) -> np.ndarray:
        """Return [classes] float32, the chance of each class, numbered as `class_of` does."""
        if self._table is None:
            table = np.empty(_SHAPE, np.float32)
            _fit(self._sums, PRIOR_WEIGHT, _FIRST_GUESS, table)
            self._table = table.ravel()
        return self._table

    def update(self, classes: np.ndarray, followed: np.ndarray) -> None:
        """Learn from the copies of one step.

        Args:
            classes: [n] int64, of copies whose parents were accepted.
            followed: [n] bool, whether the text went on with them.
        """
        if len(classes):
            _add(self._sums.reshape(2, -1), _KEEP, classes, followed)
            self._table = None

    def state(self) -> dict[str, Any]:
        """Return the sums learned so far, as an object that JSON can hold."""
        return {"copies": self._sums[0].tolist(), "followed": self._sums[1].tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Replace the sums by those that another object's `state()` returned.

        Raises:
            ValueError: `state` is not valid; nothing is changed then.
        """
        try:
            sums = np.array([state["copies"], state["followed"]], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("state of copies: a table is missing or is no table") from error
        if sums.shape != self._sums.shape:
            raise ValueError(f"state of copies: tables must be {_SHAPE}, got {sums.shape[1:]}")
        if not ((sums >= 0.0) & (sums < np.inf)).all() or (sums[1] > sums[0] * (1 + 1e-9)).any():
            raise ValueError("state of copies: need 0 <= followed <= copies < inf")
        self._sums, self._table = sums, None

    def classes(self) -> list[CopyClass]:
        """Return what was observed of each class that has data, for people."""
        rows, table = [], self.table()
        for number, (count, followed) in enumerate(self._sums.reshape(2, -1).T.tolist()):
            kind, length, evidence, agreement = np.unravel_index(number, _SHAPE)
            if count > 0.0:
                rows.append(
                    CopyClass(
                        2 ** int(length) if length < _NUM_LENGTHS - 1 else None,
                        *(EVIDENCE[evidence], AGREEMENTS[agreement], bool(kind)),
                        *(count, float(table[number]), followed),
                    )
                )
        return rows


@compiled("i8(i8, i8, i8, i8)")
def class_of(length: int, count: int, same: int, agreement: int) -> int:
    """Return the class of a copy for a greedy request.

    Args:
        length: of the context, in tokens, at least 1.
        count: how often the context was followed by anything.
        same: how often by this token.
        agreement: place in `AGREEMENTS`.
    """
    octave, longest = 0, 1
    while longest < length and octave < _NUM_LENGTHS - 1:
        octave, longest = octave + 1, 2 * longest
    evidence = 0 if count < 2 else 1 if same >= count else 2
    return (octave * 3 + evidence) * 4 + agreement


@compiled("void(f8[:, :, :, :, :], f8, f8[:], f4[:, :, :, :])")
def _fit(sums: np.ndarray, weight: float, first_guess: np.ndarray, table: np.ndarray) -> None:
    """Write the chance of each class, [kinds, lengths, evidence, agreements]."""
    num_kinds, num_lengths, num_evidence, num_agreements = table.shape
    for kind, evidence in np.ndindex(num_kinds, num_evidence):
        above = first_guess[evidence]
        for length in range(num_lengths):
            copies, followed = sums[0, kind, length, evidence], sums[1, kind, length, evidence]
            above = (followed.sum() + weight * above) / (copies.sum() + weight)
            for agreement in range(num_agreements):
                chance = (followed[agreement] + weight * above) / (copies[agreement] + weight)
                table[kind, length, evidence, agreement] = chance


@compiled("void(f8[:, :], f8, i8[:], b1[:])")
def _add(sums: np.ndarray, keep: float, classes: np.ndarray, followed: np.ndarray) -> None:
    sums *= keep
    for copy in range(len(classes)):
        sums[0, classes[copy]] += 1.0
        if followed[copy]:
            sums[1, classes[copy]] += 1.0
