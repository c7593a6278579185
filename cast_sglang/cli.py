"""Command line: `cast-sglang profile | show`."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cast_sglang import __version__
from cast_sglang.errors import CastError

__all__ = ["main"]

PROFILE_DESCRIPTION = """\
Measure what one forward pass of the target and of the draft model costs on this machine, and save
the tables as a cost profile. Every flag that is not listed below goes to SGLang unchanged, so give
the flags of the server that the profile is for:

  cast-sglang profile --model-path TARGET --speculative-draft-model-path DRAFT

A run that was interrupted resumes from FILE.partial.jsonl. The last line on stdout is a JSON object
with the output path, the seconds, the number of points and the error at held-out points.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    A `CastError` becomes one line on stderr and exit code 2, like a bad flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments, extra = _parser().parse_known_args(argv)
    arguments.command = shlex.join(["cast-sglang", *argv])
    try:
        return arguments.run(arguments, extra)
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
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An abbreviation could swallow a flag of SGLang.
        allow_abbrev=False,
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
        help="time for measuring, without loading the models (default: no limit)",
    )
    profile.set_defaults(run=_profile)

    show = commands.add_parser(
        "show", help="summarise a cost profile, or compare two", allow_abbrev=False
    )
    show.add_argument("profile", type=Path, metavar="PROFILE")
    show.add_argument("second", type=Path, nargs="?", metavar="PROFILE2", help="compare with it")
    show.add_argument(
        "--plot", type=Path, metavar="FILE", help="also draw the curves, as .png or .svg"
    )
    show.set_defaults(run=lambda arguments, extra: _show(arguments, extra, show))
    return parser


def _profile(arguments: argparse.Namespace, server_argv: list[str]) -> int:
    # Imported here: it loads SGLang, which takes seconds and which `show` does not need.
    from cast_sglang.serving.measure import profile_server

    summary = profile_server(
        server_argv,
        output=arguments.output and str(arguments.output.expanduser()),
        quick=arguments.quick,
        budget_seconds=arguments.budget_seconds,
        command=arguments.command,
    )
    print(json.dumps(summary), flush=True)
    return 0


def _show(arguments: argparse.Namespace, extra: list[str], parser: argparse.ArgumentParser) -> int:
    if extra:
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    from rich.console import Console

    from cast_sglang import report
    from cast_sglang.profiles import load_profile

    profiles = [load_profile(arguments.profile)]
    if arguments.second:
        profiles.append(load_profile(arguments.second))
        report.print_comparison(profiles[0], profiles[1], Console())
    else:
        report.print_profile(profiles[0], Console())
    if arguments.plot:
        report.plot_profiles(profiles, arguments.plot)
    return 0


def _positive_seconds(text: str) -> float:
    seconds = float(text)
    if not 0.0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
