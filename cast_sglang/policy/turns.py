"""Turns: now and then a step runs a tree that does not seem best, so that its time is known.

Serving corrects the costs of what it runs. Where a table is wrong about a tree that is never run,
nobody would find out: a coarse table hides the stairs of a machine, and then a tree of a few nodes
less may take half the time. So the trees that SGLang serves by default take turns with the policy's
own, in rounds that become rare. What they take is measured as of any other step, and from then on
the policy knows at what time it could have them. Plain decoding has turns by what they lose
(`Octave.tries_plain`).

In a round every other step is a turn. The first one, at step 16, has `TIMES` turns of each tree;
those at step 32, 64 and so on, and later every `LONGEST` steps, have one of each tree. So of n
steps at most 6 + 2 * log2(n / 16) + 2 * n / 1024 are turns, and each loses what its tree is worse.
Steps count in which speculation has lost nothing against plain decoding.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DEFAULT_SHAPES", "FIRST", "Shape", "Turns"]


class Shape(NamedTuple):
    """The shape of a fixed tree, named after SGLang's flags `--speculative-*`."""

    num_steps: int  # layers
    topk: int  # children of a node, and nodes expanded per layer
    num_draft_tokens: int  # verified nodes, root included

    def __str__(self) -> str:
        return f"{self.num_steps}-{self.topk}-{self.num_draft_tokens}"


# What SGLang chooses for the architectures it knows where no shape is given: a chain for models
# whose layers are large, a tree for the others.
DEFAULT_SHAPES = (Shape(3, 1, 4), Shape(5, 4, 8))
# One pass varies by 15 %, so three tell its time within a tenth. With one, the least of 16 runs on
# simulated machines was at 0.81 of the best fixed tree in the first 100 steps, in place of 0.87.
TIMES = 3
# By then the policy has found its own tree. Rounds that begin at 16, 64 and 256 in place of 16, 32
# and 64 lost 0.6 % in the steps 100 to 400 on simulated machines; another first step was not tried.
FIRST = 16
# A machine that changes is measured anew at least this often, for 0.1 % of the time where a turn
# loses 30 %.
LONGEST = 1024


class Turns:
    """Counts the steps with drafts of one octave of batch sizes, and says whose turn each is.

    Args:
        step: the last one of an earlier server, whose turns are not taken anew.

    Attributes:
        step: the last one counted.
    """

    def __init__(self, step: int = 0) -> None:
        self.step = 0
        self._round = FIRST  # step at which the round began or begins
        self._order = DEFAULT_SHAPES * TIMES
        for _ in range(step if step < LONGEST else LONGEST + step % LONGEST):
            self.next()

    def next(self) -> Shape | None:
        """Count a step and return the tree whose turn it is; None for the policy's own."""
        self.step += 1
        place, is_between = divmod(self.step - self._round, 2)
        if place >= len(self._order):
            self._round += min(self._round, LONGEST)
            self._order = DEFAULT_SHAPES
        elif place >= 0 and not is_between:
            return self._order[place]
        return None
