"""What each part of CAST brings, and how much its settings matter: arms that differ by one setting.

    python -m benchmarks.bench_ablation --out DIR
    python -m benchmarks.bench_ablation --parts rules,r --batches 1,8,32 --resume --out DIR

Makes the arms, runs `benchmarks.bench_serving` with them and takes its options; the results are of
its kind, and so is their command. Each arm is compared with the one that lacks its setting.

Parts:
  rules      policy fixed without DR, without DP, without BP, and without all three: a price of 0
             switches a rule off, since the utility of a tree never falls with its nodes
  prices     C1, C2 and C3, each halved and doubled
  r          R of 1, 4 and 64, in place of 16
  context    costs of one context length in place of the grid, and of the nearest grid point in
             place of interpolation (needs --profile)
  learning   policy auto without calibration, with one budget for the batch, without the correction
             of the tables

All parts are 21 arms: more than an hour on two CPU cores with the default batch sizes. --parts and
--batches take less; --resume goes on with what was cut short.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from benchmarks import bench_serving
from benchmarks.harness.options import list_of
from benchmarks.harness.pairs import OUT
from cast_sglang.costs.passes import PASSES
from cast_sglang.costs.profiles import load_profile, save_profile
from cast_sglang.costs.schema import CostProfile, CostTable
from cast_sglang.errors import ProfileError

# Near the speed-ups of the padded tiny pair on two cores, where good prices lie.
PRICES = "2-2-1.5"
RS = (1, 4, 64)
LEARNING = ("calibration=off", "joint_budget=on", "residuals=off")
DERIVED = "one-context.json"
CELLS = ("time_us", "spread_us", "samples")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return the exit code."""
    args, rest = parse_args(argv)
    if args.profile is not None:
        rest += ["--profile", str(args.profile)]
    try:
        arms = choose_arms(args)
    except (ProfileError, OSError) as error:
        print(f"bench_ablation: error: {error}", file=sys.stderr)
        return 1
    return bench_serving.main(["--arms", ",".join(arms), "--out", str(args.out), *rest])


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; return what is left of it for `bench_serving`."""
    parser = argparse.ArgumentParser(
        prog="bench_ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other options are those of python -m benchmarks.bench_serving --help.",
    )
    parser.add_argument(
        "--parts",
        type=list_of(str),
        metavar="LIST",
        help=f"(default: {','.join(PARTS)}; context only with --profile)",
    )
    parser.add_argument(
        "--prices",
        default=PRICES,
        metavar="C1-C2-C3",
        help="of the arm that is the base of all "
        "parts but learning; good ones are near the speed-up reached (default: %(default)s)",
    )
    parser.add_argument("--profile", type=Path, help="cost profile for CAST")
    parser.add_argument("--out", type=Path, default=OUT / "ablation", help="gets results and logs")
    args, rest = parser.parse_known_args(argv)
    if args.parts is None:
        args.parts = [part for part in PARTS if part != "context" or args.profile is not None]
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"--parts {','.join(unknown)}: no such part; use {', '.join(PARTS)}")
    if "context" in args.parts and args.profile is None:
        parser.error("--parts context needs --profile, from which the other table is made")
    try:
        given = [float(price) for price in args.prices.split("-")]
    except ValueError:
        given = []
    if len(given) != 3 or min(given) <= 0:
        parser.error(f"--prices {args.prices}: must be three numbers above 0, such as {PRICES}")
    if any(word.split("=")[0] == "--arms" for word in rest):
        parser.error("--arms: they are made of --parts")
    return args, rest


def choose_arms(args: argparse.Namespace) -> list[str]:
    """Return the arms of the chosen parts, each once, with those that they are compared with."""
    arms = ["plain", "static", *(arm for part in args.parts for arm in PARTS[part](args))]
    return list(dict.fromkeys(arms))


def rules(args: argparse.Namespace) -> list[str]:
    """Return policy `fixed` with and without its rules."""
    base = f"cast:fixed:{args.prices}"
    settings = ("c3=0", "c2=0", "c1=0", "c1=0+c2=0+c3=0")
    return [base, *(f"{base}+{setting}" for setting in settings)]


def prices(args: argparse.Namespace) -> list[str]:
    """Return policy `fixed` with each price halved and doubled."""
    base = f"cast:fixed:{args.prices}"
    values = zip(("c1", "c2", "c3"), map(float, args.prices.split("-")), strict=True)
    settings = [f"{name}={factor * own:g}" for name, own in values for factor in (0.5, 2)]
    return [base, *(f"{base}+{setting}" for setting in settings)]


def memory(args: argparse.Namespace) -> list[str]:
    """Return policy `fixed` with other R."""
    base = f"cast:fixed:{args.prices}"
    return [base, *(f"{base}+r={r}" for r in RS)]


def context(args: argparse.Namespace) -> list[str]:
    """Return policy `fixed` with a table of one context, which is written, and without a line."""
    base = f"cast:fixed:{args.prices}"
    args.out.mkdir(parents=True, exist_ok=True)
    derived = args.out / DERIVED
    save_profile(one_context(load_profile(args.profile)), derived)
    return [base, f"{base}+profile={derived}", f"{base}+lookup=nearest"]


def one_context(profile: CostProfile) -> CostProfile:
    """Keep the shortest context of each table only."""
    kept = {each.table: _shortest(profile.table_of(each)) for each in PASSES}
    return msgspec.structs.replace(profile, **kept)


def _shortest(table: CostTable) -> CostTable:
    cells = {name: [contexts[:1] for contexts in getattr(table, name)] for name in CELLS}
    return msgspec.structs.replace(table, contexts=table.contexts[:1], **cells)


def learning(args: argparse.Namespace) -> list[str]:
    """Return policy `auto` with what it learns by switched."""
    return ["cast:auto", *(f"cast:auto+{setting}" for setting in LEARNING)]


PARTS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "rules": rules,
    "prices": prices,
    "r": memory,
    "context": context,
    "learning": learning,
}


if __name__ == "__main__":
    sys.exit(main())
