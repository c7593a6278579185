"""Loops of the step path, compiled by numba.

A step decides between passes that each sweep the caches, so what a decision costs is mostly the
calls it makes: one compiled loop is several times faster there than a chain of array operations.
`f.py_func` is the same function in plain Python, to which the tests compare it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

__all__ = ["compiled"]


def compiled(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function for the types of one signature, as it is defined.

    The machine code is kept on disk where the package or the user's cache can be written, so that
    only the first process waits some seconds for the compiler. No call ever waits for it.

    Args:
        signature: numba's, such as "f8(f4[:, :], i8)"; arrays may be strided.
    """

    def compile_now(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(signature, cache=True, error_model="numpy")(function)
        except RuntimeError:  # there is no place to keep it
            return numba.njit(signature, error_model="numpy")(function)

    return compile_now
