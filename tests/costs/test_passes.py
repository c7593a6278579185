"""One line for each kind of pass: what it names exists, and keeps its name in files."""

import dataclasses

from cast_sglang.costs.limits import Limits
from cast_sglang.costs.model import StepCosts
from cast_sglang.costs.passes import NAMES, PASSES
from cast_sglang.costs.schema import CostTables
from cast_sglang.profiling.meter import Meter


def test_every_line_names_what_there_is():
    fields = {field.name for field in dataclasses.fields(Limits)}
    for each in PASSES:
        assert each.name in StepCosts._fields and hasattr(Meter, each.name)
        assert each.table in CostTables.__struct_fields__
        assert each.limit in fields and each.model in ("target", "draft")
    for column in ("name", "table", "limit", "title"):
        assert len({getattr(each, column) for each in PASSES}) == len(PASSES)


def test_arrays_of_a_step_come_in_the_order_of_the_passes():
    assert StepCosts._fields[: len(NAMES)] == NAMES


def test_files_keep_their_names():
    names = {each.name: each.table for each in PASSES}
    assert names == {"verify": "target", "draft": "draft", "draft_extend": "draft_extend"}
