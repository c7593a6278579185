"""Measure S_T and S_D: which forward passes to time, how often, and when a time is good enough.

The engine is behind the `Meter` protocol; nothing here knows of it. A run has three parts:

    grid       every point of a coarse grid, visited in shuffled rounds, so that a drift of the
               clock frequency spreads over all points instead of looking like structure
    refine     token counts are added where linear interpolation misses a measured midpoint
    held out   random points off the grid, never in the tables, to state the tables' error
"""

import dataclasses
import datetime
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cast_sglang.cost import CostModel
from cast_sglang.errors import ProfileError
from cast_sglang.journal import Journal, Point, Visit, journal_path
from cast_sglang.profile_schema import (
    CostProfile,
    CostTable,
    CostTables,
    Heldout,
    HostIdentity,
    Provenance,
)
from cast_sglang.profiles import save_profile

__all__ = [
    "Grid",
    "Limits",
    "Measured",
    "Meter",
    "Sampling",
    "default_grid",
    "run_profile",
    "write_profile",
]
