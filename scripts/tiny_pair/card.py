"""The model card: what the pair is, how it was made, what was measured."""

import json
from pathlib import Path

from draft_trainer.card import printable, write_curves

TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(
    output_dir: Path, work_dir: Path, evaluation: dict, served_accept_length: float | None
) -> None:
    """Write README.md and the loss curves beside the checkpoints."""
    draft = json.loads((output_dir / "draft" / "config.json").read_text())
    served_row = ""
    if served_accept_length is not None:
        served_row = f"| measured through SGLang | {served_accept_length:.2f} |\n"
    text = TEMPLATE.read_text().format(
        **printable(evaluation),
        aux_layer_ids=draft["eagle_config"]["eagle_aux_hidden_state_layer_ids"],
        served_row=served_row,
    )
    (output_dir / "README.md").write_text(text)
    tables = {"target": work_dir / "target_loss.csv", "draft": work_dir / "draft/draft_loss.csv"}
    write_curves(tables, output_dir)
