"""The model card: what the pair is, how it was made, what was measured."""

import csv
import json
from pathlib import Path

TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(
    output_dir: Path, work_dir: Path, evaluation: dict, served_accept_length: float | None
) -> None:
    """Write README.md and the loss curves beside the checkpoints."""
    draft = json.loads((output_dir / "draft" / "config.json").read_text())
    served_row = ""
    if served_accept_length is not None:
        served_row = f"| measured through SGLang | {served_accept_length:.2f} |\n"
    histogram = evaluation["accept_len_histogram"]
    total = sum(histogram.values())
    text = TEMPLATE.read_text().format(
        **evaluation,
        aux_layer_ids=draft["eagle_config"]["eagle_aux_hidden_state_layer_ids"],
        agreement=", ".join(f"{value:.0%}" for value in evaluation["draft_agreement"]),
        histogram=", ".join(f"{length}: {n / total:.0%}" for length, n in histogram.items()),
        served_row=served_row,
    )
    (output_dir / "README.md").write_text(text)
    rows = _loss_rows(work_dir)
    with (output_dir / "loss_curves.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "step", "minutes", "series", "value"])
        writer.writerows(rows)
    _plot(rows, output_dir / "loss_curves.png")


def _loss_rows(work_dir: Path) -> list[list[str]]:
    rows = []
    for model in ("target", "draft"):
        with (work_dir / f"{model}_loss.csv").open(newline="") as file:
            rows += [[model, *row] for row in list(csv.reader(file))[1:]]
    return rows


def _plot(rows: list[list[str]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6))
    panels = [
        (axes[0], "target", ("train_loss", "heldout_loss"), "nats a token"),
        (axes[1], "draft", ("train_loss", "heldout_loss"), "cross-entropy, weighted over steps"),
        (
            axes[2],
            "draft",
            tuple(f"agreement_{step}" for step in range(1, 6)),
            "held-out agreement",
        ),
    ]
    for axis, model, names, label in panels:
        for name in names:
            points = [(float(r[2]), float(r[4])) for r in rows if r[0] == model and r[3] == name]
            if points:
                axis.plot(*zip(*points, strict=True), label=name)
        axis.set(title=model, xlabel="minutes", ylabel=label)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
