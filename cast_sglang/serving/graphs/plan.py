"""Which sizes of which pass get a captured graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.costs.limits import Limits
from cast_sglang.profiling.grid import default_grid

if TYPE_CHECKING:
    from cast_sglang.serving.worker import CastWorker

__all__ = ["GraphPlan", "choose_sizes", "plan_graphs"]

logger = logging.getLogger(__name__)


class GraphPlan(NamedTuple):
    """Which sizes get a graph."""

    verify: GraphSizes  # rows per request, 2 or more; a plain step's one row has one everywhere
    widths: GraphSizes | None  # nodes per request of a draft layer; None for eager layers
    extend: GraphSizes  # rows per request of draft extend


def plan_graphs(worker: CastWorker) -> GraphPlan | None:
    """Choose what to capture at start-up; None for nothing."""
    from sglang.srt.model_executor.runner import DecodeCudaGraphRunner

    # SGLang has captured the largest size by then, unless it was told not to.
    first = worker.target_worker.model_runner.decode_cuda_graph_runner
    if not isinstance(first, DecodeCudaGraphRunner):
        return None
    plan = choose_sizes(worker, first.capture_bs)
    if worker.config.graphs == "passes":
        logger.info("CAST: draft layers run without graphs: --cast-graphs passes")
        return plan._replace(widths=None)
    return plan


def choose_sizes(worker: CastWorker, batch_sizes: list[int]) -> GraphPlan:
    """Choose the sizes worth a graph: by the profile, or, before there is one, its grid.

    Args:
        batch_sizes: those that SGLang captures, ascending.
    """
    draft, topk = worker.draft_worker, worker.topk
    most = worker.max_draft_tokens
    sizes, widths = draft.verify_sizes, range(1, topk + 1)
    if worker.config.policy == "eagle":
        sizes, widths = (most,), range(topk, topk + 1)
    if worker.cost_model is not None and worker.config.verify_sizes is None:
        cost_model = worker.cost_model

        def costs(operation: str) -> Callable[[int], list[float]]:
            # At a short context, where rows and not the prefix make the difference.
            return lambda batch: getattr(cost_model.step_costs(batch, 1), operation).tolist()

        # As many nodes as one or two layers have at least, so that a small tree fits one.
        small_trees = (topk + 1, 2 * topk + 1)
        verify = GraphSizes.by_cost(batch_sizes, sizes, costs("verify"), always=small_trees)
        layers = GraphSizes.by_cost(batch_sizes, widths, costs("draft"))
    else:
        if worker.config.verify_sizes is None:
            limits = Limits(max(batch_sizes), 1, most, topk, most, most)
            measured = (*default_grid(limits).verify_rows, topk + 1, 2 * topk + 1)
            sizes = tuple(sorted(set(measured) & set(sizes)))
        verify = GraphSizes(dict.fromkeys(batch_sizes, tuple(sizes)))
        layers = GraphSizes(dict.fromkeys(batch_sizes, tuple(widths)))
    extend = GraphSizes(
        {
            batch_size: tuple(
                sorted({min(worker.max_extend_rows, size) for size in verify.at(batch_size)})
            )
            for batch_size in batch_sizes
        }
    )
    return GraphPlan(verify, layers, extend)
