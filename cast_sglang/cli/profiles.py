"""Commands about cost profiles: `profile`, `estimate` and `show`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cast_sglang.cli.parsing import COMMAND, positive, positive_seconds

__all__ = ["add_profile_commands"]

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

Without a draft only passes of the target are measured. A run that was interrupted resumes from
FILE.partial.jsonl. The last line on stdout is a JSON object with the output path, the seconds, the
number of points and the errors, at held-out points and in a short real run.
"""


ESTIMATE_DESCRIPTION = """\
Compute the cost profile of a pair on a GPU that is not at hand, from the models' configs and the
GPU's data: reading weights and cache, products in whole tiles, least times of kernels, the link
between GPUs, and the host's decisions. Nothing is measured. The file says so, and so does whatever
shows it. A server refuses it; it is for what-if:

  cast-sglang estimate --gpu H200 --model-config TARGET/config.json --output FILE
  cast-sglang replay TRACE --profile FILE --allow-foreign
"""


def add_profile_commands(commands: Any) -> None:
    """Add the commands to the parser's."""
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
        type=positive_seconds,
        metavar="S",
        help="time for measuring, without loading the models and the short real run at the end, "
        "which takes a minute at most (default: 300; with --quick 60)",
    )
    profile.set_defaults(run=_profile)

    estimate = commands.add_parser(
        "estimate",
        help="compute the cost profile of a GPU that is not at hand",
        description=ESTIMATE_DESCRIPTION,
        **COMMAND,
    )
    estimate.add_argument(
        "--gpu", required=True, metavar="GPU", help="RTX4090, A800, H20, L40S, H100, H200 or B200"
    )
    estimate.add_argument(
        "--model-config",
        type=Path,
        required=True,
        metavar="FILE",
        help="the target's config.json, or its directory",
    )
    estimate.add_argument(
        "--draft-config",
        type=Path,
        metavar="FILE",
        help="the draft's (default: that of an EAGLE-3 draft as they are published)",
    )
    estimate.add_argument("--tp", type=positive, default=1, metavar="N", help="GPUs (default: 1)")
    estimate.add_argument(
        "--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="(default: bfloat16)"
    )
    estimate.add_argument(
        "--quantization", choices=("fp8",), help="of the target's weights (default: none)"
    )
    for name, default, what in (
        ("--max-batch-size", 64, "requests"),
        ("--max-context", 16384, "tokens of a request"),
        ("--max-rows", 64, "rows verified per request"),
        ("--max-width", 10, "nodes per request in a layer of the draft"),
        ("--max-layers", 8, "layers of the draft"),
    ):
        estimate.add_argument(
            name,
            type=positive,
            default=default,
            metavar="N",
            help=f"the most {what} that the tables hold (default: {default})",
        )
    estimate.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="profile to write"
    )
    estimate.set_defaults(run=_estimate, refuse=estimate.error)

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


def _estimate(arguments: argparse.Namespace) -> int:
    from cast_sglang.costs.limits import Limits
    from cast_sglang.costs.profiles import save_profile
    from cast_sglang.profiling.estimate import estimate_profile, read_model_config
    from cast_sglang.profiling.gpus import MATMUL_SHARE, MEMORY_SHARE, find_gpu
    from cast_sglang.serving.launch.identity import command_without_local_paths

    target, target_name = read_model_config(arguments.model_config)
    draft, draft_name = None, "EAGLE-3 draft as published"
    if arguments.draft_config is not None:
        draft, draft_name = read_model_config(arguments.draft_config)
    profile = estimate_profile(
        find_gpu(arguments.gpu),
        target,
        draft,
        Limits(
            max_batch_size=arguments.max_batch_size,
            max_context=arguments.max_context,
            max_verify_rows=arguments.max_rows,
            max_width=arguments.max_width,
            max_extend_rows=min(arguments.max_layers + 1, arguments.max_rows),
        ),
        names=(target_name, draft_name),
        tp_size=arguments.tp,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        command=command_without_local_paths(arguments.command),
    )
    save_profile(profile, arguments.output.expanduser())
    print(f"estimated, not measured: {arguments.output}")
    print(
        f"assumed, from published benchmarks: products reach {MATMUL_SHARE:.0%} of the GPU's peak "
        f"rate, and passes {MEMORY_SHARE:.0%} of its memory's bandwidth"
    )
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
