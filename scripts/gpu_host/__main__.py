"""Check CAST on a GPU host without a network, in one command and within ten minutes.

    bash scripts/gpu_check.sh --carried DIR --out DIR
    bash scripts/gpu_check.sh --dry-run

Installs what scripts/pack_gpu_host.sh gathered, then runs the stages below one after the other. A
stage that fails or takes too long does not stop the later ones. Without --carried the packages of
the interpreter are used (.venv, if there is one).

--out gets at most 8 files: summary.json with an entry for each stage (status passed, failed or
skipped, seconds, numbers), summary.txt for people, speed.json (the table of all arms), ops.json,
profile.json (the cost profile), check.json (these four in one), trace.json.gz and logs.tar.gz. The
exit code is 0 if no stage failed, 1 if one did, 2 for a wrong command line. check.json is all that
has to be carried back:

    python -m scripts.gpu_host.publish check.json      # in a checkout, where there is a network

The large pair is the tiny pair at the size of a model of 3.2 billion parameters, made on the host:
it costs what a model of that size costs and is accepted as the tiny one.

--dry-run runs every stage without a GPU, at tiny sizes: the ops in Triton's interpreter, servers on
the CPU platform. It says that the scripts work and measures nothing.

--stages runs some of them and keeps what an earlier run found of the others, for a host that gives
a command less time. Stages and the most seconds that each may take:

"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from scripts.gpu_host.publish import write_bundle
from scripts.gpu_host.runner import Runner
from scripts.gpu_host.settings import (
    DRY_ENVIRONMENT,
    ENVIRONMENT,
    ROOT,
    Settings,
    dry_settings,
)
from scripts.gpu_host.stages import STAGES

TOTAL_SECONDS = 590.0
# Two cores, with other work beside them, start four servers in five times what a GPU host takes.
DRY_LIMIT_FACTOR = 5.0


def budget() -> str:
    """Return the table of the stages."""
    lines = [f"    {stage.name:20}{stage.limit_s:5.0f}  {stage.what}" for stage in STAGES]
    lines.append(f"    {'all':20}{sum(stage.limit_s for stage in STAGES):5.0f}")
    lines.append(f"\nThe whole ends after {TOTAL_SECONDS:.0f} s; what is left then is skipped.")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh",
        description=__doc__ + budget(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU platform")
    parser.add_argument(
        "--carried", type=Path, metavar="DIR", help="what scripts/pack_gpu_host.sh made"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="(default: WORK/results)")
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="for the environment, models and logs (default: out/gpu-check, or out/gpu-check-dry)",
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", metavar="LIST", help="some of the stages, separated by commas")
    args = parser.parse_args(argv)
    args.stages = names if args.stages is None else args.stages.split(",")
    for name in args.stages:
        if name not in names:
            parser.error(f"--stages: {name!r} is none of {', '.join(names)}")
    if args.carried is not None and not args.carried.is_dir():
        parser.error(f"--carried {args.carried} is no directory; scripts/pack_gpu_host.sh makes it")
    if find_spec("psutil") is None:
        parser.error(f"{sys.executable} lacks the package psutil, which ends stages that hang")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; return the exit code."""
    args = parse_args(argv)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    work = (
        args.work or ROOT / "out" / ("gpu-check-dry" if args.dry_run else "gpu-check")
    ).resolve()
    out = (args.out or work / "results").resolve()
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    make = dry_settings if args.dry_run else _device_settings
    settings = make(str(work), str(out), args.carried and str(args.carried.resolve()))
    settings.save(work / "settings.json")
    env = {**os.environ, **ENVIRONMENT, **(DRY_ENVIRONMENT if args.dry_run else {})}
    # The checkout's own copy of the package, also for servers and other commands.
    env["PYTHONPATH"] = str(ROOT)

    def command(stage: str, result: Path) -> list[str]:
        # The environment is made by the first stage.
        carried = settings.carried and stage != "install" and settings.python.exists()
        python = str(settings.python) if carried else sys.executable
        return [
            *(python, "-m", "scripts.gpu_host.stages", stage),
            *(str(work / "settings.json"), str(result)),
        ]

    factor = DRY_LIMIT_FACTOR if args.dry_run else 1.0
    stages = [stage._replace(limit_s=stage.limit_s * factor) for stage in STAGES]
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(describe, capture_output=True, text=True)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "mode": "dry run: no number is a measurement" if args.dry_run else "device",
        "git_commit": done.stdout.strip() or "unknown",
        "large pair": settings.inflate,
    }
    deadline = began + TOTAL_SECONDS * factor
    if len(args.stages) == len(STAGES):
        (out / "summary.json").unlink(missing_ok=True)
    runner = Runner(out, logs, command, deadline, facts, env)
    is_good = runner.run([stage for stage in stages if stage.name in args.stages])
    write_bundle(out)
    print(f"{out / 'summary.txt'}, after {time.monotonic() - began:.0f} s", flush=True)
    return 0 if is_good else 1


def _device_settings(work: str, out: str, carried: str | None) -> Settings:
    return Settings(is_dry=False, work=work, out=out, carried=carried)


if __name__ == "__main__":
    sys.exit(main())
