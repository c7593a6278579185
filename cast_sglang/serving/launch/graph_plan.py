"""Which sizes of which pass get a captured graph."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cast_sglang.costs.graph_sizes import GraphSizes, most_that_pays
from cast_sglang.costs.model import plain_units
from cast_sglang.profiling.grid import default_grid
from cast_sglang.serving.step_room import needs_whole_trees

if TYPE_CHECKING:
    from cast_sglang.config import CastConfig
    from cast_sglang.costs.limits import Limits
    from cast_sglang.costs.model import CostModel

__all__ = ["GraphPlan", "choose_sizes", "most_rows", "plan_graphs"]

logger = logging.getLogger(__name__)


class GraphPlan(NamedTuple):
    """Which sizes get a graph."""

    verify: GraphSizes  # rows per request, 2 or more; a plain step's one row has one everywhere
    widths: GraphSizes | None  # nodes per request of a draft layer; None for eager layers
    extend: GraphSizes  # rows per request of draft extend


def plan_graphs(
    graph_runner: Any,
    limits: Limits,
    config: CastConfig,
    verify_sizes: Sequence[int],
    cost_model: CostModel | None,
) -> GraphPlan | None:
    """Choose what to capture at start-up; None for nothing.

    Args:
        graph_runner: the target's, with which SGLang has captured the largest size by then, unless
            decode graphs are off.
        limits, verify_sizes, cost_model: as for `choose_sizes`.
    """
    from sglang.srt.model_executor.runner import DecodeCudaGraphRunner

    if not isinstance(graph_runner, DecodeCudaGraphRunner):
        return None
    plan = choose_sizes(graph_runner.capture_bs, limits, config, verify_sizes, cost_model)
    if config.graphs == "passes":
        logger.info("CAST: draft layers run without graphs: --cast-graphs passes")
        return plan._replace(widths=None)
    return plan


def choose_sizes(
    batch_sizes: list[int],
    limits: Limits,
    config: CastConfig,
    verify_sizes: Sequence[int],
    cost_model: CostModel | None,
) -> GraphPlan:
    """Choose the sizes worth a graph: by the profile, or, before there is one, its grid.

    Args:
        batch_sizes: those that SGLang captures, ascending.
        limits: the largest shapes of the server.
        verify_sizes: rows per request that a verify pass may have, ascending.
        cost_model: of the profile; None where it is still to be made.
    """
    topk, max_rows = limits.max_width, limits.max_verify_rows
    sizes, widths = tuple(verify_sizes), range(1, topk + 1)
    # As many nodes as one or two layers have at least, so that a small tree fits one.
    small_trees = (topk + 1, 2 * topk + 1)
    if config.policy == "eagle":
        sizes, widths = (max_rows,), range(topk, topk + 1)
    if cost_model is not None and config.verify_sizes is None:

        def costs(operation: str) -> Callable[[int], list[float]]:
            # At a short context, where rows and not the prefix make the difference.
            return lambda batch: getattr(cost_model.step_costs(batch, 1), operation).tolist()

        most_of = functools.partial(most_rows, cost_model, limits, config)
        verify = GraphSizes.by_cost(batch_sizes, sizes, costs("verify"), small_trees, most_of)
        layers = GraphSizes.by_cost(batch_sizes, widths, costs("draft"))
    else:
        if config.verify_sizes is None:
            measured = (*default_grid(limits).token_counts["verify"], *small_trees)
            sizes = tuple(sorted(set(measured) & set(sizes)))
        verify = GraphSizes(dict.fromkeys(batch_sizes, sizes))
        layers = GraphSizes(dict.fromkeys(batch_sizes, tuple(widths)))
    max_extend_rows = limits.max_extend_rows or max_rows
    extend = GraphSizes(
        {
            batch_size: tuple(sorted({min(max_extend_rows, n) for n in verify.at(batch_size)}))
            for batch_size in batch_sizes
        }
    )
    return GraphPlan(verify, layers, extend)


def most_rows(cost_model: CostModel, limits: Limits, config: CastConfig, batch_size: int) -> int:
    """Return the most rows per request that can pay at a batch size, by the profile.

    A promised shape always pays. Rows are the cheaper beside the prefix the longer that is, mostly;
    both ends are asked.
    """
    if needs_whole_trees(config):
        return limits.max_verify_rows
    depth = (limits.max_extend_rows or limits.max_verify_rows) - 1
    ends = (cost_model.step_costs(batch_size, end) for end in (1, limits.longest_context))
    return max(most_that_pays(costs.verify, plain_units(costs), depth) for costs in ends)
