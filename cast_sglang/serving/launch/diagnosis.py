"""What `cast-sglang doctor` found: one record for each check, for people and for programs."""

import json
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

__all__ = ["FAIL", "OK", "SKIP", "WARN", "Check", "Diagnosis"]

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"
COLORS = {OK: "green", WARN: "yellow", FAIL: "bold red", SKIP: "dim"}


class Check(NamedTuple):
    """One line of the report."""

    name: str
    status: str  # OK, WARN, FAIL, or SKIP for what could not be checked
    found: str
    fix: str = ""


class Diagnosis(NamedTuple):
    """All checks of one run, in order."""

    checks: list[Check]

    @property
    def exit_code(self) -> int:
        return int(any(check.status == FAIL for check in self.checks))

    def as_json(self) -> str:
        """Return one JSON object: `ok`, and `checks` with name, status, found and fix."""
        checks = [check._asdict() for check in self.checks]
        return json.dumps({"ok": self.exit_code == 0, "checks": checks})

    def print(self, console: Console) -> None:
        """Print a line for each check, its fix below it, and the sum."""
        width = max(len(check.name) for check in self.checks)
        for check in self.checks:
            line = Text(f"{check.status:4}  ", COLORS[check.status])
            line.append(f"{check.name:{width}}  {check.found}", "default")
            # Not wrapped, so that a command can be copied.
            console.print(line, soft_wrap=True)
            if check.fix:
                console.print(Text(f"{'':{width + 8}}-> {check.fix}"), soft_wrap=True)
        counts = {s: sum(check.status == s for check in self.checks) for s in (FAIL, WARN, SKIP)}
        words = {FAIL: "failed", WARN: "to look at", SKIP: "not checked"}
        text = [f"{count} {words[status]}" for status, count in counts.items() if count]
        console.print(", ".join(text) if text else "everything fits", soft_wrap=True)
