"""The errors that this package raises.

    CastError
    ├── ConfigError   (ValueError)    a setting is unknown, of the wrong type or out of range
    ├── ProfileError  (ValueError)    a cost profile is missing, damaged or was measured elsewhere
    │   └── MissingProfileError       a search found no profile of this device and pair
    ├── TraceError    (ValueError)    a trace is damaged, foreign or cannot be replayed as asked
    └── HostError     (RuntimeError)  this SGLang, device or model pair cannot run what was asked

Each message is one line that names the flag, variable or file at fault and says what to do.
"""

__all__ = [
    "CastError",
    "ConfigError",
    "HostError",
    "MissingProfileError",
    "ProfileError",
    "TraceError",
]


class CastError(Exception):
    """Base of all errors raised by cast_sglang."""


class ConfigError(CastError, ValueError):
    """A setting is unknown, malformed or out of range."""


class ProfileError(CastError, ValueError):
    """A cost profile is missing, unreadable, invalid or belongs to another device or pair."""


class MissingProfileError(ProfileError):
    """A search found no cost profile that fits this device and pair."""


class TraceError(CastError, ValueError):
    """A trace is unreadable, damaged, of another format or pair, or cannot answer the request."""


class HostError(CastError, RuntimeError):
    """The serving engine, the device or the model pair does not support what was asked."""
