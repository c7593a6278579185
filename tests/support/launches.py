"""What a launch does before it loads a model, and what `cast-sglang doctor` says of one.

Each is a program for `tests.support.preloaded`, as importing SGLang takes most of its time.
"""

from collections.abc import Sequence

from tests.support.preloaded import fork_all


def resolve(argv: Sequence[str]) -> None:
    """Parse and resolve the server arguments, as `sglang serve` does."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    prepare_server_args(list(argv)).resolve_once()


def examine(argv: Sequence[str]) -> int:
    """Run `cast-sglang doctor` with these flags."""
    from cast_sglang.cli import main

    return main(["doctor", "--json", *argv])


def profile(argv: Sequence[str]) -> int:
    """Run `cast-sglang profile` with these flags."""
    from cast_sglang.cli import main

    fork_all()
    return main(["profile", *argv])


def probe(argv: Sequence[str]) -> int:
    """Run `cast-sglang doctor --probe`, which starts an engine with these flags."""
    from cast_sglang.cli import main

    fork_all()
    return main(["doctor", "--json", "--probe", *argv])
