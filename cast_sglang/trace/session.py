"""A trace and a cost profile read together, for the commands `replay` and `tune`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cast_sglang.config import CastConfig
from cast_sglang.costs.profiles import find_profile, load_profile
from cast_sglang.costs.schema import CostProfile
from cast_sglang.errors import ConfigError, MissingProfileError, TraceError
from cast_sglang.trace.file import read_trace
from cast_sglang.trace.records import Trace, TraceHeader, tables_digest
from cast_sglang.trace.replay import Replay, make_policy
from cast_sglang.trace.summary import BatchSummary, compare, print_summaries

__all__ = ["ReplayResult", "TraceSession", "open_session"]

# A table is extrapolated up to this multiple of its last grid point.
MAX_EXTRAPOLATION = 2


class TraceSession(NamedTuple):
    """A trace with the profile whose tables predict the times of its steps."""

    trace: Trace
    profile: CostProfile
    corrects: bool  # correct the tables by the recorded times; both are of the same device
    seed: int
    notes: list[str]  # warnings about the profile, for people

    def replay(
        self,
        policy: str | None,
        thresholds: Mapping[str, Any],
        *,
        copies: bool = True,
        switch_at: int | None = None,
    ) -> ReplayResult:
        """Replay the trace.

        Args:
            policy: name of the policy; None for the recorded one.
            thresholds: c1, c2, c3, r of policy `fixed`; the trace supplies those missing.
            copies, switch_at: as of `Replay`.

        Raises:
            ConfigError: a threshold is out of range, or is given for another policy.
            TraceError: the trace cannot be replayed, or holds no copies and is asked about them.
        """
        header = self.trace.header
        is_other = not copies or switch_at is not None
        if is_other and not any(step.copy_chances for step in self.trace.steps):
            flag = "--no-copies" if switch_at is None else "--switch-at"
            raise TraceError(
                f"{flag}: trace {self.trace.path} holds no copies; record with --cast-copying on"
            )
        name = policy or header.policy
        if thresholds and name != "fixed":
            given = ", ".join(f"--{key}" for key in thresholds)
            raise ConfigError(f"{given}: policy {name} has no thresholds; add --policy fixed")
        CastConfig(**thresholds)
        chosen = make_policy(name, header, **thresholds)
        replay = Replay(
            self.trace,
            self.profile,
            chosen,
            correct=self.corrects,
            seed=self.seed,
            copies=copies,
            switch_at=switch_at,
        )
        rows = compare(self.trace, list(replay))
        is_recorded = name == header.policy and not header.is_full and not is_other
        if name == "fixed":
            is_recorded &= all(header.settings[key] == thresholds[key] for key in thresholds)
        is_here = _is_same_host(self.profile, header)
        how = "" if copies else ", without copies"
        if switch_at is not None:
            how = f", whole drafts copied where {switch_at} tokens match"
        is_prediction = is_recorded and is_here
        return ReplayResult(self, name, dict(thresholds), rows, is_prediction, how)

    def print_notes(self, console: Console) -> None:
        """Print the origin of the trace and of the tables, and all warnings about them."""
        header, source = self.trace.header, self.profile.provenance
        identity = header.identity
        facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        full = "the whole envelope in every step"
        served = full if header.is_full else f"policy {header.policy}"
        pair = f"{identity.target.name} + {identity.draft.name}"
        facts.add_row("recorded", Text(f"{served} on {identity.device_name}, {header.date}"))
        facts.add_row("pair", Text(pair))
        facts.add_row("tables", Text(f"{source.device_name}, {source.date}"))
        console.print(facts)
        if not _is_same_host(self.profile, header):
            warning = f"All predicted times are those of {source.device_name}, not of the recording"
            console.print(Text(warning, "bold yellow"), soft_wrap=True)
        if source.estimated:
            console.print(Text("ESTIMATED: these tables were computed, not measured", "bold red"))
        for note in [*self.trace.notes, *self.notes]:
            console.print(Text(f"note: {note}", "yellow"), soft_wrap=True)


class ReplayResult(NamedTuple):
    """The result of a replay, by batch size, and what it was made from."""

    session: TraceSession
    policy: str
    thresholds: dict[str, float]
    rows: list[BatchSummary]
    is_prediction: bool  # same policy and device as recorded: the times should agree
    how: str = ""  # what was copied otherwise than recorded, for people

    def as_dict(self) -> dict[str, Any]:
        """Return the result as values that JSON can hold."""
        header, source = self.session.trace.header, self.session.profile.provenance
        return {
            "recorded": {
                "device_name": header.identity.device_name,
                "policy": header.policy,
                "is_full": header.is_full,
                "date": header.date,
            },
            "tables": {"device_name": source.device_name, "estimated": source.estimated},
            "policy": f"{self.policy}{self.how}",
            "thresholds": self.thresholds,
            "corrected": self.session.corrects,
            "is_prediction": self.is_prediction,
            "notes": [*self.session.trace.notes, *self.session.notes],
            "rows": [row.as_dict() for row in self.rows],
        }

    def print(self, console: Console) -> None:
        """Print the table, how much of it is assumed, and how far predictions are off."""
        self.session.print_notes(console)
        words = "".join(f", {name.upper()} {value:g}" for name, value in self.thresholds.items())
        console.print(
            f"[bold]replayed: policy {self.policy}{words}{self.how}[/bold]", highlight=False
        )
        print_summaries(self.rows, console)
        lines = []
        for row in self.rows:
            batch = f"batch {row.batch_size or 'all'}"
            if row.assumed_share > 0.0:
                hint = "" if self.session.trace.header.is_full else " (less with --cast-trace-full)"
                lines.append(
                    f"{batch}: {row.assumed_share:.1%} of the accepted drafts are assumed{hint}"
                )
            if self.is_prediction:
                lines.append(
                    f"{batch}: predicted speed is {row.error:+.1%} off the measured one "
                    f"({row.table_error:+.1%} by the tables as they are)"
                )
        for line in lines:
            console.print(line, soft_wrap=True)


def open_session(
    path: Path, source: str, *, allow_foreign: bool, corrects: bool, seed: int
) -> TraceSession:
    """Read a trace and the profile whose tables predict its times.

    Args:
        source: path of a profile, or "auto" to search for one of the trace's device and pair.
        allow_foreign: accept a profile of another pair, or one whose grid ends far below the trace.
        corrects: correct the tables by the recorded times, if both are of the same device.
        seed: seed of the random draws in `Replay`.

    Raises:
        TraceError: the trace cannot be read, or this profile cannot replay it.
        ProfileError: the profile cannot be read, or a search found none.
    """
    trace = read_trace(path)
    header = trace.header
    if source == "auto":
        try:
            profile = find_profile(header.identity).profile
        except MissingProfileError as error:
            advice = "name one with --profile, or measure one there with cast-sglang profile"
            raise MissingProfileError(f"{error}; {advice}") from error
    else:
        profile = load_profile(source)
    notes = _check_tables(profile, trace, allow_foreign)
    corrects &= _is_same_host(profile, header)
    return TraceSession(trace, profile, corrects, seed, notes)


def _check_tables(profile: CostProfile, trace: Trace, allow_foreign: bool) -> list[str]:
    """Check that the profile can replay the trace; return warnings for people.

    Raises:
        TraceError: the profile is of another pair, or its grid ends far below the trace.
    """
    header = trace.header
    if tables_digest(profile) == header.tables:
        return []
    measured, recorded = profile.provenance, header.identity
    notes = []
    for role in ("target", "draft"):
        theirs, ours = getattr(measured, role), getattr(recorded, role)
        if theirs.config_hash != ours.config_hash:
            text = f"the profile's {role} model is {theirs.name}, the trace's {ours.name}"
            if not allow_foreign:
                raise TraceError(f"{text}; name a profile of this pair, or add --allow-foreign")
            notes.append(text)
    batch_size = max((step.batch_size for step in trace.steps), default=1)
    limits = {
        "target.batch_sizes": (profile.target.batch_sizes, batch_size),
        "target.token_counts": (profile.target.token_counts, header.num_draft_tokens),
    }
    if profile.draft is not None:
        limits["draft.token_counts"] = (profile.draft.token_counts, header.topk)
    for name, (grid, limit) in limits.items():
        if limit > MAX_EXTRAPOLATION * grid[-1] and not allow_foreign:
            raise TraceError(
                f"the profile's grid {name} ends at {grid[-1]}, the trace goes to {limit}: "
                "measure a profile that covers it, or add --allow-foreign"
            )
        if limit > grid[-1]:
            notes.append(f"the profile's grid {name} ends at {grid[-1]}; beyond it is continued")
    return notes


def _is_same_host(profile: CostProfile, header: TraceHeader) -> bool:
    """Return whether profile and trace are of the same device and settings."""
    if tables_digest(profile) == header.tables:
        return True
    fields = ("device_name", "dtype", "quantization", "tp_size", "attention_backend")
    return all(getattr(profile.provenance, f) == getattr(header.identity, f) for f in fields)
