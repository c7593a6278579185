"""What CAST's speed on a GPU is judged by."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scripts.gpu_host.settings import AUTO, DEFAULT_TREE

# At one request never below what SGLang does by itself; from here on better than every fixed tree,
# as none fits all batch sizes; and where drafting hardly pays, no loss that matters.
TO_DEFAULT, TO_BEST, TO_PLAIN = 1.0, 1.05, 0.98
FEW, MANY = 4, 64


class Goal(NamedTuple):
    """What was wanted of one batch size, and what was found."""

    batch: int
    to: str  # what CAST is compared with
    wanted: float
    found: Any  # a `Ratio`


def goals_of(rows: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """Return what the rows of a serving benchmark say of each goal."""
    from benchmarks.report.data import ratio_of, speed_ratio

    goals = []
    for row in rows:
        if row["arm"] != AUTO:
            continue
        batch = row["batch"]
        if batch < FEW:
            others = [o for o in rows if (o["arm"], o["batch"]) == (DEFAULT_TREE, batch)]
            found = speed_ratio(dict(row), dict(others[0])) if others else None
            goal = Goal(batch, DEFAULT_TREE, TO_DEFAULT, found)
        elif batch < MANY:
            to = f"the best fixed tree, {row['best_static']}"
            goal = Goal(batch, to, TO_BEST, ratio_of(row, "vs_best_static"))
        else:
            goal = Goal(batch, "plain decoding", TO_PLAIN, ratio_of(row, "vs_plain"))
        if goal.found is not None:
            goals.append(goal)
    return goals
