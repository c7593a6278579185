"""The command `doctor`."""

import argparse
from typing import Any

from cast_sglang.cli.parsing import COMMAND

__all__ = ["add_doctor_command"]

DOCTOR_DESCRIPTION = """\
Check whether this machine, this SGLang, the model pair and its cost profile fit together, and say
what to do where they do not. Nothing is started and no model is loaded, but with --probe. Every
flag that is not listed below goes to SGLang unchanged, so give the flags of the server:

  cast-sglang doctor --model-path TARGET --speculative-draft-model-path DRAFT

With --probe, ten short prompts show whether the draft fits the target, on a server that runs:

  cast-sglang doctor --probe http://localhost:30000

The exit code is 0 if nothing failed (warnings do not count), else 1.
"""


def add_doctor_command(commands: Any) -> None:
    """Add the command to the parser's."""
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
