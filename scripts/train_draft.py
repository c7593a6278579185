#!/usr/bin/env python
"""Train a draft for a Llama target, on a CPU, from the target's own answers.

    python scripts/train_draft.py --target DIR --data FILE... --out DIR
    python scripts/train_draft.py ... --head cascade                            # one pass per tree
    python scripts/train_draft.py ... --stage answers --answer-tokens 1000000   # hours, resumable
    python scripts/train_draft.py ... --stage draft --minutes 120               # hours, resumable

The stages: `answers` lets the target answer the prompts of the data files and keeps its states
(4.6 kB a token for a hidden size of 576), `vocabulary` picks the tokens that the draft can propose,
`draft` trains, `eval` simulates SGLang's tree of 5 steps, topk 4 and 8 tokens on the prompts of
--eval-data, `card` writes the model card. A stage that was stopped goes on where it was: repeat the
command. `draft` may run beside `answers`, and takes up the answers that have come meanwhile. Where
there are more cores, run `answers` several times, each with data and a --work folder of its own,
and name these folders by --other-work later.

With --phase gto the stage `draft` tunes a trained head for the trees that a server of a given
profile and batch size verifies; it starts from --reference, and its own output is --out. With
--gto-profile `eval` also says what the target accepts of such trees, for any head.

A data file has a JSON object a line: {"turns": [QUESTION, ...]}, {"prompt": TEXT} to be continued,
or {"text": TEXT} to be learned as it is.
"""

import argparse
import copy
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from draft_trainer import card, export, loop
from draft_trainer.answers import Limits, Prompt, read_prompts, write_answers
from draft_trainer.distill import DraftTask, heldout_steps
from draft_trainer.draft_model import Draft, Head, init_from_target
from draft_trainer.evaluate import TreeShape, simulate_accept_lens
from draft_trainer.one_pass import (
    CASCADE_LAYERS,
    PARALLEL_DEPTH,
    PARALLEL_LAYERS,
    CascadeDraft,
    ParallelDraft,
)
from draft_trainer.optim import Rates
from draft_trainer.rows import Row, Rows, RowStore, RowStores
from draft_trainer.vocabulary import (
    choose_vocabulary,
    coverage,
    load_vocabulary,
    save_vocabulary,
)
from rich.progress import Progress

if TYPE_CHECKING:
    from draft_trainer.gto import GtoSettings
    from draft_trainer.target_model import Target

STAGES = ("answers", "vocabulary", "draft", "eval", "card")
PHASES = {"distill": "draft", "gto": "gto"}  # and the name of their state in the work folder
SEED = 0
HELD_OUT_EVERY = 50  # the answers to the first prompt of each fifty are kept from training
EVAL_TOKENS = 128


def is_held_out(row: Row) -> bool:
    """Say whether a row is kept from training: a fixed part, all turns of a prompt alike."""
    first_turn = row.name.partition("/")[0]
    return int(first_turn.rpartition(":")[2]) % HELD_OUT_EVERY == 1


class Pipeline:
    """The stages, each from files to files."""

    def __init__(self, args: argparse.Namespace, progress_bar: Progress) -> None:
        self.args = args
        self.work_dir: Path = args.work
        self.output_dir: Path = args.out
        self.progress_bar = progress_bar
        self.target = export.load_target(args.target, torch.bfloat16, args.aux_layers)
        folders = [path / "rows" for path in (args.work, *args.other_work)]
        own, *others = [RowStore(folder, self.target.shape.state_size) for folder in folders]
        self.own_store, self.store = own, RowStores([own, *others])
        self.output_dir.mkdir(parents=True, exist_ok=True)

    def answers(self) -> None:
        """Let the target answer the prompts."""
        args = self.args
        temperatures = tuple(args.temperatures)
        limits = Limits(args.max_prompt_tokens, args.max_new_tokens, args.slots, temperatures)
        self._answer(read_prompts(args.data), self.own_store, limits, args.answer_tokens)

    def vocabulary(self) -> None:
        """Pick the draft's tokens, once: a trained head belongs to them."""
        path = self.work_dir / "vocabulary.json"
        if not path.exists():
            rows = self._rows(held_out=False)
            vocabulary = choose_vocabulary(
                rows, self.target.shape.vocab_size, self.args.draft_vocab
            )
            save_vocabulary(vocabulary, path)
        part = coverage(self._rows(held_out=True), load_vocabulary(path))
        self.progress_bar.console.print(f"the draft can propose {part:.1%} of held-out answers")

    def draft(self) -> None:
        """Distil the draft; the export follows every checkpoint."""
        args = self.args
        reference = None
        if args.phase == "gto":
            reference = export.load_draft(args.reference, self.target.shape.num_layers)
            draft = copy.deepcopy(reference).train()
        else:
            draft = self._new_head(load_vocabulary(self.work_dir / "vocabulary.json"))
            init_from_target(draft, self.target)
        data = self.target, self.store, is_held_out, args.batch_tokens, args.heldout_rows

        def save() -> None:
            export.save_draft(draft, self.output_dir)

        slower = 1.0
        if reference is None:
            task = DraftTask(draft, *data, save=save)
        else:
            from draft_trainer import gto

            slower = gto.RATE_FACTOR
            task = gto.GtoTask(draft, reference, *data, save=save, settings=self._gto_settings())
        loop.train(
            task,
            self.work_dir,
            args.minutes,
            self.progress_bar,
            60 * args.checkpoint_minutes,
            Rates(slower * args.matrix_lr, slower * args.head_lr),
        )

    def _gto_settings(self, most_steps: int | None = None) -> "GtoSettings":
        from draft_trainer.gto import GtoSettings
        from draft_trainer.gto_trees import Load

        args = self.args
        num_steps, *sizes = args.gto_tree
        return GtoSettings(
            Load(args.gto_profile, args.gto_batch, args.gto_context),
            TreeShape(min(num_steps, most_steps or num_steps), *sizes),
            args.gto_group,
            args.gto_groups,
            args.gto_reward,
            args.gto_debias == "on",
        )

    def _new_head(self, vocabulary: torch.Tensor) -> Head:
        args, shape = self.args, self.target.shape
        if args.head == "cascade":
            return CascadeDraft(shape, vocabulary, args.norms, args.layers or CASCADE_LAYERS)
        if args.head == "parallel":
            sizes = args.layers or PARALLEL_LAYERS, args.depth or PARALLEL_DEPTH
            return ParallelDraft(shape, vocabulary, args.norms, *sizes)
        return Draft(shape, vocabulary, args.norms)

    def eval(self) -> None:
        """Measure the exported draft on the evaluation prompts, or on held-out answers."""
        args = self.args
        draft = export.load_draft(self.output_dir, self.target.shape.num_layers)
        rows = self._rows(held_out=True)[: args.heldout_rows]
        store: Rows = self.store
        steps = heldout_steps(draft, self.target, store, rows)
        tree = TreeShape(num_steps=min(TreeShape.num_steps, draft.num_steps))
        if args.eval_data:
            answers = RowStore(self.work_dir / "eval", self.target.shape.state_size)
            num_new = EVAL_TOKENS + tree.num_steps + 1
            limits = Limits(4 * args.max_prompt_tokens, num_new, min(args.slots, 16), (0.0,))
            prompts = [replace(p, turns=p.turns[:1]) for p in read_prompts(args.eval_data)]
            self._answer(prompts, answers, limits, None)
            asked = {prompt.name for prompt in prompts}
            rows, store = [row for row in answers.rows if row.name in asked], answers
        with torch.inference_mode():
            target = self.target.float()
            requests = [
                simulate_accept_lens(target, draft, store, row, tree)
                for row in self.progress_bar.track(rows, description="eval")
            ]
            served = self._served(draft, target, store, rows)
        lengths = [length for request in requests for length in request]
        run = loop.read_state(self.work_dir, PHASES[args.phase])
        evaluation = {
            "heldout_loss": steps.loss.item(),
            "agreement": steps.agreement.tolist(),
            "accept_length": sum(lengths) / max(1, len(lengths)),
            "accept_len_histogram": dict(sorted(Counter(lengths).items())),
            "prompts": [[len(request), sum(request)] for request in requests],  # steps, tokens
            "served": served,
            "eval_data": [path.name for path in args.eval_data] or ["held-out answers"],
            "num_prompts": len(rows),
            "num_new_tokens": EVAL_TOKENS,
            "tree": vars(tree),
            "parameters": sum(p.numel() for p in draft.parameters()),
            "vocabulary": len(draft.vocabulary),
            "coverage": coverage(self._rows(held_out=True), draft.vocabulary),
            "answers": len(self.store.rows),
            "answer_tokens": sum(len(r.tokens) - r.answer_start for r in self.store.rows),
            "row_tokens": sum(r.num_states for r in self.store.rows),
            "minutes": round(run.used_seconds / 60, 1),
            "steps": run.step,
            "token_passes": run.tokens_seen,
            "torch_version": torch.__version__,
        }
        export.write_json(self.output_dir / "evaluation.json", evaluation)
        print(f"accept length {evaluation['accept_length']:.3f}, agreement", end=" ")
        print(", ".join(f"{part:.1%}" for part in evaluation["agreement"]))

    def _served(
        self, draft: Head, target: "Target", store: Rows, rows: list[Row]
    ) -> list[dict[str, float]]:
        """Return what `served_trees` says of rows, where a cost profile is given."""
        if not self.args.gto_profile:
            return []
        from draft_trainer.gto import served_trees

        found = served_trees(draft, target, store, rows, self._gto_settings(draft.num_steps))
        return [trees._asdict() for trees in found]

    def card(self) -> None:
        """Write the model card from the evaluation."""
        evaluation = json.loads((self.output_dir / "evaluation.json").read_text())
        phase = PHASES[self.args.phase]
        card.write_card(self.output_dir, self.work_dir, evaluation, self.args.about, phase)

    def _answer(
        self, prompts: list[Prompt], store: RowStore, limits: Limits, max_tokens: int | None
    ) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.args.target)
        generation = json.loads((self.args.target / "generation_config.json").read_text())
        stop_ids = generation["eos_token_id"]
        stop_ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]
        write_answers(
            self.target, tokenizer, prompts, stop_ids, store, limits, self.progress_bar, max_tokens
        )

    def _rows(self, held_out: bool) -> list[Row]:
        return [row for row in self.store.rows if is_held_out(row) == held_out]


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", type=Path, required=True, metavar="DIR", help="a Llama checkpoint")
    add("--data", type=Path, nargs="+", default=[], metavar="FILE", help="prompts to learn from")
    add(
        "--eval-data",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="prompts of `eval`, first turns",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="gets the draft and its card")
    add("--work", type=Path, metavar="DIR", help="answers, optimizer (default: out/NAME of --out)")
    add(
        "--other-work",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="work folders of other runs of `answers`",
    )
    add("--stage", choices=(*STAGES, "all"), default="all", help="(default: all, in this order)")
    add(
        "--head",
        choices=("eagle3", "cascade", "parallel"),
        default="eagle3",
        help="how it drafts: token by token, or all tokens of a tree in one pass (default: eagle3)",
    )
    add("--norms", action="store_true", help="with the norms of EAGLE 3.1")
    add(
        "--layers",
        type=int,
        metavar="N",
        help=f"of a cascade (default: {CASCADE_LAYERS}) or parallel head ({PARALLEL_LAYERS})",
    )
    add(
        "--depth",
        type=int,
        metavar="N",
        help=f"tokens that a parallel head drafts (default: {PARALLEL_DEPTH}); "
        "a cascade drafts one a layer",
    )
    add("--aux-layers", type=int, nargs=3, metavar="N", help="layers that the draft sees")
    add("--draft-vocab", type=int, default=16384, metavar="N", help="its tokens (default: 16384)")
    add("--answer-tokens", type=int, metavar="N", help="stop `answers` there (default: no limit)")
    add(
        "--max-prompt-tokens",
        type=int,
        default=256,
        metavar="N",
        help="longer prompts are left out (default: 256)",
    )
    add("--max-new-tokens", type=int, default=256, metavar="N", help="an answer (default: 256)")
    add(
        "--temperatures",
        type=float,
        nargs="+",
        default=[0.0, 0.7],
        metavar="T",
        help="of the prompts in turn; 0 is greedy (default: 0 0.7)",
    )
    add("--slots", type=int, default=96, metavar="N", help="answers at once (default: 96)")
    add("--minutes", type=float, default=240, help="of training in all (default: 240)")
    add("--batch-tokens", type=int, default=2048, metavar="N", help="a step (default: 2048)")
    add("--matrix-lr", type=float, default=Rates.matrices, help="Muon's (default: %(default)s)")
    add("--head-lr", type=float, default=Rates.others, help="AdamW's (default: %(default)s)")
    add("--heldout-rows", type=int, default=64, metavar="N", help="to evaluate on (default: 64)")
    add("--checkpoint-minutes", type=float, default=5, help="between checkpoints (default: 5)")
    add("--phase", choices=PHASES, default="distill", help="of `draft` (default: distill)")
    add("--reference", type=Path, metavar="DIR", help="the trained head that `gto` tunes")
    add("--gto-profile", type=Path, metavar="FILE", help="cost profile of the pair that is tuned")
    add("--gto-batch", type=int, default=1, metavar="N", help="requests at once (default: 1)")
    add("--gto-context", type=int, default=256, metavar="N", help="their length (default: 256)")
    add(
        "--gto-tree",
        type=int,
        nargs=3,
        default=(5, 8, 32),
        metavar="N",
        help="steps, topk and tokens of the largest tree (default: 5 8 32)",
    )
    add("--gto-group", type=int, default=8, metavar="N", help="prefixes a group (default: 8)")
    add("--gto-groups", type=int, default=16, metavar="N", help="groups a text (default: 16)")
    add(
        "--gto-reward",
        choices=("smooth", "expected", "priced", "none"),
        default="smooth",
        help="what a tree is worth: the smooth maximum of its paths' expected lengths, its "
        "expected accepted tokens, these less the price of its rows, or nothing, which leaves the "
        "ordinary loss alone (default: smooth)",
    )
    add(
        "--gto-debias",
        choices=("on", "off"),
        default="on",
        help="take off what the reference's tree is worth (default: on)",
    )
    add("--about", type=Path, metavar="FILE", help="Markdown for the top of the card")
    add("--num-threads", type=int, default=1, help="threads of PyTorch (default: 1)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the stages that were asked for."""
    args = make_parser().parse_args(argv)
    args.aux_layers = tuple(args.aux_layers) if args.aux_layers else None
    args.work = args.work or Path("out") / args.out.name
    if args.head == "eagle3" and args.layers or args.head != "parallel" and args.depth:
        sys.exit("train_draft: --layers is for heads of one pass, --depth for parallel ones")
    if args.phase == "gto" and not (args.reference and args.gto_profile):
        sys.exit("train_draft: --phase gto needs --reference DIR and --gto-profile FILE")
    stages = STAGES if args.stage == "all" else (args.stage,)
    if "answers" in stages and not args.data:
        sys.exit("train_draft: --data FILE is needed to let the target answer")
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(SEED)
    with loop.make_progress_bar() as progress_bar:
        pipeline = Pipeline(args, progress_bar)
        for stage in stages:
            progress_bar.console.print(f"stage {stage}")
            getattr(pipeline, stage)()


if __name__ == "__main__":
    main()
