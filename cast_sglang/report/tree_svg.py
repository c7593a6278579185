"""Draw one draft tree as SVG: all candidates, which rule pruned them, and which were accepted.

Each layer is a column. The best K candidates of a layer, verified ones and copies are boxes. The
other candidates, which no rule considered, are dots below their parent.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cast_sglang.trace.records import TracedRequest, TracedStep, candidate_parents, unpacked

__all__ = ["COPIED", "legend_svg", "tree_svg"]

COLUMN, ROW = 180, 31
BOX_WIDTH, BOX_HEIGHT = 132, 20
LEFT, TOP = 16, 46
ROOT_WIDTH, ROOT_COLUMN = 44, 84
BENDS = (0.15, 0.85)
MARGIN = 34  # right of the last column, for the mark where growth stopped
DOT, DOT_STEP = 2.2, 7
LABEL_CHARS = 11
FONT = "font-family: ui-sans-serif, system-ui, 'DejaVu Sans', sans-serif"
MONO = "font-family: ui-monospace, 'DejaVu Sans Mono', monospace"

ACCEPTED, VERIFIED, PLAIN_FILL = "#b7e4c7", "#d6e6f7", "#ffffff"
ACCEPTED_EDGE, EDGE, FAINT = "#1b7f4b", "#8aa4bd", "#c9ced4"
INK, GREY = "#1f2933", "#6b7680"
# Outlines of nodes: expanded, or the rule that kept the node from being expanded; that of a node
# which copying alone proposes.
EXPANDED, C1, C2, COPIED = "#33475b", "#d55e00", "#7b3fa0", "#b8860b"
DASHES = {EXPANDED: "", COPIED: ""}
DASHES |= {C1: ' stroke-dasharray="5 3"', C2: ' stroke-dasharray="1.5 2.5"'}


class _Tree(NamedTuple):
    """A recorded tree in the form that the drawing needs; arrays are [M + E], by candidate."""

    depths: np.ndarray  # 0 for what is not in the tree
    parents: np.ndarray
    probs: np.ndarray
    chances: np.ndarray
    scores: np.ndarray
    target_probs: np.ndarray  # nan where not recorded
    expanded: set[int]
    verified: set[int]
    accepted: set[int]
    ranked: set[int]  # the best K of each layer, and what else is a box
    copied: set[int]  # candidates that copying proposes, alone or as well as the draft
    num_drafted: int  # M
    num_layers: int

    @property
    def num_grown(self) -> int:
        """Layers that the draft proposed."""
        return int(self.depths[: self.num_drafted].max())


@dataclass(slots=True)
class _Node:
    """A box of the drawing, with its child boxes and dots."""

    candidate: int  # -1 for the root
    depth: int
    boxes: list[_Node] = field(default_factory=list)
    dots: list[int] = field(default_factory=list)
    y: float = 0.0
    bend: float = 0.0  # where lines to its children turn, in 0..1 of the gap between columns

    @property
    def x(self) -> float:
        return LEFT if self.depth == 0 else LEFT + ROOT_COLUMN + (self.depth - 1) * COLUMN

    @property
    def width(self) -> float:
        return ROOT_WIDTH if self.depth == 0 else BOX_WIDTH


def tree_svg(
    step: TracedStep,
    request: TracedRequest,
    topk: int,
    max_layers: int,
    text: Callable[[int], str] | None = None,
) -> str:
    """Return the drawing of one request's tree in one step, as an SVG element.

    Args:
        topk, max_layers: K and D of the envelope.
        text: returns the token text of a candidate; None to show candidate numbers instead.
    """
    tree = _read(step, request, topk)
    root = _place(tree)
    rows = [node.y for node in _walk(root)]
    height = TOP + max(rows) + ROW
    columns = int(tree.depths.max())
    width = LEFT + ROOT_COLUMN + columns * COLUMN + MARGIN
    parts = [_header(tree, columns)]
    parts += [_edge(node, child, tree) for node in _walk(root) for child in node.boxes]
    parts += [_box(node, tree, text) for node in _walk(root)]
    parts.append(_stop(tree, tree.num_grown, max_layers, height))
    return _svg(width, height, parts, f"draft tree of step {step.step}, request {request.request}")


def legend_svg() -> str:
    """Return the legend of colours and outlines, as an SVG element."""
    samples = [
        (ACCEPTED, EXPANDED, "accepted"),
        (VERIFIED, EXPANDED, "verified, not accepted"),
        (PLAIN_FILL, EXPANDED, "not verified: reranking, C3"),
        (PLAIN_FILL, EXPANDED, "solid: expanded"),
        (PLAIN_FILL, C1, "dashed: not kept in its layer, C1"),
        (PLAIN_FILL, C2, "dotted: no further layer grown, C2"),
        (PLAIN_FILL, COPIED, "gold: proposed by copying alone"),
    ]
    parts = []
    for i, (fill, outline, meaning) in enumerate(samples):
        x, y = LEFT + 270 * (i % 3), 10 + 28 * (i // 3)
        parts.append(_rect(x, y, 34, 18, fill, outline))
        parts.append(_text(x + 42, y + 13, meaning, 12, INK))
    y = 94
    parts += [_dot(LEFT + 8 + DOT_STEP * i, y + 9) for i in range(3)]
    meanings = (
        (42, "drafted, but not among the best of its layer"),
        (312, "number in a box: path score, the chance that all tokens up to it are accepted"),
    )
    parts += [_text(LEFT + x, y + 13, meaning, 12, INK) for x, meaning in meanings]
    return _svg(LEFT + 810, 120, parts, "legend")


def _read(step: TracedStep, request: TracedRequest, topk: int) -> _Tree:
    probs = unpacked(request.probs, "float32")
    chances = unpacked(request.chances, "float32") if request.chances else probs
    expanded, num_drafted = unpacked(request.expanded, "int32"), len(probs)
    parents = candidate_parents(request, topk)
    probs, chances = (np.append(x, np.zeros(len(parents) - num_drafted)) for x in (probs, chances))
    depths, scores = np.ones(len(parents), np.int64), np.empty(len(parents))
    for node, parent in enumerate(parents.tolist()):
        depths[node] = 1 if parent < 0 else depths[parent] + 1
        scores[node] = chances[node] * (scores[parent] if parent >= 0 else 1.0)
    if request.scores:  # copies have changed them
        scores = unpacked(request.scores, "float32")
        above = np.append(scores, np.float32(1.0))[parents]
        chances = np.divide(scores, above, out=np.zeros_like(scores), where=above > 0.0)
        depths[num_drafted:][scores[num_drafted:] == 0.0] = 0  # not in the tree
    copied = {node for node in unpacked(request.copied, "int32")[1::3].tolist() if depths[node]}
    verified = unpacked(request.verified, "int32")
    target_probs = np.full(len(probs), np.nan)
    if request.target_probs:
        target_probs[verified] = unpacked(request.target_probs, "float32")
    ranked: set[int] = set()
    for depth in range(1, len(step.widths) + 2):
        [layer] = np.nonzero(depths[:num_drafted] == depth)
        ranked.update(layer[np.argsort(-scores[layer], kind="stable")[:topk]].tolist())
    ranked |= set(verified.tolist()) | set(expanded.tolist())
    for node in copied:
        while node >= 0 and node not in ranked:
            ranked.add(node)
            node = int(parents[node])
    return _Tree(
        depths=depths,
        parents=parents,
        probs=probs,
        chances=chances,
        scores=scores,
        target_probs=target_probs,
        expanded=set(expanded.tolist()),
        verified=set(verified.tolist()),
        accepted=set(request.accepted),
        ranked=ranked,
        copied=copied,
        num_drafted=num_drafted,
        num_layers=step.num_layers,
    )


def _place(tree: _Tree) -> _Node:
    """Place every node and return the root.

    Within a column, children have the order of their parents and are not above them. Lines of a
    lower parent turn nearer to it, so no lines cross.
    """
    root = _Node(-1, 0)
    nodes, by_layer = {-1: root}, [[root]]
    order = sorted(range(len(tree.scores)), key=lambda node: -tree.scores[node])
    for candidate in sorted(order, key=lambda node: tree.depths[node]):
        if not tree.depths[candidate]:
            continue
        parent = nodes[int(tree.parents[candidate])]
        if candidate in tree.ranked:
            nodes[candidate] = _Node(candidate, int(tree.depths[candidate]))
            parent.boxes.append(nodes[candidate])
        else:
            parent.dots.append(candidate)
    while any(node.boxes for node in by_layer[-1]):
        parents, free, layer = by_layer[-1], 0.0, []
        expanding = [parent for parent in parents if parent.boxes]
        for i, parent in enumerate(expanding):
            parent.bend = BENDS[0] + (BENDS[1] - BENDS[0]) * (1 - (i + 0.5) / len(expanding))
            free = max(free, parent.y)
            for child in parent.boxes:
                child.y, free = free, free + ROW
                layer.append(child)
        by_layer.append(layer)
    return root


def _walk(node: _Node) -> list[_Node]:
    return [node, *(found for child in node.boxes for found in _walk(child))]


def _outline(candidate: int, tree: _Tree) -> str:
    if candidate < 0 or candidate in tree.expanded:
        return EXPANDED
    if candidate >= tree.num_drafted:
        return COPIED
    return C2 if tree.depths[candidate] == tree.num_grown else C1


def _fill(candidate: int, tree: _Tree) -> str:
    if candidate in tree.accepted:
        return ACCEPTED
    return VERIFIED if candidate in tree.verified else PLAIN_FILL


def _header(tree: _Tree, columns: int) -> str:
    parts = []
    for depth in range(1, columns + 1):
        layer = np.nonzero(tree.depths == depth)[0].tolist()
        num_verified = len(tree.verified.intersection(layer))
        x = LEFT + ROOT_COLUMN + (depth - 1) * COLUMN
        parts.append(_text(x, 16, f"layer {depth}", 13, INK, weight="600"))
        num_drafted = sum(node < tree.num_drafted for node in layer)
        more = f" + {len(layer) - num_drafted} copied" if len(layer) > num_drafted else ""
        words = f"{num_drafted} drafted{more}, {num_verified} verified"
        parts.append(_text(x, 31, words, 10.5, GREY))
    return "".join(parts)


def _edge(node: _Node, child: _Node, tree: _Tree) -> str:
    x1, y1 = node.x + node.width, TOP + node.y + BOX_HEIGHT / 2
    x2, y2 = child.x, TOP + child.y + BOX_HEIGHT / 2
    is_accepted = child.candidate in tree.accepted
    color = ACCEPTED_EDGE if is_accepted else EDGE if child.candidate in tree.verified else FAINT
    width = 2.4 if is_accepted else 0.8 + 1.4 * float(tree.chances[child.candidate])
    if y1 == y2:
        path = f"M{x1:g} {y1:g}H{x2:g}"
    else:
        # The line goes down in the gap between the columns, where there are no boxes.
        bend = x1 + (x2 - x1) * node.bend
        path = f"M{x1:g} {y1:g}H{bend - 4:g}Q{bend:g} {y1:g} {bend:g} {y1 + 4:g}"
        path += f"V{y2 - 4:g}Q{bend:g} {y2:g} {bend + 4:g} {y2:g}H{x2:g}"
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:.2g}"/>'


def _box(node: _Node, tree: _Tree, text: Callable[[int], str] | None) -> str:
    x, y = node.x, TOP + node.y
    if node.candidate < 0:
        parts = [_rect(x, y, ROOT_WIDTH, BOX_HEIGHT, "#eef1f4", EXPANDED)]
        parts.append(_text(x + ROOT_WIDTH / 2, y + 14, "root", 12, INK, anchor="middle"))
    else:
        candidate = node.candidate
        label = f"#{candidate}" if text is None else _visible(text(candidate))
        ink = INK if candidate in tree.verified else GREY
        parts = [f"<title>{html.escape(_facts(candidate, tree, text))}</title>"]
        fill, outline = _fill(candidate, tree), _outline(candidate, tree)
        parts.append(_rect(x, y, BOX_WIDTH, BOX_HEIGHT, fill, outline))
        parts.append(_text(x + 7, y + 14, _shortened(label), 12, ink, style=MONO))
        score = f"{tree.scores[candidate]:.2f}".lstrip("0") if tree.scores[candidate] < 1 else "1"
        parts.append(_text(x + BOX_WIDTH - 6, y + 14, score, 10.5, ink, anchor="end"))
    for i, candidate in enumerate(node.dots):
        dot = _dot(x + 7 + DOT_STEP * i, y + BOX_HEIGHT + 5)
        facts = html.escape(_facts(candidate, tree, text))
        parts.append(
            f'<g class="node" data-candidate="{candidate}"><title>{facts}</title>{dot}</g>'
        )
    name = "" if node.candidate < 0 else f' class="node" data-candidate="{node.candidate}"'
    return f"<g{name}>{''.join(parts)}</g>"


def _stop(tree: _Tree, columns: int, max_layers: int, height: float) -> str:
    """Mark the layer where growth stopped, and the layer where `depth` then cut the tree."""
    marks = []
    if tree.num_layers < columns:
        marks.append((tree.num_layers, "cut here: depth", C2))
    ends = columns == max_layers
    words = "end of the envelope" if ends else "not grown further: depth, C2"
    marks.append((columns, words, GREY if ends else C2))
    parts = []
    for depth, words, color in marks:
        x = LEFT + ROOT_COLUMN + depth * COLUMN - (COLUMN - BOX_WIDTH) + 16
        parts.append(
            f'<path d="M{x:g} 8V{height - 6:g}" stroke="{color}" stroke-width="1.6" '
            f'stroke-dasharray="2 4"/>'
        )
        parts.append(f'<g transform="translate({x + 13:g} 10) rotate(90)">')
        parts.append(_text(0, 0, words, 11, color) + "</g>")
    return "".join(parts)


def _facts(candidate: int, tree: _Tree, text: Callable[[int], str] | None) -> str:
    words = [f"candidate {candidate}, layer {tree.depths[candidate]}"]
    if text is not None:
        words.append(repr(text(candidate)))
    if candidate < tree.num_drafted:
        words.append(f"draft probability {tree.probs[candidate]:.3f}")
    words.append(f"calibrated {tree.chances[candidate]:.3f}")
    words.append(f"score {tree.scores[candidate]:.3f}")
    if not np.isnan(tree.target_probs[candidate]):
        words.append(f"target {tree.target_probs[candidate]:.3f}")
    names = {"expanded": tree.expanded, "copied": tree.copied}
    names |= {"verified": tree.verified, "accepted": tree.accepted}
    words += [name for name, members in names.items() if candidate in members]
    return "\n".join(words)


def _visible(text: str) -> str:
    """Return the text with white space and control characters made visible."""
    shown = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
    visible = "".join(shown.get(char, char if char.isprintable() else "·") for char in text)
    return visible or "∅"


def _shortened(text: str) -> str:
    return text if len(text) <= LABEL_CHARS else f"{text[: LABEL_CHARS - 1]}…"


def _rect(x: float, y: float, width: float, height: float, fill: str, outline: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" '
        f'stroke="{outline}" stroke-width="1.4"{DASHES[outline]}/>'
    )


def _dot(x: float, y: float) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="{DOT}" fill="{FAINT}"/>'


def _text(
    x: float,
    y: float,
    text: str,
    size: float,
    color: str,
    *,
    anchor: str = "start",
    weight: str = "400",
    style: str = FONT,
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}" text-anchor="{anchor}" '
        f'font-weight="{weight}" style="{style}">{html.escape(text)}</text>'
    )


def _svg(width: float, height: float, parts: Sequence[str], name: str) -> str:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(name)}" '
        f"{size}>"
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>'
    )
