"""Resolve many command lines in one start of Python, each in a process forked from it.

Reads [[argv, env], ...] as JSON from stdin and writes [[exit code, stderr], ...] to stdout. A
launch is what `sglang serve` does before it loads a model; importing SGLang takes most of its time,
so it is done once.
"""

import json
import os
import sys
import tempfile

from sglang.srt.plugins import load_plugins


def resolve(argv: list[str], env: dict[str, str]) -> int:
    """Parse and resolve the server arguments; return the exit code a server would end with."""
    from sglang.srt.server_args import prepare_server_args

    os.environ.update(env)
    try:
        prepare_server_args(argv).resolve_once()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - the hook under test reports whatever it is
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def resolve_in_child(argv: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Resolve in a forked process and return its exit code and stderr."""
    with tempfile.TemporaryFile() as captured:
        child = os.fork()
        if child == 0:
            os.dup2(captured.fileno(), 2)
            code = resolve(argv, env)
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        captured.seek(0)
        return os.waitstatus_to_exitcode(status), captured.read().decode(errors="replace")


def main() -> None:
    """Resolve what stdin lists."""
    launches = json.load(sys.stdin)
    load_plugins()
    import sglang.srt.server_args  # noqa: F401 - imported before the forks

    json.dump([resolve_in_child(argv, env) for argv, env in launches], sys.stdout)


if __name__ == "__main__":
    main()
