#!/usr/bin/env python
"""Measure the cost profile of this machine: `cast-sglang profile` as a script."""

import sys

from cast_sglang.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", *sys.argv[1:]]))
