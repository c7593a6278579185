"""StepStats: what the trees cost and what they won, for the log and for Prometheus.

Everything recorded is a number the host already holds, so recording never waits for the device.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from cast_sglang.costs.correction import Residual

__all__ = ["StepStats"]

# Sums over steps, each with the name and the help of its Prometheus counter, if it has one. "nodes"
# and "drafts" are summed over the requests of each step; a counter of time is in seconds.
_TOTALS = {
    "steps": ("steps", "Decoding steps."),
    "plain_steps": ("plain_steps", "Decoding steps that verified the roots alone."),
    "requests": ("request_steps", "Requests of each decoding step, summed over steps."),
    "layers_grown": ("layers_grown", "Draft layers grown."),
    "nodes_drafted": ("nodes_drafted", "Draft nodes proposed."),
    "nodes_verified": ("nodes_verified", "Rows verified by the target, roots included."),
    "plain_requests": ("plain_requests", "Requests that no drafts could serve exactly."),
    "prompts_left_out": (
        "prompts_left_out",
        "Prompts that the draft model left out, since nothing would be drafted behind them.",
    ),
    "accepted_requests": None,
    "drafts_accepted": ("drafts_accepted", "Draft tokens accepted, bonus tokens excluded."),
    "timed_steps": None,
    "predicted_us": ("step_predicted_seconds", "Predicted time of steps that were measured."),
    "measured_us": ("step_measured_seconds", "Measured time of steps that were predicted."),
    "policy_us": ("policy_seconds", "Host time spent choosing trees."),
}


def _summary(totals: Mapping[str, float]) -> dict[str, float]:
    """Return means and ratios; nan where nothing was recorded."""

    def ratio(part: str, whole: str) -> float:
        return totals[part] / totals[whole] if totals[whole] else math.nan

    # Each request adds one bonus token and verifies one root; neither is a draft.
    num_nodes = totals["nodes_verified"] - totals["requests"]
    mean_policy_us, mean_measured_us = (
        ratio("policy_us", "steps"),
        ratio("measured_us", "timed_steps"),
    )
    return {
        "mean_batch_size": ratio("requests", "steps"),
        "mean_layers": ratio("layers_grown", "steps"),
        "mean_nodes_drafted": ratio("nodes_drafted", "requests"),
        "mean_verify_rows": ratio("nodes_verified", "requests"),
        "mean_accept_len": 1 + ratio("drafts_accepted", "accepted_requests"),
        "accept_rate": totals["drafts_accepted"] / num_nodes if num_nodes else math.nan,
        "mean_predicted_us": ratio("predicted_us", "timed_steps"),
        "mean_measured_us": mean_measured_us,
        "predicted_to_measured": ratio("predicted_us", "measured_us"),
        "mean_policy_us": mean_policy_us,
        "policy_share": mean_policy_us / mean_measured_us if mean_measured_us else math.nan,
    }


class StepStats:
    """Counters of one scheduler process.

    The tree of a step, its acceptance and its time become known at different moments (the overlap
    scheduler reports a step late), so each has its own method.

    """

    def __init__(self) -> None:
        self._totals: dict[str, float] = dict.fromkeys(_TOTALS, 0)
        self._logged = dict(self._totals)
        self._accept_lens: Counter[int] = Counter()
        self._acceptance_ratio: float | None = None
        self._metrics: _Metrics | None = None

    def export(
        self, labels: Mapping[str, object], registry: "CollectorRegistry | None" = None
    ) -> None:
        """Export what is counted from now on to Prometheus; once per process and registry.

        prometheus_client decides when it is first imported whether it writes to the files of
        PROMETHEUS_MULTIPROC_DIR, which the server sets after plugins are loaded.

        Args:
            labels: of each metric, such as {"model_name": "m", "tp_rank": 0}.
            registry: where the metrics are registered; None for the client's own registry.
        """
        self._metrics = _Metrics(labels, registry)

    def record_step(
        self,
        *,
        batch_size: int,
        num_layers: int,
        num_draft_nodes: int,
        num_verify_rows: float,
        policy_us: float = 0.0,
    ) -> None:
        """Count the trees of one step.

        Args:
            batch_size: B, requests in the step.
            num_layers: draft layers grown.
            num_draft_nodes: nodes drafted per request.
            num_verify_rows: rows per request that the target verified, root included; a mean.
            policy_us: host time spent choosing the trees and learning for it, in microseconds; not
                that of scoring and ranking candidates, which every tree needs.
        """
        self._count(
            steps=1,
            plain_steps=int(num_verify_rows == 1),
            requests=batch_size,
            layers_grown=num_layers,
            nodes_drafted=batch_size * num_draft_nodes,
            nodes_verified=round(batch_size * num_verify_rows),
            policy_us=policy_us,
        )
        if (metrics := self._metrics) is not None:
            metrics.last_layers.set(num_layers)
            metrics.last_verify_rows.set(num_verify_rows)

    def record_plain_requests(self, count: int) -> None:
        """Count requests that are decoded without drafts, because drafts would not be exact."""
        self._count(plain_requests=count)

    def record_left_out(self, count: int) -> None:
        """Count prompts that the draft model left out, since nothing is drafted behind them."""
        self._count(prompts_left_out=count)

    def record_accepts(self, accept_lens: Iterable[int]) -> None:
        """Count what the target accepted.

        Args:
            accept_lens: tokens gained per request, bonus included, each >= 1; host integers.
        """
        lens = list(accept_lens)
        for length in lens:  # a Counter of a few takes ten times as long
            self._accept_lens[length] += 1
        self._count(accepted_requests=len(lens), drafts_accepted=sum(lens) - len(lens))
        if (metrics := self._metrics) is not None:
            for length, count in Counter(lens).items():
                metrics.accept_len(length).inc(count)

    def record_time(self, predicted_us: float, measured_us: float) -> None:
        """Count the predicted and the measured time of one step, in microseconds."""
        self._count(timed_steps=1, predicted_us=predicted_us, measured_us=measured_us)

    def record_residuals(self, residuals: "Iterable[Residual]") -> None:
        """Export how far the cost tables are off, by kind of pass.

        That is the mean over the buckets of a table, weighted by how many passes each has seen, so
        the number of series does not depend on how many there are.
        """
        if (metrics := self._metrics) is None:
            return
        sums: dict[str, tuple[float, int]] = {}
        for residual in residuals:
            logs, samples = sums.get(residual.operation, (0.0, 0))
            logs += residual.samples * math.log(residual.ratio)
            sums[residual.operation] = logs, samples + residual.samples
        for operation, (logs, samples) in sums.items():
            metrics.cost_ratio(operation).set(math.exp(logs / samples))

    def record_acceptance(self, ratio: float) -> None:
        """Keep how many drafts were accepted of those that calibration remembers to expect."""
        self._acceptance_ratio = ratio
        if (metrics := self._metrics) is not None:
            metrics.acceptance_ratio.set(ratio)

    def snapshot(self) -> dict[str, Any]:
        """Return totals, means, ratios and the histogram of accept lengths since the start.

        Means and ratios are None where nothing was recorded, so that the result is valid JSON.
        """
        summary = _summary(self._totals).items()
        known = {name: None if math.isnan(value) else value for name, value in summary}
        histogram = {str(length): count for length, count in sorted(self._accept_lens.items())}
        ratio = {"acceptance_ratio": self._acceptance_ratio}
        return {**self._totals, **known, **ratio, "accept_lens": histogram}

    def log_line(self) -> str:
        """Summarise the steps since the previous call in one line."""
        recent = {name: total - self._logged[name] for name, total in self._totals.items()}
        self._logged = dict(self._totals)
        mean = _summary(recent)
        return (
            f"CAST: {recent['steps']} steps, batch {mean['mean_batch_size']:.1f}, "
            f"layers {mean['mean_layers']:.2f}, drafted {mean['mean_nodes_drafted']:.1f}, "
            f"verified {mean['mean_verify_rows']:.1f}, accept len {mean['mean_accept_len']:.2f}, "
            f"step {mean['mean_measured_us'] / 1e3:.2f} ms "
            f"(predicted {mean['mean_predicted_us'] / 1e3:.2f}), "
            f"policy {mean['mean_policy_us']:.0f} us"
        )

    def _count(self, **amounts: float) -> None:
        metrics = self._metrics
        for name, amount in amounts.items():
            self._totals[name] += amount
            if metrics and name in metrics.totals:
                metrics.totals[name].inc(amount / 1e6 if name.endswith("_us") else amount)


class _Metrics:
    """The Prometheus side: one child per metric, bound to the labels once."""

    def __init__(self, labels: Mapping[str, object], registry: "CollectorRegistry | None") -> None:
        import prometheus_client

        options: dict[str, Any] = {"registry": registry or prometheus_client.REGISTRY}

        def counter(name: str, help: str, *more: str) -> Any:
            name = f"cast:{name}_total"
            return prometheus_client.Counter(name, help, [*labels, *more], **options)

        def gauge(name: str, help: str, *more: str) -> Any:
            return prometheus_client.Gauge(
                f"cast:{name}",
                help,
                [*labels, *more],
                multiprocess_mode="livemostrecent",
                **options,
            )

        exported = {field: metric for field, metric in _TOTALS.items() if metric is not None}
        self.totals = {
            field: counter(*metric).labels(**labels) for field, metric in exported.items()
        }
        layers = gauge("layers", "Draft layers grown in the last step.")
        rows = gauge("verify_rows", "Rows per request that the target verified in the last step.")
        self.last_layers, self.last_verify_rows = layers.labels(**labels), rows.labels(**labels)
        self.acceptance_ratio = gauge(
            "acceptance_ratio",
            "Accepted drafts over those that calibration remembers to expect; 1 is as before.",
        ).labels(**labels)
        self.acceptance_ratio.set(math.nan)  # until it is known
        # A counter per length, not a histogram: a histogram observes one request at a time.
        lens = counter(
            "accept_lens", "Requests by tokens gained in a step, bonus included.", "accept_len"
        )
        self.accept_len = functools.cache(
            lambda length: lens.labels(**labels, accept_len=str(length))
        )
        ratios = gauge(
            "cost_ratio",
            "Measured over tabulated time of a kind of pass; 1 is a table that holds.",
            "operation",
        )
        self.cost_ratio = functools.cache(
            lambda operation: ratios.labels(**labels, operation=operation)
        )
