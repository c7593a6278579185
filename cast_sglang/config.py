"""The settings of the package, and where their values come from.

Each value is taken from the first of these sources that sets it:

    launch flag `--cast-c1`  >  environment `CAST_C1`  >  file named by `--cast-config` or
    `CAST_CONFIG` (TOML or JSON, keys in lower case)  >  the default below

Only this module reads the environment of the package, except for the variables `CAST_CPU_*`. The
CPU platform reads those itself, because SGLang activates platforms before it parses flags.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from cast_sglang.errors import ConfigError

__all__ = [
    "LOOKUPS",
    "PENDING",
    "POLICIES",
    "REPLAYED_POLICIES",
    "CastConfig",
    "add_flags",
    "flag_of",
    "given_flags",
    "user_cache_dir",
]

# The policies by name, each with its class in `policy/`. The class is imported only when a policy
# is made, because a launch checks names before it loads torch.
POLICIES = {"auto": "auto.AutoPolicy", "fixed": "fixed.FixedPolicy", "eagle": "fixed.EaglePolicy"}
# Policies that `cast-sglang replay` accepts.
REPLAYED_POLICIES = (*POLICIES, "full-width")
LOOKUPS = ("linear", "nearest")
# `profile` of the engine that measures one; no file or keyword that a user would name.
PENDING = "(being measured)"
GRAPHS = ("all", "passes", "off")
MAX_VERIFY_ROWS = 4096

_ENV_PREFIX = "CAST_"
_CPU_PLATFORM_PREFIX = "CAST_CPU_"
_CONFIG_KEY = "config"
_MAX_FILE_BYTES = 1 << 20
_TRUE_WORDS = ("1", "true", "yes", "on")
_FALSE_WORDS = ("0", "false", "no", "off")


class _Knob(NamedTuple):
    """The allowed values of one field and its help; stored in the dataclass field's metadata."""

    kind: str  # text | choice | number | count | switch | sizes
    help: str
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    hints: Mapping[str, str] = {}  # advice for some values that are not allowed

    @property
    def allowed(self) -> str:
        match self.kind:
            case "choice":
                return " | ".join(self.choices)
            case "number":
                return f"a finite number in [{self.low:g}, {self.high:g}]"
            case "count":
                return f"an integer in [{self.low:g}, {self.high:g}]"
            case "switch":
                return f"{' | '.join(_TRUE_WORDS)} or {' | '.join(_FALSE_WORDS)}"
            case "sizes":
                return f"ascending integers in [1, {MAX_VERIFY_ROWS}] such as 2,4,8, or auto"
            case _:
                return "a non-empty text"


_PATH = _Knob("text", "path of a configuration file")
_FULL_WIDTH = (
    "full-width, once named optimal, grows every layer before it chooses, so no server runs it; "
    "cast-sglang replay --policy full-width does"
)


def _knob(default: Any, kind: str, help: str, **limits: Any) -> Any:
    return dataclasses.field(default=default, metadata={"knob": _Knob(kind, help, **limits)})


def _price(default: float, role: str) -> Any:
    help = f"{role}: accepted tokens asked per unit of plain-step time"
    return _knob(default, "number", help, low=0, high=1e6)


def _on_off(default: str, help: str) -> Any:
    return _knob(default, "choice", help, choices=tuple(dict.fromkeys(("on", "off", default))))


@dataclasses.dataclass(frozen=True, slots=True)
class CastConfig:
    """The settings of one server; immutable, and checked when constructed.

    Raises:
        ConfigError: a value has the wrong type or is out of its range.
    """

    profile: str = _knob(
        "auto",
        "text",
        "cost profile: a path, auto to search for one and else measure a quick one, estimate to "
        "make do with the device's bandwidth and peak rate, or none (policy eagle)",
    )
    policy: str = _knob(
        "auto",
        "choice",
        "how the draft tree is chosen",
        choices=tuple(POLICIES),
        hints=dict.fromkeys(("full-width", "optimal"), _FULL_WIDTH),
    )
    c1: float = _price(4.0, "C1, price of breadth")
    c2: float = _price(3.0, "C2, price of one more layer")
    c3: float = _price(2.5, "C3, price of a verified node")
    # A step grows 5 to 8 layers, so 16 gains span 2 or 3 steps. This averages out the noise of
    # single layers and still follows a change of load within a few steps.
    r: int = _knob(16, "count", "R, layer gains averaged to predict the next", low=1, high=4096)
    verify_sizes: tuple[int, ...] | None = _knob(
        None,
        "sizes",
        "allowed numbers of verified tokens per request, root included; auto derives them",
    )
    calibration: str = _on_off(
        "on", "policy auto: learn how far the draft's probabilities can be trusted"
    )
    calibration_file: str = _knob(
        "auto",
        "text",
        "file that keeps what serving learned for the next start; auto for one of this device and "
        "pair in the user's cache, or none",
    )
    draws: str = _on_off(
        "on",
        "policy auto: draw the drafts of requests that sample at random, rather than propose the "
        "draft's likeliest tokens",
    )
    copying: str = _on_off(
        "auto",
        "policy auto: propose what followed the same tokens before; auto: without a draft alone",
    )
    joint_budget: str = _on_off(
        "off",
        "policy auto: rank the nodes of all requests together, where the attention backend runs "
        "requests of unequal sizes",
    )
    lookup: str = _knob(
        "linear",
        "choice",
        "cost between grid points: linear, or nearest (the paper's select)",
        choices=LOOKUPS,
    )
    residuals: str = _on_off("on", "correct the tables by what serving measures")
    graphs: str = _knob(
        "all",
        "choice",
        "CUDA graphs of draft layers, verify and draft extend (all), of the last two (passes), or "
        "none",
        choices=GRAPHS,
    )
    log_interval: int = _knob(
        0, "count", "steps between two statistics lines in the log, 0 for none", low=0, high=10**9
    )
    trace: str = _knob("none", "text", "file that records every step for replay, or none")
    trace_mb: int = _knob(64, "count", "size in MiB at which recording stops", low=1, high=10**6)
    trace_tokens: bool = _knob(
        False, "switch", "record the tokens of drafted nodes too, so that pictures can show text"
    )
    trace_full: bool = _knob(
        False,
        "switch",
        "grow and verify the whole envelope in every step, for traces that tell of any tree; slow",
    )
    allow_foreign_profile: bool = _knob(
        False, "switch", "accept a profile of another device, model pair, dtype or TP size"
    )

    def __post_init__(self) -> None:
        for key, knob in _knobs().items():
            value = _checked(knob, getattr(self, key), source=key)
            object.__setattr__(self, key, value)
        if self.profile == "none" and self.policy != "eagle":
            raise ConfigError(
                f"profile=none: policy {self.policy} decides by costs; use a path, auto or "
                "estimate, or --cast-policy eagle"
            )
        if self.trace_full and self.trace == "none":
            raise ConfigError("trace_full=True: there is no trace; name one with --cast-trace FILE")

    @classmethod
    def load(
        cls,
        overrides: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """Merge flags, environment and file into one checked configuration.

        Args:
            overrides: values of launch flags by key ("c1", "config", ...); None if not given.
            environ: the environment to read; None for the environment of the process.

        Raises:
            ConfigError: a key is unknown, a value is malformed or out of range, or the file cannot
                be read. The message names the source, the value and what is allowed.
        """
        flags = {key: value for key, value in (overrides or {}).items() if value is not None}
        variables = _cast_variables(os.environ if environ is None else environ)
        _refuse_unknown(flags, _flag_name)
        _refuse_unknown(variables, _variable_name)

        sources: dict[str, tuple[Any, str]] = {}
        for key, value in variables.items():
            sources[key] = (value, _variable_name(key))
        for key, value in flags.items():
            sources[key] = (value, _flag_name(key))
        if _CONFIG_KEY in sources:
            path = Path(_checked(_PATH, *sources.pop(_CONFIG_KEY))).expanduser()
            entries = _read_file(path)
            _refuse_unknown(entries, lambda key: f"{path}:{key}", known=_knobs())
            for key, value in entries.items():
                sources.setdefault(key, (value, f"{path}:{key}"))

        knobs = _knobs()
        return cls(**{key: _checked(knobs[key], *pair) for key, pair in sources.items()})


def add_flags(parser: argparse._ActionsContainer) -> None:
    """Add every `--cast-*` flag, in the order of the fields, `--cast-config` first.

    The parser passes a flag's text on unchanged. `CastConfig.load` parses and checks it, so a bad
    value gives the same message from any source.
    """
    about = "TOML or JSON file with CAST settings (keys in lower case)"
    parser.add_argument("--cast-config", default=None, metavar="FILE", help=about)
    for field in dataclasses.fields(CastConfig):
        knob: _Knob = field.metadata["knob"]
        default = field.default
        shown = "auto" if default is None else "off" if default is False else default
        options: dict[str, Any] = {"metavar": field.name.upper()}
        if knob.kind == "switch":
            options = {"action": "store_true"}
        elif knob.kind == "sizes":
            options = {"metavar": "M,N,..."}
        flag = flag_of(field.name)
        parser.add_argument(flag, default=None, help=f"{knob.help} (default: {shown})", **options)


def flag_of(key: str) -> str:
    """Return the launch flag of a setting."""
    return f"--cast-{key.replace('_', '-')}"


def given_flags(namespace: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the `--cast-*` flags by key; None where not given."""
    return {key: getattr(namespace, f"cast_{key}", None) for key in (_CONFIG_KEY, *_knobs())}


def user_cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the directory of the user's own profiles (`~/.cache/cast_sglang` by default)."""
    environ = os.environ if environ is None else environ
    root = environ.get("XDG_CACHE_HOME", "")
    # The XDG specification requires that a relative path is ignored.
    base = Path(root) if os.path.isabs(root) else Path(os.path.expanduser("~")) / ".cache"
    return base / "cast_sglang"


def _knobs() -> dict[str, _Knob]:
    return {field.name: field.metadata["knob"] for field in dataclasses.fields(CastConfig)}


def _flag_name(key: str) -> str:
    return f"flag {flag_of(key)}"


def _variable_name(key: str) -> str:
    return f"environment {_ENV_PREFIX}{key.upper()}"


def _cast_variables(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name.removeprefix(_ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(_ENV_PREFIX) and not name.startswith(_CPU_PLATFORM_PREFIX)
    }


def _refuse_unknown(
    entries: Mapping[str, Any], name: Callable[[str], str], known: Iterable[str] | None = None
) -> None:
    known = list(known) if known is not None else [_CONFIG_KEY, *_knobs()]
    for key, value in entries.items():
        if key in known:
            continue
        close = difflib.get_close_matches(str(key), known, n=1)
        wanted = name(close[0]).removeprefix("flag ").removeprefix("environment ") if close else ""
        hint = f"did you mean {wanted}? " if close else ""
        raise ConfigError(
            f"{name(key)}={_shown(value)}: unknown setting; {hint}known: {', '.join(known)}"
        )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            content: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            content = json.loads(text)
        else:
            raise ConfigError(f"{path}: a configuration file ends in .toml or .json")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid {path.suffix[1:].upper()}: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a table of settings, got {_shown(content)}")
    return content


def _checked(knob: _Knob, value: Any, source: str) -> Any:
    """Return `value` in the type of the field, or raise a ConfigError that names `source`."""
    try:
        result = _parsed(knob, value)
    except (TypeError, ValueError, OverflowError) as error:
        hint = knob.hints.get(value.strip()) if isinstance(value, str) else None
        message = f"{source}={_shown(value)}: must be {knob.allowed}"
        raise ConfigError(message + (f" ({hint})" if hint else "")) from error
    return result


def _parsed(knob: _Knob, value: Any) -> Any:
    """Convert text to the field's type; accept another value only if it has that type already."""
    if isinstance(value, str):
        value = value.strip()
    match knob.kind:
        case "choice":
            _require(isinstance(value, str) and value in knob.choices)
            return value
        case "number":
            _require(isinstance(value, int | float | str) and not isinstance(value, bool))
            number = float(value)
            _require(math.isfinite(number) and knob.low <= number <= knob.high)
            return number
        case "count":
            count = _integer(value)
            _require(knob.low <= count <= knob.high)
            return count
        case "switch":
            word = value.lower() if isinstance(value, str) else value
            _require(isinstance(word, bool) or word in _TRUE_WORDS + _FALSE_WORDS)
            return word if isinstance(word, bool) else word in _TRUE_WORDS
        case "sizes":
            return _verify_sizes(value)
        case _:
            _require(isinstance(value, str) and value != "" and "\0" not in value)
            return value


def _verify_sizes(value: Any) -> tuple[int, ...] | None:
    if value is None or value == "auto":
        return None
    _require(isinstance(value, str | list | tuple))
    items = value.split(",") if isinstance(value, str) else value
    sizes = tuple(_integer(item) for item in items)
    _require(len(sizes) > 0 and sizes[0] >= 1 and sizes[-1] <= MAX_VERIFY_ROWS)
    _require(all(low < high for low, high in zip(sizes, sizes[1:], strict=False)))
    return sizes


def _integer(value: Any) -> int:
    _require(isinstance(value, int | str) and not isinstance(value, bool))
    return int(value)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
