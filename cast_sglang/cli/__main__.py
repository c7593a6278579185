"""`python -m cast_sglang.cli`, where the command is not on the path."""

import sys

from cast_sglang.cli import main

if __name__ == "__main__":
    sys.exit(main())
