"""How often a meter is asked: the settings, and what of them goes into files."""

import dataclasses
import json

import msgspec
import pytest

from cast_sglang.costs.passes import NAMES
from cast_sglang.costs.schema import Provenance
from cast_sglang.profiling.journal import STEP_OVERHEAD
from cast_sglang.profiling.meter import Meter, Sampling
from tests.support.builders import make_profile
from tests.support.meters import StaircaseMeter


def test_a_quick_look_asks_less_and_believes_more():
    default, quick = Sampling(), Sampling.quick()
    changed = {
        field.name
        for field in dataclasses.fields(Sampling)
        if getattr(default, field.name) != getattr(quick, field.name)
    }
    assert changed == {"max_visits", "tolerance", "interpolation_tolerance", "heldout_points"}
    assert default.min_visits <= quick.max_visits < default.max_visits
    assert quick.tolerance > default.tolerance
    assert quick.interpolation_tolerance > default.interpolation_tolerance
    # Enough held-out points for three of each pass.
    assert 3 * len(NAMES) <= quick.heldout_points < default.heldout_points


def test_settings_come_back_from_a_journal_and_from_a_profile():
    settings = dataclasses.asdict(Sampling.quick())
    assert json.loads(json.dumps(settings)) == settings
    provenance = msgspec.structs.replace(make_profile().provenance, sampling=settings)
    read = msgspec.json.decode(msgspec.json.encode(provenance), type=Provenance)
    assert Sampling(**read.sampling) == Sampling.quick()


def test_settings_hold_for_a_whole_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().tolerance = 1.0
    with pytest.raises((AttributeError, TypeError)):
        Sampling().visits = 3  # no field of this name


def test_a_meter_times_each_pass_by_its_name():
    """A run calls a meter by the names of points, so the methods are these and no others."""
    methods = {name for name, of in vars(Meter).items() if callable(of) and name[0] != "_"}
    assert methods == {"limits", *NAMES, STEP_OVERHEAD}
    assert all(hasattr(StaircaseMeter, name) for name in methods)
