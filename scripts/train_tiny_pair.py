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
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from tiny_pair import card, corpus, export, generate, loop, prompts, tokenizer
from tiny_pair.draft_model import Draft, init_from_target
from tiny_pair.evaluate import TreeShape, first_steps, simulate_accept_lens
from tiny_pair.layers import Shape
from tiny_pair.target_model import Target
from tiny_pair.train_draft import DraftTask, heldout_steps, weighted_loss
from tiny_pair.train_target import TargetTask, heldout_loss

STAGES = ("tokenizer", "target", "generate", "draft", "eval", "card")
SEED = 0
EARLY_TOKENS = 32  # greedy text of so small a target repeats itself sooner or later, not here


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    batch_tokens: int = 4096
    num_heldout_windows: int = 64
    num_continuations: int = 2048
    row_tokens: int = generate.ROW_TOKENS
    num_prompts: int = prompts.NUM_PROMPTS
    num_new_tokens: int = 128


SMOKE_SIZES = Sizes(
    batch_tokens=512,
    num_heldout_windows=2,
    num_continuations=4,
    row_tokens=96,
    num_prompts=2,
    num_new_tokens=16,
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
        target = Target(Shape())
        fitted = tokenizer.load_tokenizer(self.work_dir / "tokenizer")
        task = TargetTask(
            target,
            tokenizer.read_tokens(self.work_dir, "train"),
            tokenizer.read_tokens(self.work_dir, "heldout"),
            self.sizes.batch_tokens,
            self.sizes.num_heldout_windows,
            save=lambda: export.save_target(target, fitted, self.output_dir / "target"),
        )
        loop.train(task, self.work_dir, self.target_minutes, self.progress_bar)

    def generate(self) -> None:
        """Let the target continue training text."""
        generate.write_continuations(
            export.load_target(self.output_dir / "target"),
            tokenizer.read_tokens(self.work_dir, "train"),
            self.work_dir,
            self.sizes.num_continuations,
            self.progress_bar,
            self.sizes.row_tokens,
        )

    def draft(self) -> None:
        """Distil the draft; the export follows every checkpoint."""
        target = export.load_target(self.output_dir / "target")
        draft = Draft(target.shape)
        init_from_target(draft, target)
        task = DraftTask(
            draft,
            target,
            tokenizer.read_tokens(self.work_dir, "train"),
            tokenizer.read_tokens(self.work_dir, "heldout"),
            generate.read_continuations(self.work_dir, self.sizes.row_tokens),
            self.sizes.batch_tokens,
            self.sizes.num_heldout_windows,
            save=lambda: export.save_draft(draft, self.output_dir / "draft"),
        )
        loop.train(task, self.work_dir, self.draft_minutes, self.progress_bar)

    def eval(self) -> None:
        """Measure the exported pair on held-out text."""
        target = export.load_target(self.output_dir / "target")
        draft = export.load_draft(self.output_dir / "draft", target.shape.num_layers)
        heldout_tokens = tokenizer.read_tokens(self.work_dir, "heldout")
        sizes = self.sizes
        steps = heldout_steps(draft, target, heldout_tokens, sizes.num_heldout_windows)
        requests = self._accept_lens(target, draft)
        accept_lens = [length for request in requests for length in request]
        early = [length for request in requests for length in first_steps(request, EARLY_TOKENS)]
        counts = json.loads((self.work_dir / "counts.json").read_text())
        target_run = loop.read_state(self.work_dir, "target")
        draft_run = loop.read_state(self.work_dir, "draft")
        evaluation = {
            "target_loss": heldout_loss(target, heldout_tokens, sizes.num_heldout_windows),
            "draft_loss": weighted_loss(steps.losses).item(),
            "draft_agreement": steps.agreement.tolist(),
            "accept_length": sum(accept_lens) / len(accept_lens),
            "accept_length_early": sum(early) / len(early),
            "accept_len_histogram": dict(sorted(Counter(accept_lens).items())),
            "num_prompts": sizes.num_prompts,
            "num_new_tokens": sizes.num_new_tokens,
            "num_early_tokens": EARLY_TOKENS,
            "tree": vars(TreeShape()),
            "target_parameters": sum(p.numel() for p in target.parameters()),
            "draft_parameters": sum(p.numel() for p in draft.parameters()),
            "train_tokens": counts["train"],
            "heldout_tokens": counts["heldout"],
            "chat_percent": 100 * counts["chat"] / counts["train"],
            "continuations": len(generate.read_continuations(self.work_dir, sizes.row_tokens)),
            "target_minutes": round(target_run.used_seconds / 60, 1),
            "target_steps": target_run.step,
            "draft_minutes": round(draft_run.used_seconds / 60, 1),
            "draft_steps": draft_run.step,
            "batch_tokens": sizes.batch_tokens,
            "python_version": platform.python_version(),
            "torch_version": torch.__version__,
        }
        _write_json(self.output_dir / "evaluation.json", evaluation)
        self.progress_bar.console.print(f"accept length {evaluation['accept_length']:.3f}")

    def card(self) -> None:
        """Write the model card from the evaluation."""
        evaluation = json.loads((self.output_dir / "evaluation.json").read_text())
        card.write_card(self.output_dir, self.work_dir, evaluation, self.served_accept_length)

    def _accept_lens(self, target: Target, draft: Draft) -> list[list[int]]:
        """Return the accept lengths of each held-out request."""
        fitted = tokenizer.load_tokenizer(self.work_dir / "tokenizer")
        records = prompts.read_prompts(self.output_dir / "heldout_prompts.jsonl")
        requests = []
        for record in self.progress_bar.track(records, description="eval"):
            prompt = fitted.encode(record["prompt"]).ids
            num_new_tokens = self.sizes.num_new_tokens
            requests.append(simulate_accept_lens(target, draft, prompt, num_new_tokens))
        return requests


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
