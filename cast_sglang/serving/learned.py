"""What a server has learned of its pair and its device, kept from one start to the next.

That is the acceptance of drafts and of copies, the price of each octave of batch sizes, and the
corrections of the cost tables. A measurement of a profile ends with a short real run, whose result
is part of the profile; a server goes on from there and keeps what it learned in the user's cache.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.distributed import get_tp_group
from sglang.srt.runtime_context import get_parallel

from cast_sglang.config import user_cache_dir
from cast_sglang.copying.chances import Chances
from cast_sglang.costs.correction import Residuals
from cast_sglang.costs.limits import Limits
from cast_sglang.costs.profiles import user_profile_path, write_atomically
from cast_sglang.errors import ConfigError
from cast_sglang.policy.acceptance import Acceptance
from cast_sglang.policy.auto import AutoPolicy
from cast_sglang.trace.records import tables_digest

if TYPE_CHECKING:
    from cast_sglang.config import CastConfig
    from cast_sglang.costs.schema import HostIdentity
    from cast_sglang.policy.base import TreePolicy
    from cast_sglang.serving.calibration import Calibration
    from cast_sglang.serving.copies import Copies
    from cast_sglang.serving.served_costs import ServedCosts

__all__ = ["Learned", "LearnedFile"]

# The file is written at step 64, 128, 256 and so on, so that a short life is remembered too, and
# later every 1,024 steps. A write takes 1 ms.
FIRST_SAVE, SAVE_EVERY = 64, 1024
_FORMAT = 1
_OF_TABLES = ("tables", "corrections")

logger = logging.getLogger(__name__)


class LearnedFile:
    """The file that keeps what a server learned.

    Args:
        path: made when there is something to keep.
        identity: of the server; another pair's file is refused.
        is_named: the user named the file, so a bad one is an error; else it is left out.
    """

    def __init__(self, path: Path, identity: HostIdentity, is_named: bool = True) -> None:
        self._path, self._is_named, self._is_lost = path, is_named, False
        self._pair = [identity.target.config_hash, identity.draft.config_hash]

    @classmethod
    def of(cls, config: CastConfig, identity: HostIdentity) -> LearnedFile | None:
        """Return the configured file, None for none."""
        if config.calibration_file == "none" or config.policy == "eagle":
            return None
        if config.calibration_file == "auto":
            path = user_cache_dir() / "calibration" / user_profile_path(identity).name
            return cls(path, identity, is_named=False)
        return cls(Path(config.calibration_file).expanduser(), identity)

    def load(self) -> dict[str, Any]:
        """Return what was learned before; nothing where there is no file.

        Raises:
            ConfigError: names the flag, the file that the user named and what is wrong with it.
        """
        try:
            content = json.loads(self._path.read_bytes())
            if not isinstance(content, dict) or content.get("pair") != self._pair:
                raise ValueError("learned with another pair; name a file of its own for each")
            if "format" not in content:
                # A server learns anew within some hundred steps, so an update need not stop it.
                logger.warning("CAST: %s: of an earlier release, learning begins anew", self._path)
                return {}
            if content["format"] != _FORMAT:
                raise ValueError(f"not of format {_FORMAT}, which this release reads")
            _check(content)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            reason = f"--cast-calibration-file {self._path}: {' '.join(str(error).split())}"
            if self._is_named:
                raise ConfigError(reason) from error
            logger.warning("CAST: %s; starting without it", reason)
            return {}
        return content

    def save(self, learned: Mapping[str, Any]) -> None:
        """Write what was learned; a server that cannot write logs that once and serves."""
        if self._is_lost:
            return
        content = {"format": _FORMAT, "pair": self._pair, **learned}
        try:
            # After a power cut the older file would do.
            write_atomically(self._path, json.dumps(content).encode(), sync=False)
        except OSError as error:
            self._is_lost = True
            logger.warning(
                "CAST: --cast-calibration-file %s: cannot be written, so the next start will not "
                "know what this one learns: %s",
                self._path,
                error,
            )


class Learned:
    """Everything that one server learns, wherever it is held.

    Args:
        file: None for what ends with the server.
        calibration: None for a server that calibrates nothing.
        copies: None for one that copies nothing.
    """

    def __init__(
        self,
        file: LearnedFile | None,
        policy: TreePolicy,
        calibration: Calibration | None,
        costs: ServedCosts,
        copies: Copies | None = None,
    ) -> None:
        self._file, self._policy = file, policy
        self._calibration, self._costs, self._copies = calibration, costs, copies
        self._before: Mapping[str, Any] = {}  # what the server went on from
        self._next_save = FIRST_SAVE  # a step
        # Tells the tables in use, to which corrections belong, from others.
        self._tables = "" if costs.profile is None else tables_digest(costs.profile.profile)

    def start(self) -> Mapping[str, Any]:
        """Go on from what the file holds, or else from the short run of the profile.

        Every rank goes on from what rank 0 has.

        Returns:
            What a replay of this server needs of it: prices and corrections.

        Raises:
            ConfigError: names the flag, the file and what is wrong with it.
        """
        learned: Mapping[str, Any] = {}
        if get_parallel().tp_rank == 0:
            learned = self._found()
        if get_parallel().tp_size > 1:
            learned = get_tp_group().broadcast_object(learned, src=0)
        self._before = learned
        start = {}
        if self._calibration is not None and "acceptance" in learned:
            self._calibration.acceptance.load_state(learned["acceptance"])
        if self._copies is not None and "copies" in learned:
            self._copies.chances.load_state(learned["copies"])
        if isinstance(self._policy, AutoPolicy) and "prices" in learned:
            start["prices"] = learned["prices"]
            self._policy.load_state(learned["prices"])
        if self._costs.residuals is not None and "corrections" in learned:
            start["corrections"] = learned["corrections"]
            self._costs.residuals.load_state(learned["corrections"])
        return start

    def _found(self) -> Mapping[str, Any]:
        """Return what the file holds, and of the short run what the file lacks.

        Corrections belong to the tables that they were learned with.
        """
        kept = {} if self._file is None else self._file.load()
        found, of_run = self._costs.profile, {}
        if found is not None and found.profile.serving is not None:
            of_run = found.profile.serving.learned
            try:
                _check(of_run)
            except ValueError as error:
                logger.warning("CAST: profile %s: serving.learned: %s", found.path, error)
                of_run = {}
        learned: dict[str, Any] = {}
        for source in (of_run, kept):
            is_fit = source.get("tables") == self._tables
            learned |= {
                name: part for name, part in source.items() if is_fit or name not in _OF_TABLES
            }
            if not is_fit and "prices" in source:  # what turns of other trees taught is gone
                learned["prices"] = [{**row, "turn": 0} for row in source["prices"]]
        return learned

    def content(self) -> dict[str, Any]:
        """Return what was learned, as JSON can hold it."""
        learned = dict(self._before)
        if self._calibration is not None:
            learned["acceptance"] = self._calibration.acceptance.state()
        if self._copies is not None:
            learned["copies"] = self._copies.chances.state()
        if isinstance(self._policy, AutoPolicy):
            learned["prices"] = self._policy.state()
        if self._costs.residuals is not None:
            learned["tables"] = self._tables
            learned["corrections"] = self._costs.residuals.state()
        return learned

    def save_when_due(self, num_steps: int) -> None:
        """Write the file at some of the server's steps."""
        if num_steps >= self._next_save:
            self._next_save += min(self._next_save, SAVE_EVERY)
            self.save()

    def save(self) -> None:
        """Write the file, if there is one; rank 0 does."""
        if self._file is not None and get_parallel().tp_rank == 0:
            self._file.save(self.content())


def _check(learned: Mapping[str, Any]) -> None:
    """Raise ValueError for what cannot be used; parts may be missing."""
    if "acceptance" in learned:
        Acceptance().load_state(learned["acceptance"])
    if "copies" in learned:
        Chances().load_state(learned["copies"])
    if "prices" in learned:
        AutoPolicy((2,), 1).load_state(learned["prices"])
    if "corrections" in learned:
        limits = Limits(max_batch_size=1, max_context=1, max_verify_rows=2, max_width=1)
        Residuals(limits).load_state(learned["corrections"])
