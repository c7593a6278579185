"""The model card of a draft: how it was made, what was measured."""

import csv
import json
from pathlib import Path

TEMPLATE = Path(__file__).with_name("card_template.md")
# What the card says of a head, by the class that serves it, and of how it was trained.
HEADS = {
    "LlamaForCausalLMEagle3": (
        "An EAGLE-3 head of one layer",
        "five self-fed steps\n(training-time test of EAGLE-3, arXiv 2503.01840)",
    ),
    "LlamaForCausalLMCascadeEagle3": (
        "A cascade head of {num_hidden_layers} layers, which drafts as many tokens in one pass",
        "the losses of all its layers\n(FastEagle, arXiv 2509.20416)",
    ),
    "LlamaForCausalLMParallelEagle3": (
        "A parallel head of {num_hidden_layers} layers, which drafts {one_pass_depth} tokens",
        "masked slots\n(P-EAGLE, arXiv 2602.01469)",
    ),
}


def write_card(
    output_dir: Path,
    work_dir: Path,
    evaluation: dict,
    about: Path | None,
    phase: str = "draft",
) -> None:
    """Write README.md and the loss curves beside the checkpoint.

    Args:
        output_dir: the draft's folder.
        work_dir: where it was trained.
        evaluation: what the stage `eval` wrote.
        about: Markdown that says what target and data are, and under which licences; its first line
            is the title of the card.
        phase: "draft", or "gto" for a head that was tuned.
    """
    config = json.loads((output_dir / "config.json").read_text())
    [architecture] = config["architectures"]
    head, trained = (part.format(**config) for part in HEADS[architecture])
    if phase == "gto":
        trained += ", then tuned by group trees\n(GTO, arXiv 2509.22134)"
    title = "# An EAGLE-3 draft\n" if architecture == "LlamaForCausalLMEagle3" else "# A draft\n"
    text = TEMPLATE.read_text().format(
        **printable(evaluation),
        about=about.read_text().strip() if about else title,
        head=f"{head} (`{architecture}`)",
        trained=trained,
        aux_layer_ids=config["eagle_config"]["eagle_aux_hidden_state_layer_ids"],
    )
    (output_dir / "README.md").write_text(text)
    write_curves({phase: work_dir / f"{phase}_loss.csv"}, output_dir)


def printable(evaluation: dict) -> dict:
    """Return the numbers of an evaluation, with those that are lists as text."""
    histogram = evaluation["accept_len_histogram"]
    total = sum(histogram.values())
    return evaluation | {
        "agreement": ", ".join(f"{part:.1%}" for part in evaluation["agreement"]),
        "eval_data": ", ".join(evaluation["eval_data"]),
        "histogram": ", ".join(f"{length}: {n / total:.0%}" for length, n in histogram.items()),
    }


def write_curves(tables: dict[str, Path], output_dir: Path) -> None:
    """Write the losses of models over training time as a table and a picture.

    Args:
        tables: the loop's table of each model.
        output_dir: gets `loss_curves.csv` and `loss_curves.png`.
    """
    rows = []
    for model, path in tables.items():
        with path.open(newline="") as file:
            rows += [[model, *row] for row in list(csv.reader(file))[1:]]
    with (output_dir / "loss_curves.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "step", "minutes", "series", "value"])
        writer.writerows(rows)
    _plot(rows, list(tables), output_dir / "loss_curves.png")


def _plot(rows: list[list[str]], models: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(model, ("train_loss", "heldout_loss"), "nats a token") for model in models]
    agreements = tuple(f"agreement_{step}" for step in range(1, 6))
    panels.append((models[-1], agreements, "held-out agreement"))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6))
    for axis, (model, names, label) in zip(axes, panels, strict=True):
        for name in names:
            points = [(float(r[2]), float(r[4])) for r in rows if r[0] == model and r[3] == name]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set(title=model, xlabel="minutes", ylabel=label)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
