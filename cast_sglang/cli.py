"""Command line: `cast-sglang profile | show | doctor | replay | tune | trace`."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cast_sglang import __version__
from cast_sglang.config import REPLAYED_POLICIES
from cast_sglang.errors import CastError

__all__ = ["main"]

# Limits of the measuring time; measuring ends sooner if the times are steady. The start of the
# engine and the short real run at the end come on top.
BUDGET_SECONDS = 300.0
QUICK_BUDGET_SECONDS = 60.0
# Median error at held-out points above which `profile` advises more measuring time.
ROUGH_ERROR = 0.03

PROFILE_DESCRIPTION = """\
Measure what one forward pass of the target and of the draft model costs on this machine, and save
the tables as a cost profile. Every flag that is not listed below goes to SGLang unchanged, so give
the flags of the server that the profile is for:

  cast-sglang profile --model-path TARGET --speculative-draft-model-path DRAFT

A run that was interrupted resumes from FILE.partial.jsonl. The last line on stdout is a JSON object
with the output path, the seconds, the number of points and the errors, at held-out points and in a
short real run.
"""

DOCTOR_DESCRIPTION = """\
Check whether this machine, this SGLang, the model pair and its cost profile fit together, and say
what to do where they do not. Nothing is started and no model is loaded, but with --probe. Every
flag that is not listed below goes to SGLang unchanged, so give the flags of the server:

  cast-sglang doctor --model-path TARGET --speculative-draft-model-path DRAFT

With --probe, ten short prompts show whether the draft fits the target, on a server that runs:

  cast-sglang doctor --probe http://localhost:30000

The exit code is 0 if nothing failed (warnings do not count), else 1.
"""

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

# Of every command; an abbreviation could swallow a flag of SGLang.
COMMAND: dict[str, Any] = {
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    A `CastError` becomes one line on stderr and exit code 2, like a bad flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments, others = _parser().parse_known_args(argv)
    if others and "refuse" in arguments:
        arguments.refuse(f"unrecognized arguments: {' '.join(others)}")
    arguments.server_argv = others
    arguments.command = shlex.join(["cast-sglang", *argv])
    try:
        return arguments.run(arguments)
    except CastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cast-sglang",
        description="Cost-aware speculative decoding (CAST) for SGLang.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cast-sglang {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    profile = commands.add_parser(
        "profile",
        help="measure a cost profile of this machine and model pair",
        description=PROFILE_DESCRIPTION,
        usage="cast-sglang profile [--output FILE] [--quick] [--budget-seconds S] SGLANG_FLAGS...",
        **COMMAND,
    )
    profile.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="profile to write (default: in the user's cache directory, where the server looks)",
    )
    profile.add_argument(
        "--quick", action="store_true", help="coarser grid and fewer samples, for a first look"
    )
    profile.add_argument(
        "--budget-seconds",
        type=_positive_seconds,
        metavar="S",
        help="time for measuring, without loading the models and the short real run at the end, "
        "which takes a minute at most (default: 300; with --quick 60)",
    )
    profile.set_defaults(run=_profile)

    about = "summarise and draw a cost profile, or compare two"
    show = commands.add_parser("show", help=about, **COMMAND)
    show.add_argument("profile", type=Path, metavar="PROFILE")
    show.add_argument("second", type=Path, nargs="?", metavar="PROFILE2", help="compare with it")
    picture = show.add_mutually_exclusive_group()
    picture.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="picture to write, .png or .svg (default: PROFILE's name, .png, in this directory)",
    )
    picture.add_argument("--no-plot", action="store_true", help="write no picture")
    show.set_defaults(run=_show, refuse=show.error)

    doctor = commands.add_parser(
        "doctor",
        help="check that machine, SGLang, model pair and cost profile fit together",
        description=DOCTOR_DESCRIPTION,
        usage="cast-sglang doctor [--json] [--probe [URL]] [--cast-profile PATH] SGLANG_FLAGS...",
        **COMMAND,
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead")
    doctor.add_argument(
        "--cast-profile",
        metavar="PATH",
        help="the profile to check, or auto to search for one (default: as the server would)",
    )
    doctor.add_argument(
        "--probe",
        nargs="?",
        const="",
        metavar="URL",
        help="serve ten short prompts on the server at URL, or without URL on one that is started "
        "with the flags; say how far drafts are accepted, whether the head fits, and what "
        "speed-up to expect",
    )
    doctor.set_defaults(run=_doctor)
    _add_trace_commands(commands)
    return parser


def _add_trace_commands(commands: Any) -> None:
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
    tune.add_argument(
        "--evaluations", type=_count, default=80, metavar="N", help="thresholds tried (default: 80)"
    )
    tune.add_argument(
        "--max-steps",
        type=_count,
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


def _profile(arguments: argparse.Namespace) -> int:
    # Imported here, because it loads SGLang, which takes seconds and which `show` does not need.
    from cast_sglang.serving.profiling.command import profile_server

    budget = arguments.budget_seconds or (
        QUICK_BUDGET_SECONDS if arguments.quick else BUDGET_SECONDS
    )
    summary = profile_server(
        arguments.server_argv,
        output=arguments.output and str(arguments.output.expanduser()),
        quick=arguments.quick,
        budget_seconds=budget,
        command=arguments.command,
    )
    error = summary.get("heldout_median_error")
    if isinstance(error, float) and error > ROUGH_ERROR:
        print(
            f"cast-sglang profile: at held-out points the tables are off by {error:.1%} in the "
            f"median; more time than --budget-seconds {budget:g} makes them better",
            file=sys.stderr,
        )
    print(json.dumps(summary), flush=True)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from cast_sglang.costs.profiles import load_profile
    from cast_sglang.report import profile_text

    paths = [path for path in (arguments.profile, arguments.second) if path is not None]
    profiles = [load_profile(path) for path in paths]
    if len(profiles) > 1:
        profile_text.print_comparison(profiles[0], profiles[1], Console())
    else:
        profile_text.print_profile(profiles[0], Console())
    if not arguments.no_plot:
        from cast_sglang.report.profile_plot import plot_profiles

        picture = arguments.plot or Path("__vs__".join(path.stem for path in paths) + ".png")
        plot_profiles(profiles, picture)
        print(f"picture: {picture}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from cast_sglang.serving.launch.doctor import examine

    diagnosis = examine(
        arguments.server_argv, cast_profile=arguments.cast_profile, probe_url=arguments.probe
    )
    if arguments.json:
        print(diagnosis.as_json(), flush=True)
    else:
        from rich.console import Console

        diagnosis.print(Console())
    return diagnosis.exit_code


def _replay(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    thresholds = {
        name: getattr(arguments, name)
        for name in ("c1", "c2", "c3", "r")
        if getattr(arguments, name) is not None
    }
    policy = arguments.policy or ("fixed" if thresholds else None)
    result = _session(arguments).replay(policy, thresholds)
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


def _count(text: str) -> int:
    count = int(text)
    if count < 2:
        raise ValueError(text)
    return count


def _positive_seconds(text: str) -> float:
    seconds = float(text)
    if not 0.0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
