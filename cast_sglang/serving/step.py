"""The records of a step: what it drafted, what verify found, and what it took.

Who drafts and verifies makes each record once; calibration and recorder both read it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cast_sglang.policy.decider import PromptFacts

if TYPE_CHECKING:
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from cast_sglang.copying.graft import Grafts
    from cast_sglang.copying.paths import CopiedPaths
    from cast_sglang.serving.step_room import StepRoom
    from cast_sglang.tree import DraftTree, Selection

__all__ = [
    "PLAIN_SHAPE",
    "Copied",
    "DraftShape",
    "Drafted",
    "Drawn",
    "PendingStep",
    "StepReport",
    "Verified",
]


class DraftShape(NamedTuple):
    """The sizes that one step drafted and chose."""

    widths: tuple[int, ...]  # nodes expanded per request in each layer below the root
    num_draft_tokens: int  # N, nodes verified per request, root included
    num_rows: np.ndarray | None  # [B], of each request where they differ; at most N
    depth: int  # of the deepest node that may be accepted

    @property
    def mean_rows(self) -> float:
        """Rows verified per request, root included."""
        return float(self.num_draft_tokens if self.num_rows is None else self.num_rows.mean())


PLAIN_SHAPE = DraftShape(widths=(), num_draft_tokens=1, num_rows=None, depth=0)


class Drafted(NamedTuple):
    """A step's tree and the part of it that is verified; tensors on the device."""

    tree: DraftTree
    widths: tuple[int, ...]  # as of `DraftShape`
    selection: Selection
    wants_drafts: torch.Tensor | None = None  # [B] bool; None where all requests do


class Copied(NamedTuple):
    """What was copied into a step's trees, and what else might have been."""

    grafts: Grafts
    paths: list[CopiedPaths]  # of each request
    chances: np.ndarray  # [classes] float32, `Chances.table()`


class Drawn(NamedTuple):
    """What verify needs to know of a step's draws."""

    proposals: torch.Tensor  # [B, E, M] float32, distributions that children were drawn from
    tokens: torch.Tensor  # [B, E, M] int64
    proposers: torch.Tensor  # [B, N] int64, whose children the verified nodes are
    is_drawn: torch.Tensor  # [B] bool


class Verified(NamedTuple):
    """What a verify pass found; tensors on the device, as SGLang's verify returns them."""

    num_draft_tokens: int  # N, 1 in a plain step
    accept_index: torch.Tensor  # [B, *] int, accepted rows counted through the batch, -1 for none
    accept_lens: torch.Tensor  # [B] int, new tokens of each request, the bonus token included
    tokens: torch.Tensor  # [B * n] int, request-major; the new tokens of each request come first
    logits: torch.Tensor  # [B * N, V], of the target
    sampling_info: SamplingBatchInfo


class PendingStep(NamedTuple):
    """A step that ran and whose results are not on the host yet."""

    predicted_us: float | None  # by the tables as measured; None without a profile
    units: float | None  # its time by the corrected costs; None for a plain step
    expected_us: float | None  # by the corrected costs; None without a profile
    num_layers: int  # of its tree; 0 for a plain step
    unit_us: float  # of the table; 0 without a profile
    # It follows a step of its own kind, with drafts or without, and no prefill is between, so that
    # their distance is what a step of the kind takes.
    follows_alike: bool
    max_tokens: int  # that it may have brought a request


class StepReport(NamedTuple):
    """What the recorder cannot see by itself of a step that has run."""

    number: int
    shape: DraftShape
    extend_rows: float  # rows per request of draft extend, 0 for none
    weights: np.ndarray | None  # [B], what a token of each request is worth; None for 1 each
    predicted_us: float | None  # by the tables as measured; None without a profile
    expected_us: float | None  # by the corrected tables, catching up included
    room: StepRoom  # that its requests left
    policy_us: float  # host time of the decisions about the tree
    price: float | None  # None for a policy without one
    prompts: PromptFacts = PromptFacts()
