"""Cost profiles as files: load them, save them, and find the one that fits this host.

A profile names the host and the settings that it was measured with, so that a table of another GPU,
model pair, dtype or TP size is refused instead of silently used.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from cast_sglang.config import user_cache_dir
from cast_sglang.costs.schema import (
    NO_DRAFT,
    SCHEMA_VERSION,
    CostProfile,
    HostIdentity,
    validate_profile,
)
from cast_sglang.errors import MissingProfileError, ProfileError

__all__ = [
    "FoundProfile",
    "config_hash",
    "describe_error",
    "find_profile",
    "load_profile",
    "profile_directories",
    "profile_filename",
    "save_profile",
    "user_profile_path",
    "write_atomically",
]

MAX_FILE_BYTES = 64 << 20

# Keys of a model config that change neither the shapes nor the operations of a forward pass.
# Without them a fine-tune or a re-saved checkpoint shares the profile of its base model. Keys that
# begin with an underscore are notes of the loader and are dropped as well.
_VOLATILE_KEYS = frozenset(
    {
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "name_or_path",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


# Where it is not known with which flags a server was started.
ANY_COMMAND = "cast-sglang profile, with the flags of the server"


class FoundProfile(NamedTuple):
    """A profile that fits the host, and its file."""

    profile: CostProfile
    path: Path
    warnings: list[str]  # about what does not fit exactly
    command: str = ANY_COMMAND  # what measures one on this host


class _Versioned(msgspec.Struct):
    schema_version: int


def load_profile(path: str | Path) -> CostProfile:
    """Read and check one profile.

    Raises:
        ProfileError: the file is missing, too large, not JSON, of an unknown version, or breaks
            the schema; one line with the path and the reason.
    """
    path = Path(path).expanduser()
    try:
        if not path.is_file():
            raise ProfileError("no such file" if not path.exists() else "not a file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ProfileError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        profile = _decode(path.read_bytes())
        validate_profile(profile)
    except OSError as error:
        raise ProfileError(f"profile {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ProfileError(f"profile {path}: {reason}") from error
    return profile


def save_profile(profile: CostProfile, path: str | Path) -> None:
    """Check and write a profile; readers see the old file or the new one, never a part.

    Raises:
        ProfileError: the profile breaks the schema, or the file cannot be written.
    """
    path = Path(path).expanduser()
    try:
        validate_profile(profile)
        fields = msgspec.to_builtins(profile)
        for name in ("draft", "draft_extend", "plain", "serving"):
            if fields[name] is None:
                del fields[name]
        # What a person looks for first comes first.
        head = {name: fields[name] for name in ("schema_version", "provenance")}
        write_atomically(path, _readable(msgspec.json.encode({**head, **fields})))
    except ProfileError as error:
        raise ProfileError(f"profile {path}: {error}") from error
    except OSError as error:
        raise ProfileError(f"profile {path}: cannot be written: {error.strerror}") from error


def config_hash(config: dict[str, Any]) -> str:
    """Return the sha256 of the parts of a model config that decide what a forward pass takes.

    It is that of the canonical JSON without `_VOLATILE_KEYS` (dtype is a field of the identity) and
    without keys that begin with an underscore, at every level.
    """
    kept = json.dumps(_stable(config), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(kept.encode()).hexdigest()


def describe_error(profile: CostProfile) -> str:
    """Say how far the tables are off: for steps while serving, then for single passes."""
    texts = []
    if (serving := profile.serving) is not None:
        texts.append(
            f"served steps took {serving.median_ratio:.2f} times what they say, error median "
            f"{serving.median_error:.1%}, p95 {serving.p95_error:.1%} ({serving.steps} steps)"
        )
    if (heldout := profile.provenance.heldout) is not None:
        texts.append(
            f"single passes: error median {heldout.median_error:.1%}, p95 {heldout.p95_error:.1%} "
            f"({heldout.points} held-out points)"
        )
    return "; ".join(texts) or "error unknown: nothing was served or held out"


def profile_filename(identity: HostIdentity) -> str:
    """Return a host's file name: `<device>__<target>__<draft>__tp<N>__<dtype>.json`."""
    models = (identity.target.name, identity.draft.name)
    parts = [identity.device_name, *(name.rstrip("/").split("/")[-1] for name in models)]
    dtype = identity.dtype + (f"-{identity.quantization}" if identity.quantization else "")
    slugs = [_slug(part) for part in [*parts, f"tp{identity.tp_size}", dtype]]
    return "__".join(slugs) + ".json"


def user_profile_path(identity: HostIdentity) -> Path:
    """Return where to save this user's profile of a host, so that a search finds it."""
    # Pairs may share their names, as two directories called "target" and "draft" do.
    pair = f"{identity.target.config_hash[:6]}-{identity.draft.config_hash[:6]}"
    name = profile_filename(identity).removesuffix(".json")
    return user_cache_dir() / "profiles" / f"{name}__{pair}.json"


def profile_directories() -> list[Path]:
    """Return where a search looks: at the user's own profiles first, then at a checkout's."""
    directories = [user_cache_dir() / "profiles"]
    # Those of a checkout are of its own models, so no wheel has them.
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").is_file():
        directories.append(root / "profiles")
    return directories


def find_profile(
    identity: HostIdentity,
    source: str = "auto",
    *,
    allow_foreign: bool = False,
    directories: Sequence[Path] | None = None,
    command: str = ANY_COMMAND,
) -> FoundProfile:
    """Load the named profile, or the one in `directories` that fits this host best.

    Args:
        source: path of a profile, or "auto" to search.
        allow_foreign: accept a profile that was measured elsewhere, with a warning.
        directories: where "auto" searches, in order; None for `profile_directories()`.
        command: what measures a profile of the host.

    Raises:
        MissingProfileError: a search found none that fits.
        ProfileError: the named file is bad or foreign.
    """
    if source != "auto":
        profile = _loaded(source, identity)
        mismatches, differences = _compare(profile, identity)
        if mismatches and not allow_foreign:
            raise ProfileError(
                f"profile {source}: was measured elsewhere: {'; '.join(mismatches)}; measure this "
                f"host with: {command} (or use it all the same: CAST_ALLOW_FOREIGN_PROFILE=1)"
            )
        path = Path(source).expanduser()
        return FoundProfile(profile, path, _warnings(path, mismatches, differences), command)

    searched = profile_directories() if directories is None else directories
    found: list[tuple[list[str], list[str], Path, CostProfile]] = []
    unreadable: list[str] = []
    for path in _candidates(searched, profile_filename(identity)):
        try:
            profile = _loaded(path, identity)
        except ProfileError as error:
            unreadable.append(f"skipped {error}")
            continue
        mismatches, differences = _compare(profile, identity)
        if not mismatches and not differences:
            return FoundProfile(profile, path, unreadable, command)
        found.append((mismatches, differences, path, profile))

    if found:
        nearest = min(found, key=lambda entry: (len(entry[0]), len(entry[1])))
        mismatches, differences, path, profile = nearest
        if mismatches and not allow_foreign:
            raise MissingProfileError(
                f"no cost profile fits; the nearest, {path}, was measured elsewhere: "
                f"{'; '.join(mismatches)}"
            )
        warnings = _warnings(path, mismatches, differences)
        return FoundProfile(profile, path, unreadable + warnings, command)
    places = ", ".join(str(directory) for directory in searched)
    skipped = f" ({'; '.join(unreadable)})" if unreadable else ""
    raise MissingProfileError(f"no cost profile for {_describe(identity)} in {places}{skipped}")


def _loaded(path: str | Path, identity: HostIdentity) -> CostProfile:
    """Read a profile that has a table of each pass of the host."""
    profile = load_profile(path)
    if profile.draft is None and identity.draft != NO_DRAFT:
        raise ProfileError(
            f"profile {path}: has no tables of a draft model, as it was measured without one"
        )
    return profile


def _warnings(path: Path, mismatches: list[str], differences: list[str]) -> list[str]:
    foreign = [f"profile {path}: used although measured elsewhere: {item}" for item in mismatches]
    return foreign + [f"profile {path}: was measured with another {item}" for item in differences]


def _compare(profile: CostProfile, identity: HostIdentity) -> tuple[list[str], list[str]]:
    """Return mismatches, which surely change the costs, and lesser differences."""
    measured = profile.provenance
    mismatches = []
    for field in ("device_name", "dtype", "quantization", "tp_size"):
        mismatches += _difference(field, getattr(measured, field), getattr(identity, field))
    for role in ("target", "draft"):
        ours, theirs = getattr(identity, role), getattr(measured, role)
        if ours.config_hash != theirs.config_hash:
            mismatches.append(
                f"{role} model {theirs.name} ({theirs.config_hash[:12]}), "
                f"here {ours.name} ({ours.config_hash[:12]})"
            )

    differences = []
    fields = ("device_memory_bytes", "clock_mhz", "attention_backend", "kv_cache_dtype")
    for field in (*fields, "cuda_graph", "page_size", "overlap"):
        here = getattr(identity, field)
        if here is not None and getattr(measured, field) is not None:
            differences += _difference(field, getattr(measured, field), here)
    for library in sorted(measured.versions.keys() & identity.versions.keys()):
        # Neither runs inside a forward pass.
        if library not in ("cast_sglang", "python"):
            differences += _difference(
                f"{library} version", measured.versions[library], identity.versions[library]
            )
    return mismatches, differences


def _difference(field: str, measured: Any, here: Any) -> list[str]:
    return [] if measured == here else [f"{field} {measured}, here {here}"]


def _describe(identity: HostIdentity) -> str:
    pair = f"{identity.target.name} + {identity.draft.name}"
    return f"{identity.device_name}, {pair}, {identity.dtype}, tp {identity.tp_size}"


def _candidates(directories: Sequence[Path], exact_name: str) -> Iterator[Path]:
    """Yield the profile files of each directory, the one with the host's own name first."""
    for directory in directories:
        # A glob of a missing directory is empty.
        yield from sorted(directory.glob("*.json"), key=lambda path: path.name != exact_name)


def _decode(data: bytes) -> CostProfile:
    version = msgspec.json.decode(data, type=_Versioned).schema_version
    if version != SCHEMA_VERSION:
        raise ProfileError(
            f"schema_version {version} is unknown; this release reads {SCHEMA_VERSION}"
        )
    return msgspec.json.decode(data, type=CostProfile)


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(key): _stable(item)
            for key, item in value.items()
            if key not in _VOLATILE_KEYS and not str(key).startswith("_")
        }
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    return value


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unknown"


def _readable(data: bytes) -> bytes:
    """Indent JSON, with each innermost list of numbers on one line."""
    text = msgspec.json.format(data, indent=1).decode()
    # A raw line break cannot occur inside a JSON string, so only real lists match.
    innermost = re.compile(r'\[\n\s*([^\[\]{}"]*?)\n\s*\]')
    lines = innermost.sub(lambda match: "[" + re.sub(r",\s+", ", ", match[1]) + "]", text)
    return lines.encode() + b"\n"


def write_atomically(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a file so that readers see the old content or the new one, never a part.

    Args:
        sync: wait until the data is on disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by process id: servers in two containers that share a folder may have the same.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
