"""Write an HTML page with draft trees of a trace and charts of the whole run."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cast_sglang.errors import TraceError
from cast_sglang.report.tree_svg import legend_svg, tree_svg
from cast_sglang.trace.records import Trace, TracedRequest, TracedStep, unpacked

__all__ = ["parse_numbers", "write_gallery"]

DEFAULT_STEPS = 6
MAX_TREES = 200
MEAN_OVER = 16  # steps of a running mean
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, 'DejaVu Sans', sans-serif; color: #1f2933; background: #fff;
  margin: 0 auto; padding: 1rem 2rem 4rem; max-width: 110rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { margin-top: 2.5rem; font-size: 1.25rem; }
h3 { margin: 2.2rem 0 .2rem; font-size: 1.05rem; }
p { margin: .2rem 0 .6rem; color: #47525d; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; margin: 1rem 0; }
dt { color: #6b7680; } dd { margin: 0; }
.tree, .legend { overflow-x: auto; border: 1px solid #e1e4e8; border-radius: 8px; padding: .5rem; }
.legend { position: sticky; top: 0; background: #fff; z-index: 1; }
img { max-width: 100%; height: auto; }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_gallery(
    trace: Trace,
    out: Path,
    *,
    steps: str | None = None,
    requests: str | None = None,
    tokenizer: str | None = None,
) -> Path:
    """Write `index.html`, which needs no other file, and each drawing as an SVG file.

    Returns the path of `index.html`.

    Args:
        steps: numbers of steps, such as "3,17,100-110"; None for some from all over the trace.
        requests: numbers of requests; None for the first of each step.
        tokenizer: directory or hub id, for traces with tokens.

    Raises:
        TraceError: a step or request is not in the trace, tokens are asked for that were not
            recorded, or a file cannot be written.
    """
    chosen = _chosen_steps(trace, steps)
    wanted = None if requests is None else parse_numbers(requests, "--requests")
    decode = None if tokenizer is None else _decoder(tokenizer, trace)
    trees = [
        (step, request)
        for step in chosen
        for request in step.requests
        if (request is step.requests[0] if wanted is None else request.request in wanted)
    ]
    if absent := set(wanted or ()) - {request.request for _, request in trees}:
        raise TraceError(
            f"--requests {requests}: {min(absent)} takes part in none of the chosen steps"
        )
    if len(trees) > MAX_TREES:
        raise TraceError(f"{len(trees)} trees are more than {MAX_TREES}; choose fewer by --steps")
    course = _course(trace)
    sections, files = [], {"course.svg": course.decode(), "legend.svg": legend_svg()}
    for step, request in trees:
        drawing = None
        if not step.is_plain:
            text = None if decode is None else _text_of(request, decode)
            header = trace.header
            drawing = tree_svg(step, request, header.topk, header.num_steps, text)
            files[f"step-{step.step}-request-{request.request}.svg"] = drawing
        sections.append(_section(step, request, drawing))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / name).write_text(content, encoding="utf-8")
        page = out / "index.html"
        page.write_text(_page(trace, course, sections), encoding="utf-8")
    except OSError as error:
        raise TraceError(f"--out {out}: cannot be written: {error.strerror}") from error
    return page


def parse_numbers(text: str, flag: str) -> list[int]:
    """Return the numbers of a list such as "3,17,100-110", ascending.

    Raises:
        TraceError: `text` is not such a list; the message names `flag`.
    """
    numbers: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            low, high = int(first), int(last if dash else first)
            if not 0 <= low <= high or high - low > 1_000_000:
                raise ValueError
            numbers.update(range(low, high + 1))
    except ValueError as error:
        raise TraceError(f"{flag} {text}: expected numbers such as 3,17,100-110") from error
    return sorted(numbers)


def _chosen_steps(trace: Trace, steps: str | None) -> list[TracedStep]:
    if not trace.steps:
        raise TraceError(f"trace {trace.path}: it holds no steps")
    if steps is None:
        drafted = [step for step in trace.steps if not step.is_plain] or trace.steps
        places = np.linspace(0, len(drafted) - 1, DEFAULT_STEPS + 2)[1:-1]
        return [drafted[place] for place in sorted({int(place) for place in places})]
    numbers = set(parse_numbers(steps, "--steps"))
    chosen = [step for step in trace.steps if step.step in numbers]
    if absent := numbers - {step.step for step in chosen}:
        held = f"{trace.steps[0].step} to {trace.steps[-1].step}"
        raise TraceError(f"--steps {steps}: the trace holds {held}, and no {min(absent)}")
    return chosen


def _decoder(tokenizer: str, trace: Trace) -> Callable[[int], str]:
    if not trace.header.has_tokens:
        raise TraceError(
            f"--tokenizer {tokenizer}: the trace holds no tokens; record with --cast-trace-tokens"
        )
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TraceError(f"--tokenizer {tokenizer}: cannot be loaded: {reason}") from error
    return lambda token: str(loaded.decode([token]))


def _text_of(request: TracedRequest, decode: Callable[[int], str]) -> Callable[[int], str]:
    tokens = unpacked(request.tokens, "int32")
    return lambda candidate: decode(int(tokens[candidate]))


def _course(trace: Trace) -> bytes:
    """Draw depth, N, price and speed over the steps of the run; return SVG."""
    steps = trace.steps
    numbers = np.array([step.step for step in steps])
    sizes = np.array([step.batch_size for step in steps])
    accepted = [sum(len(r.accepted) for r in step.requests) for step in steps]
    tokens = sizes + np.array(accepted)

    def speed(name: str) -> np.ndarray:
        times = [getattr(step, name) or np.nan for step in steps]
        return tokens / np.array(times, dtype=float) * 1e6

    prices = np.array([np.nan if step.price is None else step.price for step in steps], dtype=float)
    rows = np.array([step.mean_rows for step in steps])
    panels: list[tuple[str, list[tuple[str, np.ndarray, str]]]] = [
        ("layers", [("", np.array([step.num_layers for step in steps], dtype=float), "#0072b2")]),
        ("N, rows verified\nper request", [("", rows, "#009e73")]),
        ("accepted length", [("", tokens / sizes, "#cc79a7")]),
        ("price", [("", prices, "#7b3fa0")]),
        (
            "tokens/s",
            [
                ("measured", speed("measured_us"), "#d55e00"),
                ("predicted by the table", speed("predicted_us"), "#56b4e9"),
            ],
        ),
        ("batch size", [("", sizes.astype(float), "0.35")]),
    ]
    panels = [panel for panel in panels if any(np.isfinite(line[1]).any() for line in panel[1])]
    # With a fixed salt and without a date, the same trace gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "cast-sglang", "font.size": 9}):
        figure = Figure(figsize=(13, 1.45 * len(panels) + 0.5), layout="constrained")
        FigureCanvasSVG(figure)
        every = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, lines) in zip(every, panels, strict=True):
            is_count = label in ("batch size",)
            for name, values, color in lines:
                _draw_line(axes, numbers, values, name, color, smooth=not is_count)
            axes.set_ylabel(label, fontsize="small")
            axes.grid(alpha=0.25)
            axes.set_ylim(bottom=0.0)
            if len(lines) > 1:
                axes.legend(loc="upper left", fontsize="x-small", frameon=False, ncols=2)
        every[-1].set_xlabel(f"step (lines: mean of {MEAN_OVER} steps; dots: single steps)")
        every[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.align_ylabels(list(every))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _draw_line(
    axes: Axes, numbers: np.ndarray, values: np.ndarray, name: str, color: str, *, smooth: bool
) -> None:
    if not smooth:
        axes.step(numbers, values, where="mid", color=color, linewidth=1.2)
        return
    axes.plot(numbers, values, "o", color=color, alpha=0.3, markersize=2.4, markeredgewidth=0)
    is_known = np.isfinite(values)
    known, places = values[is_known], numbers[is_known]
    if len(known):
        width = min(MEAN_OVER, len(known))
        sums = np.convolve(known, np.ones(width), mode="same")
        counts = np.convolve(np.ones(len(known)), np.ones(width), mode="same")
        axes.plot(places, sums / counts, color=color, linewidth=1.4, label=name or None)


def _section(step: TracedStep, request: TracedRequest, drawing: str | None) -> str:
    title = f"Step {step.step}, request {request.request}"
    facts = [f"batch of {step.batch_size}", f"context {request.context}"]
    if drawing is None:
        facts.append("a plain step, without a tree")
    else:
        rows = 1 + len(unpacked(request.verified, "int32"))
        facts.append(f"{_counted(step.num_layers, 'layer')}, {_counted(rows, 'row')} verified")
        facts.append(f"{_counted(len(request.accepted), 'draft')} accepted")
    if step.price is not None:
        facts.append(f"price {step.price:.2f}")
    if step.predicted_us is not None:
        facts.append(f"predicted {step.predicted_us / 1e3:.1f} ms")
    if step.measured_us is not None:
        facts.append(f"measured {step.measured_us / 1e3:.1f} ms")
    tree = "" if drawing is None else f'<div class="tree">{drawing}</div>'
    return f"<h3>{title}</h3><p>{html.escape('; '.join(facts))}</p>{tree}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _page(trace: Trace, course: bytes, sections: Sequence[str]) -> str:
    header = trace.header
    identity = header.identity
    envelope = f"{header.num_steps} layers, top {header.topk}, {header.num_draft_tokens} rows"
    served = "the whole envelope in every step; " if header.is_full else ""
    facts: dict[str, Any] = {
        "device": identity.device_name,
        "pair": f"{identity.target.name} + {identity.draft.name}, {identity.dtype}",
        "policy": f"{served}{header.policy}",
        "envelope": envelope,
        "recorded": f"{header.date}, {len(trace.steps)} steps",
    }
    if trace.notes:
        facts["note"] = "; ".join(trace.notes)
    rows = "".join(f"<dt>{k}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
    picture = base64.b64encode(course).decode()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>CAST trace {html.escape(trace.path.name)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>Draft trees of a run</h1><dl>{rows}</dl>\n"
        f'<h2>Course of the run</h2><img alt="depth, N, price and speed by step" '
        f'src="data:image/svg+xml;base64,{picture}">\n'
        f'<h2>Trees</h2><div class="legend">{legend_svg()}</div>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
