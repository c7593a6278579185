"""Compile the loops of a decoding step with numba.

Each model pass evicts the CPU caches, so a decision between two passes spends most of its time on
the first calls of its functions. One compiled loop is then several times faster than a chain of
array operations. `f.py_func` is the same function in plain Python; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

__all__ = ["compiled"]


def compiled(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function when it is defined, for one signature.

    The machine code is cached on disk if the package or the user's cache directory is writable, so
    only the first process waits some seconds for the compiler. No call ever waits for it.

    Args:
        signature: numba's, such as "f8(f4[:, :], i8)"; arrays may be strided.
    """

    def compile_now(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(signature, cache=True, error_model="numpy")(function)
        except RuntimeError:  # numba found no writable place for its cache
            return numba.njit(signature, error_model="numpy")(function)

    return compile_now
