"""The table of backends in docs/gpu.md is what SGLang and CAST resolve."""

import subprocess
import sys

import pytest

from scripts.backend_table import BEGIN, DOCUMENT, END, Launch, Row, table
from scripts.gpu_host.settings import ROOT


@pytest.mark.slow
def test_the_document_has_what_launches_come_to():
    """In a process of its own, which is told that it has a GPU and not the CPU platform."""
    command = [sys.executable, "-m", "scripts.backend_table"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]
    assert shown.strip() == done.stdout.strip(), "python -m scripts.backend_table --write"


def test_gpus_with_the_same_launches_share_a_line():
    stock, served = Launch("3-1-4", "fa3", "fa3"), Launch("8-8-32", "fa3", "triton", "triton")
    rows = [Row("M", gpu, stock, served, served, served) for gpu in ("Hopper", "B200")]
    pages = Launch("8-1-9", "trtllm_mha", "triton", "triton", 64)
    refused = Launch(refused="refused: pages above 1")
    rows.append(Row("M", "Ampere, Ada", stock, pages, refused, pages))
    paged = "`trtllm_mha`, `triton`, `triton`, pages of 64"
    assert table(rows)[2:] == [
        "| M | Hopper; B200 | 3-1-4 | `fa3` | `fa3`, `triton`, `triton` | yes | yes |",
        f"| M | Ampere, Ada | 3-1-4 | `fa3` | {paged} | refused: pages above 1 | yes |",
    ]
