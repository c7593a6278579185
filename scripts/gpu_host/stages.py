"""Run one stage in this process: python -m scripts.gpu_host.stages NAME SETTINGS RESULT

The runner calls it. RESULT gets {"numbers", "message"}, also of a stage that fails; the exit code
is 0, 1, or 77 where there is nothing to do.
"""

import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.gpu_host.checks import CHECKS, NothingToDo
from scripts.gpu_host.runner import SKIP_CODE, Stage
from scripts.gpu_host.settings import Settings

# The end of a server's log is the part that says why.
MAX_MESSAGE = 2000
SERVED = ("environment",)
STAGES = (
    Stage("install", 40, "install the carried wheels"),
    Stage("environment", 25, "import what a server imports", ("install",)),
    Stage("ops", 75, "fused ops against reference", ("install",)),
    Stage("op-times", 20, "time of the ops", ("install",)),
    Stage("inflate", 30, "make the large pair", ("install",)),
    Stage("equality-tiny", 80, "equality and laws, tiny pair, float32", SERVED),
    Stage("equality-inflated", 55, "greedy equality, large pair, bfloat16", ("inflate", *SERVED)),
    Stage("equality-flashinfer", 40, "the same on flashinfer", ("inflate", *SERVED)),
    Stage("profile", 70, "cost profile of the large pair", ("inflate", *SERVED)),
    Stage("speed", 155, "speed of all arms", ("inflate", *SERVED)),
    Stage("goals", 5, "whether CAST is as fast as it should be", ("speed",)),
    Stage("trace", 35, "time of the policy in a trace", ("inflate", *SERVED)),
)


def main(argv: Sequence[str]) -> int:
    """Run the stage; return the exit code."""
    name, settings_path, result_path = argv
    # So that servers are stopped when the stage's time is over.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    settings = Settings.load(Path(settings_path))
    numbers: dict[str, Any] = {}
    message, code = "", 1
    try:
        CHECKS[name](settings, numbers)
        code = 0
    except NothingToDo as reason:
        message, code = str(reason), SKIP_CODE
    # Errors of this package, of the benchmarks and of the device. Others leave their traceback
    # in the log, too.
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as error:
        traceback.print_exc()
        message = str(error)[-MAX_MESSAGE:]
    finally:
        content = {"numbers": numbers, "message": message}
        Path(result_path).write_text(json.dumps(content, default=str))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
