"""The page of a trace: valid, complete, and nothing lies over anything else."""

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import msgspec
import pytest

from cast_sglang.errors import TraceError
from cast_sglang.report.trace_page import parse_numbers, write_gallery
from cast_sglang.trace.replay import make_policy
from tests.support.simulator import TOPK
from tests.support.traces import Recorder, default_policy, make_header, make_tables


@pytest.fixture(scope="module")
def trace():
    return Recorder(default_policy(), make_tables(row_us=20.0, draft_us=100.0)).run(40)


@pytest.fixture(scope="module")
def full():
    return Recorder(make_policy("eagle", make_header(None)), make_tables(), 1).run(3)


class Checker(HTMLParser):
    """Fails on tags that do not close, and collects what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.candidates, self.references = [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.references += [values[key] for key in ("src", "href") if key in values]
        if "data-candidate" in values:
            self.candidates.append(int(values["data-candidate"]))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("rect", "path", "circle")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_holds_every_node_and_needs_no_other_file(trace, tmp_path):
    page = write_gallery(trace, tmp_path / "out", steps="7", requests="0,1")
    checker = Checker()
    checker.feed(page.read_text())
    assert checker.open == []
    assert all(reference.startswith("data:image/svg+xml") for reference in checker.references)
    [step] = [step for step in trace.steps if step.step == 7]
    per_request = TOPK * (1 + sum(step.widths))
    assert sorted(checker.candidates) == sorted([*range(per_request)] * 2)
    files = {path.name for path in page.parent.iterdir()}
    assert files == {
        "index.html", "course.svg", "legend.svg", "step-7-request-0.svg", "step-7-request-1.svg"
    }  # fmt: skip
    for path in page.parent.glob("*.svg"):
        ElementTree.parse(path)


def test_plain_steps_and_prices_missing(full, tmp_path):
    request = msgspec.structs.replace(full.steps[0].requests[0], probs=b"", verified=b"")
    plain = msgspec.structs.replace(
        full.steps[0], num_layers=0, widths=[], requests=[request], measured_us=None
    )
    page = write_gallery(full._replace(steps=[plain]), tmp_path / "out")
    assert "a plain step, without a tree" in page.read_text()


def test_names_are_text(trace, tmp_path):
    identity = msgspec.structs.replace(trace.header.identity, device_name="<script>x</script>")
    header = msgspec.structs.replace(trace.header, identity=identity)
    page = write_gallery(trace._replace(header=header), tmp_path / "out")
    assert "<script" not in page.read_text()
    assert len(re.findall("<h3>", page.read_text())) == 6


def test_the_same_trace_gives_the_same_page(trace, tmp_path):
    pages = [write_gallery(trace, tmp_path / name).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_tokens_need_a_trace_with_tokens(trace, tmp_path):
    header = msgspec.structs.replace(trace.header, has_tokens=False)
    with pytest.raises(TraceError, match="--cast-trace-tokens"):
        write_gallery(trace._replace(header=header), tmp_path, tokenizer="x")
    with pytest.raises(TraceError, match="cannot be loaded"):
        write_gallery(trace, tmp_path, tokenizer=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"steps": "900"}, "the trace holds 1 to 40, and no 900"),
        ({"steps": "7,38-42"}, "the trace holds 1 to 40, and no 41"),
        ({"steps": "x"}, "expected numbers"),
        ({"requests": "9"}, "9 takes part in none"),
        ({"requests": "0,9"}, "9 takes part in none"),
    ],
)
def test_bad_choices(trace, tmp_path, options, reason):
    with pytest.raises(TraceError, match=reason):
        write_gallery(trace, tmp_path, **options)


def test_numbers():
    assert parse_numbers("3, 17,5-7", "--steps") == [3, 5, 6, 7, 17]
    for bad in ("", "a", "5-3", "-2", "1,,2", "1-"):
        with pytest.raises(TraceError, match="--steps"):
            parse_numbers(bad, "--steps")


def test_a_directory_that_cannot_be_written(trace, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match="--out .*cannot be written"):
        write_gallery(trace, tmp_path / "file")
