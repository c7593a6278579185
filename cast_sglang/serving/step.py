"""What a step drafted and chose, as the parts of the server hand it on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["PLAIN_SHAPE", "DraftShape"]


class DraftShape(NamedTuple):
    """What one step drafted and chose."""

    widths: tuple[int, ...]  # nodes expanded per request in each layer below the root
    num_draft_tokens: int  # N, nodes verified per request, root included
    num_rows: np.ndarray | None  # [B], of each request where they differ; at most N
    policy_seconds: float  # host time of the decisions, waiting for the device not included

    @property
    def mean_rows(self) -> float:
        """Rows verified per request, root included."""
        return float(self.num_draft_tokens if self.num_rows is None else self.num_rows.mean())


PLAIN_SHAPE = DraftShape(widths=(), num_draft_tokens=1, num_rows=None, policy_seconds=0.0)
