"""Put what a check of a GPU left into the repository: results, cost profile, documents.

    python -m scripts.gpu_host.publish check.json

Writes the cost profile into profiles/ under the name that a search expects, the speeds of all arms
into benchmarks/results/, and the tables of README.md and docs/results.md anew, the new file first.
A dry run is refused, and so is a check in which a stage failed, unless --all-the-same is given.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.gpu_host.runner import FAILED
from scripts.gpu_host.settings import ROOT

BUNDLE = "check.json"
PARTS = ("summary", "speed", "ops", "profile")


class PublishError(ValueError):
    """A check that is not to be published; the message says why."""


def write_bundle(out: Path) -> Path:
    """Join the JSON files of a check into one; what a stage did not leave is null."""
    content: dict[str, Any] = {}
    for part in PARTS:
        path = out / f"{part}.json"
        content[part] = json.loads(path.read_text()) if path.exists() else None
    bundle = out / BUNDLE
    bundle.write_text(json.dumps(content) + "\n")
    return bundle


def publish(bundle: Path, root: Path, even_if_failed: bool = False) -> list[Path]:
    """Write the files of a check into a checkout; return those that are written.

    Raises:
        PublishError: it was a dry run, a stage failed, or a part is missing.
    """
    from benchmarks.report.readme import README, RESULTS, results_shown, update_docs
    from cast_sglang.costs.profiles import load_profile, profile_filename

    content = json.loads(bundle.read_text())
    summary = content["summary"]
    if summary["mode"] != "device":
        raise PublishError(f"{bundle}: {summary['mode']}")
    failed = [stage["name"] for stage in summary["stages"] if stage["status"] == FAILED]
    if failed and not even_if_failed:
        raise PublishError(f"{bundle}: {', '.join(failed)} failed")
    if missing := [part for part in ("speed", "profile") if content[part] is None]:
        raise PublishError(f"{bundle}: there is no {' and no '.join(missing)} in it")
    scratch = root / "profiles" / f".{bundle.name}.profile"
    scratch.write_text(json.dumps(content["profile"], indent=1) + "\n")
    try:
        source = load_profile(scratch).provenance
        profile = root / "profiles" / profile_filename(source)
        scratch.replace(profile)
    finally:
        scratch.unlink(missing_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", source.device_name.lower()).strip("-")
    results = root / "benchmarks" / "results" / f"{device}__tiny-inflated.json"
    results.write_text(json.dumps(content["speed"]) + "\n")
    shown = [path for path in results_shown(root / RESULTS, root) if path != results]
    update_docs(root, [results, *shown])
    return [profile, results, root / README, root / RESULTS]


def main(argv: Sequence[str] | None = None) -> int:
    """Publish a check; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, metavar=BUNDLE)
    parser.add_argument("--all-the-same", action="store_true", help="even if a stage failed")
    args = parser.parse_args(argv)
    try:
        for path in publish(args.bundle, ROOT, args.all_the_same):
            print(path)
    except (PublishError, OSError, KeyError, ValueError) as error:
        print(f"publish: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
