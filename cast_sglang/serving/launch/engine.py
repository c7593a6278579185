"""SGLang's engine, started by a command of ours with a server's flags."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.entrypoints.engine import Engine

__all__ = ["environment", "started_engine"]


@contextlib.contextmanager
def started_engine(server_argv: Sequence[str]) -> Iterator[Engine]:
    """Start an engine on CAST with these flags of SGLang, and end it.

    Raises:
        CastError: CAST refuses the flags.
    """
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    server_args = prepare_server_args([*server_argv, "--speculative-algorithm", "CAST"])
    engine = Engine(server_args=server_args)
    try:
        yield engine
    finally:
        engine.shutdown()


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Set variables of this process's environment, and put them back as they were.

    Args:
        values: None for one that is only put back.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
