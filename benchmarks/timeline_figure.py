"""Picture of simulated time lines: host and device of each design, one below the other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLORS = {
    "launch": "#4c72b0",
    "work": "#8c8c8c",
    "wait": "#f2c14e",
    "pass": "#55a868",
    "policy": "#8172b2",
    "surplus": "#c44e52",
}
LANE_HEIGHT = 0.38
# Names are written only where they have room.
LABEL_SHARE = 0.045


def draw_timeline(batch: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw one step of each design into a file; the ending of its name says the format."""
    designs = batch["designs"]
    longest = max(design["step_us"] for design in designs)
    figure = Figure(figsize=(15, 1.4 + 0.95 * len(designs)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, design in enumerate(designs):
        for track, kind, name, begin, end in design["spans"]:
            lane = row + (-0.2 if track == "host" else 0.2)
            axes.barh(lane, end - begin, LANE_HEIGHT, begin, color=COLORS[kind], linewidth=0)
            if track == "device" and end - begin > LABEL_SHARE * longest:
                label = {"ha": "center", "va": "center", "fontsize": 7, "color": "white"}
                axes.text((begin + end) / 2, lane, name, **label)
        text = f"  {design['step_us']:.0f} us, {design['lost_us']:.0f} lost"
        axes.text(design["step_us"], row, text, va="center", fontsize=8)
    _label(axes, [design["design"] for design in designs], longest)
    handles = [Patch(color=color, label=kind) for kind, color in COLORS.items()]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=6)
    axes.set_title(title)
    figure.savefig(path)


def _label(axes: Axes, names: list[str], longest: float) -> None:
    ticks = [row + offset for row in range(len(names)) for offset in (-0.2, 0.2)]
    labels = [f"{name} {track}" for name in names for track in ("host", "device")]
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.14)
    axes.set_xlabel("microseconds since the end of the step before, on the device")
