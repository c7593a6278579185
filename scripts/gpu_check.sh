#!/usr/bin/env bash
# Check CAST on a GPU host without a network, or dry on any machine; --help says more.
set -euo pipefail
cd "$(dirname "$0")/.."

python=python3
[[ ! -x .venv/bin/python ]] || python=.venv/bin/python
exec "${PYTHON:-$python}" -m scripts.gpu_host "$@"
