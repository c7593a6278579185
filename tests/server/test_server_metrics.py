"""What Prometheus reads of a server, and that the dashboard asks for what is there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness.counters import cast_state
from benchmarks.harness.servers import Server
from tests.server.client import generate
from tests.server.conftest import NUM_TOKENS, ServerFactory

# The limit includes the start of servers, which a busy machine stretches.
pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

DASHBOARD = Path(__file__).resolve().parents[2] / "examples" / "grafana" / "cast.json"
METRIC = re.compile(r"\b(?:cast|sglang):[a-z_]+")
# Every 64 steps the server exports its corrections, and every 40 SGLang its own gauges.
NUM_STEPS = 65


@pytest.fixture(scope="module")
def exporting(start_server: ServerFactory) -> Iterator[Server]:
    """A server that drafts on every machine, and corrects its costs."""
    with start_server("cast:fixed:1-0.5-1", "--enable-metrics", name="cast-metrics") as server:
        yield server


@pytest.fixture(scope="module")
def families(exporting: Server, prompts: list[str]) -> dict[str, Metric]:
    """The server's metrics by the name of their samples, after some load."""
    cast, steps = exporting, cast_state(exporting)["steps"]
    custom_params = {"cast": "off"}
    generate(cast, prompts[0], max_new_tokens=8, custom_params=custom_params)
    while cast_state(cast)["steps"] < steps + NUM_STEPS:
        generate(cast, prompts[:4], max_new_tokens=NUM_TOKENS)
    return scrape(cast)


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def scrape(server: Server) -> dict[str, Metric]:
    text = httpx.get(f"{server.url}/metrics", timeout=30.0).text
    return {
        sample.name: family
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def queries(dashboard: dict[str, Any]) -> list[str]:
    panels = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
    ]
    return panels + [
        variable["query"]
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]


def labels_of(family: Metric) -> set[str]:
    return set().union(*(sample.labels for sample in family.samples))


def test_the_dashboard_asks_for_what_the_server_exports(dashboard, families):
    asked = {name for query in queries(dashboard) for name in METRIC.findall(query)}
    assert len(asked) > 12 and asked <= families.keys()
    for query in queries(dashboard):
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}"), query
        names = METRIC.findall(query)
        assert names, query
        # Of counters their rate is asked, of gauges their value.
        for name in names:
            of_counter = families[name].type == "counter"
            assert (f"rate({name}{{" in query or "label_values" in query) == of_counter, query
        known = set.intersection(*(labels_of(families[name]) for name in names))
        grouped = [
            name.strip() for by in re.findall(r"by \(([^)]*)\)", query) for name in by.split(",")
        ]
        matched = re.findall(r"(\w+)=~?\"", query)
        assert {*grouped, *matched} <= known, query
    shown = {name for query in queries(dashboard) for name in re.findall(r"\$(\w+)", query)}
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert shown <= variables | {"__rate_interval"}


def test_panels_have_places_of_their_own(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


def test_series_join_with_sglangs_own(families):
    of_host = families["sglang:num_running_reqs"].samples[0].labels
    assert {"model_name", "engine_type", "tp_rank"} <= of_host.keys()
    ours = {name: family for name, family in families.items() if name.startswith("cast:")}
    assert len(ours) > 12
    own = {"accept_len", "operation"}
    for name, family in ours.items():
        for sample in family.samples:
            shared = {key: value for key, value in sample.labels.items() if key not in own}
            assert shared == of_host, name


def test_numbers_agree_with_what_the_server_says(exporting, families):
    state, exported = cast_state(exporting), scrape(exporting)

    def value(name: str) -> float:
        return sum(sample.value for sample in exported[name].samples if sample.name == name)

    for name, field in (
        *(("cast:plain_steps_total", "plain_steps"), ("cast:steps_total", "steps")),
        *(("cast:request_steps_total", "requests"), ("cast:accept_lens_total", "requests")),
    ):
        assert value(name) == state[field] > 0, name
    assert value("cast:step_predicted_seconds_total") == pytest.approx(state["predicted_us"] / 1e6)
    assert value("cast:step_measured_seconds_total") == pytest.approx(state["measured_us"] / 1e6)
    operations = {sample.labels["operation"] for sample in exported["cast:cost_ratio"].samples}
    assert operations == {row["operation"] for row in state["residuals"]}
    # SGLang's own gauges of the last 40 steps, of which some have accepted drafts.
    assert 0.0 < value("sglang:spec_accept_rate") <= 1.0
    verified = value("sglang:spec_cap_length") - 1
    drafts = value("sglang:spec_accept_length") - 1
    assert value("sglang:spec_accept_rate") == pytest.approx(drafts / verified)
