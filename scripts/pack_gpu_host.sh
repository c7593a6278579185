#!/usr/bin/env bash
# Gather what a GPU host without a network must be given; --help says more.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
if ! "$python" -m pip --version > /dev/null 2>&1; then
    echo "pack_gpu_host.sh: error: $python has no pip; name a Python that has it: PYTHON=... $0" >&2
    exit 1
fi
exec "$python" -m scripts.gpu_host.pack "$@"
