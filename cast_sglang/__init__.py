"""Cost-aware speculative decoding (CAST) for SGLang.

Importing this package loads neither sglang nor triton.
"""

from cast_sglang.errors import (
    CastError,
    ConfigError,
    HostError,
    MissingProfileError,
    ProfileError,
    TraceError,
)

__all__ = [
    "CastError",
    "ConfigError",
    "HostError",
    "MissingProfileError",
    "ProfileError",
    "TraceError",
    "__version__",
]
__version__ = "0.1.0"
