"""Command line: `cast-sglang profile | estimate | show | doctor | replay | tune | trace`."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from cast_sglang import __version__
from cast_sglang.cli.doctor import add_doctor_command
from cast_sglang.cli.profiles import add_profile_commands
from cast_sglang.cli.traces import add_trace_commands
from cast_sglang.errors import CastError

__all__ = ["main"]


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
    add_profile_commands(commands)
    add_doctor_command(commands)
    add_trace_commands(commands)
    return parser
