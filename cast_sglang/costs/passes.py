"""The kinds of passes that a step consists of: one line for each that is measured.

Whoever measures, tabulates, corrects or shows passes goes through `PASSES`. So a further kind takes
one line here, and what only its author can write: a method of `profiling.meter.Meter` that times
it, a field of `costs.schema.CostTables` for its table, and a field of `costs.model.StepCosts` by
which policies read its costs.
"""

from typing import NamedTuple

__all__ = ["NAMES", "PASSES", "Pass"]


class Pass(NamedTuple):
    """A kind of forward pass."""

    name: str  # in code, journals and traces; of the field of `StepCosts` and the meter's method
    table: str  # the field of a profile that holds its times
    model: str  # which model it runs: target or draft
    limit: str  # the field of `Limits` that its tokens per request stay within
    title: str  # for people
    unit: str  # what its tokens are: rows or nodes


PASSES = (
    Pass("verify", "target", "target", "max_verify_rows", "target: one verify pass", "rows"),
    Pass("draft", "draft", "draft", "max_width", "draft: one layer", "nodes"),
    Pass("draft_extend", "draft_extend", "draft", "max_extend_rows", "draft: extend pass", "rows"),
)
NAMES = tuple(each.name for each in PASSES)
