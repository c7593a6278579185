"""Commands about traces: `replay`, `tune` and `trace show`."""

import argparse
import json
from pathlib import Path
from typing import Any

from cast_sglang.cli.parsing import COMMAND, at_least_two
from cast_sglang.config import REPLAYED_POLICIES

__all__ = ["add_trace_commands"]

REPLAY_DESCRIPTION = """\
Decide every step of a trace anew, with any cost profile and any policy, and predict tokens per
second. A trace is recorded by a server that runs with --cast-trace FILE. With a profile of another
device the answer is what CAST would do there. On the device of the recording, the tables are
corrected by the recorded times as the server does it; --no-correction takes them as they are.
"""

TUNE_DESCRIPTION = """\
Fit the thresholds C1, C2, C3 and R of policy fixed to a trace, and say how much speed they lack
against policy auto and the best fixed tree. Prints the flags to use. Best on a trace that was
recorded with --cast-trace-full, which knows the fate of every tree within the envelope.
"""

TRACE_SHOW_DESCRIPTION = """\
Draw draft trees of chosen steps and the course of the run, as one self-contained page and as SVG
files. Nodes show their tokens where the trace has them (--cast-trace-tokens) and a tokenizer is
given, else the numbers of the candidates.
"""


def add_trace_commands(commands: Any) -> None:
    """Add the commands to the parser's."""
    replay = commands.add_parser(
        "replay",
        help="decide a recorded trace anew with any profile and policy",
        description=REPLAY_DESCRIPTION,
        **COMMAND,
    )
    tune = commands.add_parser(
        "tune",
        help="fit the thresholds of policy fixed to a trace",
        description=TUNE_DESCRIPTION,
        **COMMAND,
    )
    for command in (replay, tune):
        command.add_argument("trace", type=Path, metavar="TRACE")
        command.add_argument(
            "--profile",
            default="auto",
            metavar="P",
            help="cost profile, of any device; auto (default) searches one of the recording's",
        )
        command.add_argument(
            "--allow-foreign", action="store_true", help="take a profile of another model pair"
        )
        command.add_argument(
            "--no-correction", action="store_true", help="take the tables as they are"
        )
        command.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
        command.add_argument("--json", action="store_true", help="print one JSON object instead")
    replay.set_defaults(run=_replay, refuse=replay.error)
    tune.set_defaults(run=_tune, refuse=tune.error)
    replay.add_argument(
        "--policy",
        choices=tuple(REPLAYED_POLICIES),
        metavar="POLICY",
        help=f"{' | '.join(REPLAYED_POLICIES)} (default: as recorded)",
    )
    for name in ("c1", "c2", "c3"):
        replay.add_argument(f"--{name}", type=float, metavar="PRICE", help="of policy fixed")
    replay.add_argument("--r", type=int, metavar="R", help="of policy fixed")
    copies = replay.add_mutually_exclusive_group()
    copies.add_argument(
        "--no-copies", action="store_true", help="as if the server had run without --cast-copying"
    )
    copies.add_argument(
        "--switch-at",
        type=at_least_two,
        metavar="N",
        help="copy whole drafts where N tokens match, and nothing elsewhere",
    )
    tune.add_argument(
        "--evaluations",
        type=at_least_two,
        default=80,
        metavar="N",
        help="thresholds tried (default: 80)",
    )
    tune.add_argument(
        "--max-steps",
        type=at_least_two,
        default=400,
        metavar="N",
        help="steps replayed, in stretches from all over a longer trace (default: 400)",
    )
    trace = commands.add_parser("trace", help="look at a trace", **COMMAND)
    show = trace.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "show",
        help="draw draft trees and the course of the run",
        description=TRACE_SHOW_DESCRIPTION,
        **COMMAND,
    )
    show.add_argument("trace", type=Path, metavar="TRACE")
    show.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    show.add_argument(
        "--steps",
        metavar="LIST",
        help="steps to draw, such as 3,17,100-110 (default: some from all over the trace)",
    )
    show.add_argument(
        "--requests", metavar="LIST", help="requests to draw, such as 0,2 (default: the first)"
    )
    show.add_argument("--tokenizer", metavar="PATH", help="directory or hub id of the tokenizer")
    show.set_defaults(run=_trace_show, refuse=show.error)


def _replay(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    thresholds = {
        name: getattr(arguments, name)
        for name in ("c1", "c2", "c3", "r")
        if getattr(arguments, name) is not None
    }
    policy = arguments.policy or ("fixed" if thresholds else None)
    result = _session(arguments).replay(
        policy, thresholds, copies=not arguments.no_copies, switch_at=arguments.switch_at
    )
    if arguments.json:
        print(json.dumps(result.as_dict()), flush=True)
    else:
        result.print(Console())
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from cast_sglang.trace.tuning import print_tuned, tune

    session = _session(arguments)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("replaying", total=None)
        tuned = tune(
            session.trace,
            session.profile,
            correct=session.corrects,
            evaluations=arguments.evaluations,
            max_steps=arguments.max_steps,
            seed=session.seed,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )
    if arguments.json:
        print(json.dumps(tuned.as_dict()), flush=True)
    else:
        session.print_notes(Console())
        print_tuned(tuned, Console())
    return 0


def _session(arguments: argparse.Namespace) -> Any:
    from cast_sglang.trace.session import open_session

    return open_session(
        arguments.trace,
        arguments.profile,
        allow_foreign=arguments.allow_foreign,
        corrects=not arguments.no_correction,
        seed=arguments.seed,
    )


def _trace_show(arguments: argparse.Namespace) -> int:
    from cast_sglang.report.trace_page import write_gallery
    from cast_sglang.trace.file import read_trace

    page = write_gallery(
        read_trace(arguments.trace),
        arguments.out.expanduser(),
        steps=arguments.steps,
        requests=arguments.requests,
        tokenizer=arguments.tokenizer,
    )
    print(f"page: {page}")
    return 0
