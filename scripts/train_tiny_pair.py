#!/usr/bin/env python
"""Train a tiny Llama target and its EAGLE-3 draft on the Python library, on a CPU.

    python scripts/train_tiny_pair.py                      # everything, about 90 minutes
    python scripts/train_tiny_pair.py --stage draft        # one stage; the earlier ones must exist
    python scripts/train_tiny_pair.py --smoke --output-dir out/smoke --work-dir out/smoke-work

A run that was stopped goes on where it was: repeat the command. To start a stage afresh, remove
its files from the work folder.
"""

import argparse
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import train_draft
from draft_trainer import loop
from draft_trainer.target_model import Target
from rich.progress import Progress
from tiny_pair import card, corpus, draft_data, prompts, target_checkpoint, tokenizer
from tiny_pair.train_target import TargetTask, heldout_loss

STAGES = ("tokenizer", "target", "data", "draft", "card")
SEED = 0


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    batch_tokens: int = 4096
    num_heldout_windows: int = 64
    num_texts: int = 2048  # of each kind that the draft learns from
    max_prompt_tokens: int = 320
    max_new_tokens: int = 192
    num_prompts: int = prompts.NUM_PROMPTS


SMOKE_SIZES = Sizes(
    batch_tokens=512,
    num_heldout_windows=2,
    num_texts=4,
    max_prompt_tokens=200,
    max_new_tokens=16,
    num_prompts=2,
)
SMOKE_MINUTES = 0.05


class Pipeline:
    """The stages, each from files to files."""

    def __init__(self, args: argparse.Namespace, progress_bar: Progress) -> None:
        self.work_dir: Path = args.work_dir
        self.output_dir: Path = args.output_dir
        self.is_smoke: bool = args.smoke
        self.target_minutes: float = args.target_minutes
        self.draft_minutes: float = args.draft_minutes
        self.num_threads: int = args.num_threads
        self.served_accept_length: float | None = args.served_accept_length
        self.sizes = SMOKE_SIZES if args.smoke else Sizes()
        self.progress_bar = progress_bar
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.output_dir.mkdir(parents=True, exist_ok=True)

    def tokenizer(self) -> None:
        """Fit the tokenizer, encode the corpus, cut the held-out prompts."""
        if (self.work_dir / "counts.json").exists():
            return
        documents = list(corpus.iter_documents(self.is_smoke))
        fitted = tokenizer.train_tokenizer(documents)
        tokenizer.save_tokenizer(fitted, self.work_dir / "tokenizer")
        records = prompts.make_prompts(documents, fitted, self.sizes.num_prompts)
        prompts.write_prompts(records, self.output_dir / "heldout_prompts.jsonl")
        counts = tokenizer.write_tokens(fitted, documents, self.work_dir)
        _write_json(self.work_dir / "counts.json", counts)

    def target(self) -> None:
        """Train the target; the export follows every checkpoint."""
        target = Target(target_checkpoint.SHAPE)
        fitted = tokenizer.load_tokenizer(self.work_dir / "tokenizer")
        folder = self.output_dir / "target"
        task = TargetTask(
            target,
            tokenizer.read_tokens(self.work_dir, "train"),
            tokenizer.read_tokens(self.work_dir, "heldout"),
            self.sizes.batch_tokens,
            self.sizes.num_heldout_windows,
            save=lambda: target_checkpoint.save_target(target, fitted, folder),
        )
        loop.train(task, self.work_dir, self.target_minutes, self.progress_bar)
        heldout = tokenizer.read_tokens(self.work_dir, "heldout")
        loss = heldout_loss(target, heldout, self.sizes.num_heldout_windows)
        _write_json(self.work_dir / "target_loss.json", {"target_loss": loss})

    def data(self) -> None:
        """Cut what the draft learns from out of the corpus."""
        fitted = tokenizer.load_tokenizer(self.work_dir / "tokenizer")
        tokens = tokenizer.read_tokens(self.work_dir, "train")
        sizes = self.sizes
        path = self.work_dir / "draft_data.jsonl"
        draft_data.write_data(tokens, fitted, sizes.num_texts, sizes.max_prompt_tokens, path)

    def draft(self) -> None:
        """Distil the draft, by the trainer that any pair has."""
        sizes = self.sizes
        options = {
            "target": self.output_dir / "target",
            "out": self.output_dir / "draft",
            "work": self.work_dir / "draft",
            "data": self.work_dir / "draft_data.jsonl",
            "eval-data": self.output_dir / "heldout_prompts.jsonl",
            "draft-vocab": target_checkpoint.SHAPE.vocab_size,
            "max-prompt-tokens": sizes.max_prompt_tokens,
            "max-new-tokens": sizes.max_new_tokens,
            "minutes": self.draft_minutes,
            "batch-tokens": sizes.batch_tokens,
            "num-threads": self.num_threads,
            "heldout-rows": sizes.num_heldout_windows,
        }
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        layers = map(str, target_checkpoint.SHAPE.aux_layer_ids)
        temperatures = map(str, draft_data.TEMPERATURES)
        train_draft.main([*arguments, "--aux-layers", *layers, "--temperatures", *temperatures])

    def card(self) -> None:
        """Write the model card from what was measured."""
        counts = json.loads((self.work_dir / "counts.json").read_text())
        target_run = loop.read_state(self.work_dir, "target")
        evaluation = {
            **json.loads((self.work_dir / "target_loss.json").read_text()),
            **json.loads((self.output_dir / "draft" / "evaluation.json").read_text()),
            "train_tokens": counts["train"],
            "heldout_tokens": counts["heldout"],
            "chat_percent": 100 * counts["chat"] / counts["train"],
            "target_minutes": round(target_run.used_seconds / 60, 1),
            "target_steps": target_run.step,
            "target_parameters": target_checkpoint.num_parameters(),
            "batch_tokens": self.sizes.batch_tokens,
            "python_version": platform.python_version(),
        }
        _write_json(self.output_dir / "evaluation.json", evaluation)
        card.write_card(self.output_dir, self.work_dir, evaluation, self.served_accept_length)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; smoke mode shortens what was not asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("out/tiny_pair"),
        help="tokens, optimizer states and logs (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("models/tiny"),
        help="checkpoints and model card (default: %(default)s)",
    )
    parser.add_argument(
        "--target-minutes", type=float, help="training time of the target (default: 45)"
    )
    parser.add_argument(
        "--draft-minutes", type=float, help="training time of the draft (default: 30)"
    )
    parser.add_argument(
        "--served-accept-length",
        type=float,
        help="accept length measured through SGLang, for the model card",
    )
    parser.add_argument(
        "--num-threads", type=int, default=2, help="threads of PyTorch (default: %(default)s)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps of everything, in a minute"
    )
    args = parser.parse_args(argv)
    if args.target_minutes is None:
        args.target_minutes = SMOKE_MINUTES if args.smoke else 45.0
    if args.draft_minutes is None:
        args.draft_minutes = SMOKE_MINUTES if args.smoke else 30.0
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the stages that were asked for."""
    args = parse_args(argv)
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(SEED)
    with loop.make_progress_bar() as progress_bar:
        pipeline = Pipeline(args, progress_bar)
        for stage in STAGES if args.stage == "all" else (args.stage,):
            progress_bar.console.print(f"stage {stage}")
            getattr(pipeline, stage)()


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
