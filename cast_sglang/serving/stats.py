"""StepStats: what the trees cost and what they won, for the log and for Prometheus.

Everything recorded is a number the host already holds, so recording never waits for the device.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from cast_sglang.costs.correction import Residual

__all__ = ["StepStats"]


@dataclasses.dataclass(slots=True)
class _Totals:
    """Sums over steps; "nodes" and "drafts" are summed over the requests of each step."""

    steps: int = 0
    plain_steps: int = 0  # that drafted nothing
    requests: int = 0
    layers_grown: int = 0
    nodes_drafted: int = 0
    nodes_verified: int = 0
    accepted_requests: int = 0
    drafts_accepted: int = 0
    timed_steps: int = 0
    predicted_us: float = 0.0
    measured_us: float = 0.0
    policy_us: float = 0.0

    def minus(self, other: "_Totals") -> "_Totals":
        fields = (field.name for field in dataclasses.fields(self))
        return _Totals(**{name: getattr(self, name) - getattr(other, name) for name in fields})

    def summary(self) -> dict[str, float]:
        """Return means and ratios; nan where nothing was recorded."""
        # Each request adds one bonus token and verifies one root; neither is a draft.
        mean_accept_len = 1 + _ratio(self.drafts_accepted, self.accepted_requests)
        return {
            "mean_batch_size": _ratio(self.requests, self.steps),
            "mean_layers": _ratio(self.layers_grown, self.steps),
            "mean_nodes_drafted": _ratio(self.nodes_drafted, self.requests),
            "mean_verify_rows": _ratio(self.nodes_verified, self.requests),
            "mean_accept_len": mean_accept_len,
            "accept_rate": _ratio(self.drafts_accepted, self.nodes_verified - self.requests),
            "mean_predicted_us": _ratio(self.predicted_us, self.timed_steps),
            "mean_measured_us": _ratio(self.measured_us, self.timed_steps),
            "predicted_to_measured": _ratio(self.predicted_us, self.measured_us),
            "mean_policy_us": _ratio(self.policy_us, self.steps),
            "policy_share": _ratio(
                _ratio(self.policy_us, self.steps), _ratio(self.measured_us, self.timed_steps)
            ),
        }


class StepStats:
    """Counters of one scheduler process.

    The tree of a step, its acceptance and its time become known at different moments (the overlap
    scheduler reports a step late), so each has its own method.

    Args:
        metric_labels: labels of the Prometheus metrics, such as {"tp_rank": "0"}; None for no
            metrics. One object with metrics per process and registry.
        registry: where the metrics are registered; None for the client's own registry.
    """

    def __init__(
        self,
        metric_labels: Mapping[str, str] | None = None,
        registry: "CollectorRegistry | None" = None,
    ) -> None:
        self._totals = _Totals()
        self._logged = _Totals()
        self._accept_lens: Counter[int] = Counter()
        self._labels = metric_labels
        self._registry = registry
        self._metrics: _Metrics | None = None

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
        totals = self._totals
        totals.steps += 1
        totals.requests += batch_size
        totals.layers_grown += num_layers
        totals.nodes_drafted += batch_size * num_draft_nodes
        nodes_verified = round(batch_size * num_verify_rows)
        totals.nodes_verified += nodes_verified
        totals.plain_steps += num_layers == 0
        totals.policy_us += policy_us
        if metrics := self._exported():
            metrics.steps.inc()
            metrics.layers_grown.inc(num_layers)
            metrics.nodes_drafted.inc(batch_size * num_draft_nodes)
            metrics.nodes_verified.inc(nodes_verified)
            metrics.policy_seconds.inc(policy_us / 1e6)
            metrics.last_layers.set(num_layers)
            metrics.last_verify_rows.set(num_verify_rows)

    def record_accepts(self, accept_lens: Iterable[int]) -> None:
        """Count what the target accepted.

        Args:
            accept_lens: tokens gained per request, bonus included, each >= 1; host integers.
        """
        lens = list(accept_lens)
        num_drafts = sum(lens) - len(lens)
        for length in lens:  # a Counter of a few takes ten times as long
            self._accept_lens[length] += 1
        self._totals.accepted_requests += len(lens)
        self._totals.drafts_accepted += num_drafts
        if metrics := self._exported():
            metrics.drafts_accepted.inc(num_drafts)
            for length, count in Counter(lens).items():
                metrics.accept_len(length).inc(count)

    def record_time(self, predicted_us: float, measured_us: float) -> None:
        """Count the predicted and the measured time of one step, in microseconds."""
        self._totals.timed_steps += 1
        self._totals.predicted_us += predicted_us
        self._totals.measured_us += measured_us
        if metrics := self._exported():
            metrics.predicted_seconds.inc(predicted_us / 1e6)
            metrics.measured_seconds.inc(measured_us / 1e6)

    def record_residuals(self, residuals: "Iterable[Residual]") -> None:
        """Export how far each bucket of the cost tables is off."""
        if metrics := self._exported():
            for residual in residuals:
                metrics.cost_ratio(residual).set(residual.ratio)

    def snapshot(self) -> dict[str, Any]:
        """Return totals, means, ratios and the histogram of accept lengths since the start.

        Means and ratios are None where nothing was recorded, so that the result is valid JSON.
        """
        summary = {
            name: None if math.isnan(value) else value
            for name, value in self._totals.summary().items()
        }
        histogram = {str(length): count for length, count in sorted(self._accept_lens.items())}
        return {**dataclasses.asdict(self._totals), **summary, "accept_lens": histogram}

    def log_line(self) -> str:
        """Summarise the steps since the previous call in one line."""
        recent = self._totals.minus(self._logged)
        self._logged = dataclasses.replace(self._totals)
        mean = recent.summary()
        return (
            f"CAST: {recent.steps} steps, batch {mean['mean_batch_size']:.1f}, "
            f"layers {mean['mean_layers']:.2f}, drafted {mean['mean_nodes_drafted']:.1f}, "
            f"verified {mean['mean_verify_rows']:.1f}, accept len {mean['mean_accept_len']:.2f}, "
            f"step {mean['mean_measured_us'] / 1e3:.2f} ms "
            f"(predicted {mean['mean_predicted_us'] / 1e3:.2f}), "
            f"policy {mean['mean_policy_us']:.0f} us"
        )

    def _exported(self) -> "_Metrics | None":
        if self._metrics is None and self._labels is not None:
            self._metrics = _Metrics(self._labels, self._registry)
        return self._metrics


class _Metrics:
    """The Prometheus side: one child per metric, bound to the labels once.

    Created on first use: prometheus_client decides at import whether it writes to the files of
    PROMETHEUS_MULTIPROC_DIR, which the server sets after plugins are loaded.
    """

    def __init__(self, labels: Mapping[str, str], registry: "CollectorRegistry | None") -> None:
        import prometheus_client

        registry = prometheus_client.REGISTRY if registry is None else registry

        def counter(name: str, help: str) -> Any:
            metric = prometheus_client.Counter(name, help, labels.keys(), registry=registry)
            return metric.labels(**labels)

        def gauge(name: str, help: str) -> Any:
            metric = prometheus_client.Gauge(
                name, help, labels.keys(), registry=registry, multiprocess_mode="livemostrecent"
            )
            return metric.labels(**labels)

        self.steps = counter("cast:steps_total", "Decoding steps.")
        self.layers_grown = counter("cast:layers_grown_total", "Draft layers grown.")
        self.nodes_drafted = counter("cast:nodes_drafted_total", "Draft nodes proposed.")
        self.nodes_verified = counter(
            "cast:nodes_verified_total", "Rows verified by the target, roots included."
        )
        self.drafts_accepted = counter(
            "cast:drafts_accepted_total", "Draft tokens accepted, bonus tokens excluded."
        )
        self.predicted_seconds = counter(
            "cast:step_seconds_predicted_total", "Predicted time of steps that were measured."
        )
        self.measured_seconds = counter(
            "cast:step_seconds_measured_total", "Measured time of steps that were predicted."
        )
        self.policy_seconds = counter(
            "cast:policy_seconds_total", "Host time spent choosing trees."
        )
        self.last_layers = gauge("cast:layers", "Draft layers grown in the last step.")
        self.last_verify_rows = gauge(
            "cast:verify_rows", "Rows per request that the target verified in the last step."
        )
        # A counter per length, not a histogram: a histogram observes one request at a time.
        self._accept_lens = prometheus_client.Counter(
            "cast:accept_lens_total",
            "Requests by tokens gained in a step, bonus included.",
            [*labels, "accept_len"],
            registry=registry,
        )
        self._cost_ratios = prometheus_client.Gauge(
            "cast:cost_ratio",
            "Measured over tabulated time of a pass; 1 is a table that holds.",
            [*labels, "operation", "batch_sizes", "tokens"],
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self._labels = dict(labels)
        self._accept_len_children: dict[int, Any] = {}

    def cost_ratio(self, residual: "Residual") -> Any:
        return self._cost_ratios.labels(
            **self._labels,
            operation=residual.operation,
            batch_sizes="{}-{}".format(*residual.batch_sizes),
            tokens="{}-{}".format(*residual.tokens),
        )

    def accept_len(self, length: int) -> Any:
        child = self._accept_len_children.get(length)
        if child is None:
            child = self._accept_lens.labels(**self._labels, accept_len=str(length))
            self._accept_len_children[length] = child
        return child


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
