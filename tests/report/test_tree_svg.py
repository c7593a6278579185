"""A draft tree as SVG: every candidate is there, says its state, and lies over no other."""

import itertools
import xml.etree.ElementTree as ElementTree

import msgspec
import numpy as np
import pytest

from cast_sglang.report.tree_svg import COPIED, legend_svg, tree_svg
from cast_sglang.trace.records import TracedRequest, TracedStep, packed, unpacked
from cast_sglang.trace.replay import make_policy
from tests.support.simulator import LAYERS, TOPK
from tests.support.traces import Recorder, default_policy, make_header, make_tables

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def steps():
    """Steps of policy `auto`, whose trees differ."""
    return Recorder(default_policy(), make_tables(row_us=20.0, draft_us=100.0)).run(10).steps


@pytest.fixture(scope="module")
def full():
    """Steps that grew and verified the whole envelope."""
    return Recorder(make_policy("eagle", make_header(None)), make_tables(), 1).run(3).steps


def boxes(svg):
    """Return x, y, width, height of the boxes of a drawing, and the size of the drawing."""
    root = ElementTree.fromstring(svg)
    found = [
        tuple(float(rect.get(key)) for key in ("x", "y", "width", "height"))
        for rect in root.iter(f"{SVG}rect")
        if rect.get("x") is not None
    ]
    return found, float(root.get("width")), float(root.get("height"))


def test_nothing_overlaps_in_the_largest_tree(full):
    for step in full:
        found, width, height = boxes(tree_svg(step, step.requests[0], TOPK, LAYERS))
        assert len(found) >= 1 + TOPK * LAYERS
        for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(found, 2):
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
        assert all(0 <= x and x + w <= width and y + h <= height for x, y, w, h in found)


def test_states_are_drawn(steps):
    for step in steps:
        request = step.requests[0]
        svg = tree_svg(step, request, TOPK, LAYERS, text=lambda candidate: f"<t{candidate}>")
        root = ElementTree.fromstring(svg)
        titles = {
            int(group.get("data-candidate")): group.find(f"{SVG}title").text.split("\n")
            for group in root.iter(f"{SVG}g")
            if group.get("class") == "node"
        }
        for name, members in (
            ("verified", unpacked(request.verified, "int32").tolist()),
            ("expanded", unpacked(request.expanded, "int32").tolist()),
            ("accepted", request.accepted),
        ):
            assert {node for node, words in titles.items() if name in words} == set(members)
        assert "'<t0>'" in titles[0]
        stopped = "end of the envelope" if len(step.widths) + 1 == LAYERS else "depth, C2"
        assert stopped in svg


def test_a_cut_after_growth_is_marked(full):
    step = msgspec.structs.replace(full[0], num_layers=3)
    assert "cut here: depth" in tree_svg(step, step.requests[0], TOPK, LAYERS)


def small(**changes):
    """Return a step of one request: candidates 0, 1, 2 below the root; 3, 4, 5 below 1."""
    probs = np.array([0.9, 0.5, 0.4, 0.8, 0.3, 0.25])
    values = {
        "probs": packed(probs, "float32"),
        "expanded": packed(np.array([1]), "int32"),
        "verified": packed(np.array([0, 1, 3]), "int32"),
        "target_probs": packed(np.array([0.5, 0.625, 0.125]), "float32"),
        "accepted": [1],
        **changes,
    }
    request = TracedRequest(request=0, context=9, **values)
    return TracedStep(
        step=4,
        context=9.0,
        widths=[1],
        num_layers=2,
        num_draft_tokens=4,
        extend_rows=2.0,
        requests=[request],
    )


def draw(step, topk=3, **options):
    return tree_svg(step, step.requests[0], topk, 2, **options)


def facts(svg):
    """Return the lines that are shown of each candidate."""
    groups = ElementTree.fromstring(svg).iter(f"{SVG}g")
    return {
        int(group.get("data-candidate")): group.find(f"{SVG}title").text.split("\n")
        for group in groups
        if group.get("class") == "node"
    }


def test_scores_are_products_of_calibrated_chances():
    halved = packed(np.array([0.9, 0.5, 0.4, 0.8, 0.3, 0.25]) / 2, "float32")
    shown = facts(draw(small(chances=halved)))
    assert shown[3] == [
        "candidate 3, layer 2",
        "draft probability 0.800",
        "calibrated 0.400",
        "score 0.100",
        "target 0.125",
        "verified",
    ]
    # Not verified: nothing is known of the target.
    assert shown[5][-1] == "score 0.031" and shown[1][-3:] == ["expanded", "verified", "accepted"]


@pytest.mark.parametrize(("verified", "dots"), [([0, 4], {3, 5}), ([0, 4, 5], {3}), ([2, 3], {5})])
def test_what_no_rule_considered_is_a_dot(verified, dots):
    # 2, 3 below 1; 4, 5 below 0; 6, 7 below 4: 4 and 2 are the best two of four in their layer.
    step = small(
        probs=packed(np.array([0.6, 0.3, 0.5, 0.4, 0.7, 0.2, 0.9, 0.1]), "float32"),
        expanded=packed(np.array([1, 0, 4]), "int32"),
        verified=packed(np.array(verified), "int32"),
        target_probs=b"",
    )
    svg = draw(msgspec.structs.replace(step, widths=[2, 1], num_layers=3), topk=2)
    groups = [g for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if g.get("class") == "node"]
    assert sorted(int(group.get("data-candidate")) for group in groups) == list(range(8))
    small_ones = [group for group in groups if group.find(f"{SVG}circle") is not None]
    assert {int(group.get("data-candidate")) for group in small_ones} == dots
    assert not any(group.findall(f"{SVG}rect") for group in small_ones)


@pytest.mark.parametrize(
    ("token", "label"),
    [
        ("", "∅"),
        (" a\tb\n", "␣a⇥b⏎"),
        ("\x00\x1b", "··"),
        ("elevenchars", "elevenchars"),
        ("twelve chars", "twelve␣cha…"),
        ("<b>&", "<b>&"),
    ],
)
def test_labels_show_white_space_and_stay_short(token, label):
    root = ElementTree.fromstring(draw(small(), text=lambda candidate: token))
    group = next(g for g in root.iter(f"{SVG}g") if g.get("data-candidate") == "0")
    assert group.find(f"{SVG}text").text == label


def test_columns_count_what_was_drafted_and_verified():
    svg = draw(small())
    assert "3 drafted, 2 verified" in svg and "3 drafted, 1 verified" in svg
    assert 'aria-label="draft tree of step 4, request 0"' in svg


def test_the_legend_explains_every_fill_and_outline(steps):
    def looks(svg, *attributes):
        rects = [r for r in ElementTree.fromstring(svg).iter(f"{SVG}rect") if r.get("stroke")]
        return {tuple(rect.get(name) for name in attributes) for rect in rects}

    legend = legend_svg()
    drawings = [tree_svg(step, step.requests[0], TOPK, LAYERS) for step in steps]
    for attributes in (("fill",), ("stroke", "stroke-dasharray")):
        drawn = set().union(*(looks(svg, *attributes) for svg in drawings))
        # The root has a fill of its own, and its name in it.
        # Copies: tests/trace/test_copied.py.
        explained = looks(legend, *attributes) - {(COPIED, None)}
        assert drawn - {("#eef1f4",)} == explained and len(drawn) >= 3
    found, width, height = boxes(legend)
    assert all(x + w <= width and y + h <= height for x, y, w, h in found)
