"""What a CAST server counted between two moments, as means of its steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.arms import Arm
from benchmarks.harness.servers import Server

# Sums since the server's start; what they mean is said in `cast_sglang/serving/stats.py`.
TOTALS = (
    "steps",
    "plain_steps",
    "requests",
    "layers_grown",
    "nodes_drafted",
    "nodes_verified",
    "accepted_requests",
    "drafts_accepted",
    "timed_steps",
    "predicted_us",
    "measured_us",
    "policy_us",
)
# Means of a cell, as quotients of sums: "nodes" are those of one request.
TREE_MEANS = {
    "mean_layers": ("layers_grown", "steps"),
    "mean_nodes_drafted": ("nodes_drafted", "requests"),
    "mean_verify_rows": ("nodes_verified", "requests"),
    "predicted_to_measured": ("predicted_us", "measured_us"),
}
STEP_MEANS = {
    "plain_share": ("plain_steps", "steps"),
    "mean_predicted_us": ("predicted_us", "timed_steps"),
    "mean_measured_us": ("measured_us", "timed_steps"),
    "mean_policy_us": ("policy_us", "steps"),
}
FIELDS = (*TREE_MEANS, *STEP_MEANS, "policy_share", "table_rate")


def cast_state(server: Server) -> dict[str, Any]:
    """Return what a server counted since its start."""
    return dict(server.get("/server_info")["internal_states"][0]["cast"])


def gained(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Return the totals of the steps between two states."""
    return {name: after[name] - before[name] for name in TOTALS if name in before}


def tree_means(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the mean trees of the steps between two states; None where nothing was counted."""
    return _means(gained(before, after), TREE_MEANS)


def step_means(totals: Mapping[str, float]) -> dict[str, float | None]:
    """Return mean trees and times of the steps that `totals` sums; None where nothing was counted.

    Beside the means: `policy_share`, host time of the policy over the time of a step, and
    `table_rate`, the tokens per second that the accepted trees are worth by the cost table: tokens
    gained a step, all requests together, over the time predicted for a step. It has no noise of the
    clock, only that of the text. Steps that follow a prefill are not timed, so both are quotients
    of means.
    """
    means = _means(totals, {**TREE_MEANS, **STEP_MEANS})
    tokens = totals.get("drafts_accepted", 0) + totals.get("accepted_requests", 0)
    steps = totals.get("steps", 0)
    predicted_us, measured_us = means["mean_predicted_us"], means["mean_measured_us"]
    policy_us = means["mean_policy_us"]
    means["policy_share"] = means["table_rate"] = None
    if measured_us and policy_us is not None:
        means["policy_share"] = round(policy_us / measured_us, 4)
    if predicted_us and steps:
        means["table_rate"] = round(tokens / steps / predicted_us * 1e6, 2)
    return means


def profiles_in_use(arms: Sequence[Arm], servers: Mapping[str, Server]) -> dict[str, str | None]:
    """Return the name of the cost profile that each CAST server uses."""
    states = {arm.name: cast_state(servers[arm.name]) for arm in arms if arm.kind == "cast"}
    return {
        name: state["profile"] and Path(state["profile"]["path"]).name
        for name, state in states.items()
    }


def _means(
    totals: Mapping[str, float], quotients: Mapping[str, tuple[str, str]]
) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name, (part, whole) in quotients.items():
        count = totals.get(whole, 0)
        known = part in totals and count
        means[name] = round(totals[part] / count, 4) if known else None
    return means
