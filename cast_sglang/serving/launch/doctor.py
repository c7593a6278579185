"""Say whether machine, SGLang, model pair and profile fit together: `cast-sglang doctor`.

Every check is made as a launch would make it, up to the point where a model would be loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import logging
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from cast_sglang.config import CastConfig, add_flags, given_flags
from cast_sglang.costs.limits import Limits, exceeded
from cast_sglang.costs.profiles import FoundProfile, describe_error, find_profile
from cast_sglang.costs.schema import NO_DRAFT
from cast_sglang.errors import CastError, HostError, MissingProfileError, ProfileError
from cast_sglang.serving.launch.diagnosis import FAIL, OK, SKIP, WARN, Check, Diagnosis
from cast_sglang.serving.launch.engine import environment, started_engine
from cast_sglang.serving.launch.host_contract import broken_promises, host_source, read_contract
from cast_sglang.serving.launch.probe import EngineOfOurs, RunningServer, probe

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

    from cast_sglang.costs.schema import HostIdentity

__all__ = ["check_profile_fit", "examine"]

PACKAGE = "cast-sglang"
DRAFT_FLAG = "--speculative-draft-model-path"
# A table that is off by more than this may well choose another tree.
MAX_MEDIAN_ERROR = 0.10
# Whatever SGLang and the libraries below it raise about a machine, a file or a flag.
FAILURES = (
    CastError,
    argparse.ArgumentError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def examine(
    server_argv: list[str], cast_profile: str | None = None, probe_url: str | None = None
) -> Diagnosis:
    """Check what a server with these flags would meet on this machine.

    Args:
        server_argv: SGLang's flags; without a model only machine and settings are checked.
        cast_profile: a path, or "auto" to search; None for what the settings say.
        probe_url: of a server that is probed too; "" to start one with the flags, None for none.

    Effects: loads SGLang and its plugins into this process and silences their output.

    Raises:
        HostError: the server that is to be probed does not answer, or does not run CAST.
    """
    if probe_url:
        with _silence():
            return Diagnosis(
                [*_checks(server_argv, cast_profile), *probe(RunningServer(probe_url))]
            )
    # What the checks force on the launch is not for the engine.
    with environment(CAST_PROFILE=None, CAST_POLICY=None), _silence():
        checks = _checks(server_argv, cast_profile)
    if probe_url is not None and all(check.status not in (FAIL, SKIP) for check in checks):
        profile = [] if cast_profile is None else ["--cast-profile", cast_profile]
        # It neither goes on from what the user's servers have learned, nor adds to it.
        with (
            environment(CAST_CALIBRATION_FILE="none"),
            started_engine([*server_argv, *profile]) as engine,
        ):
            return Diagnosis([*checks, *probe(EngineOfOurs(engine))])
    if probe_url is not None:
        checks.append(Check("probe", SKIP, "not started: what failed above comes first"))
    return Diagnosis(checks)


def check_profile_fit(found: FoundProfile, command: str) -> list[Check]:
    """Report how well a profile that was found fits the host, and how far it can be trusted.

    Args:
        command: what measures the host's own profile.
    """
    source = found.profile.provenance
    fit = f"{found.path}: measured for this device and pair"
    # "profile PATH: was measured with another ..." repeats the path.
    differences = [warning.removeprefix(f"profile {found.path}: ") for warning in found.warnings]
    if differences:
        fit = f"{found.path}: {'; '.join(differences)}"
    fix = f"measure one here: {command}"
    checks = [Check("profile", WARN if differences else OK, fit, fix if differences else "")]

    how = "ESTIMATED, not measured" if source.estimated else f"measured in {source.seconds:.0f} s"
    text = f"{how}, {source.date[:10]}; {describe_error(found.profile)}"
    heldout = source.heldout
    trusted = heldout is not None and heldout.median_error <= MAX_MEDIAN_ERROR
    if trusted and not source.estimated:
        checks.append(Check("profile error", OK, text))
    else:
        advice = "measure on an idle machine, without --quick or a short --budget-seconds"
        checks.append(Check("profile error", WARN, text, f"{advice}: {command}"))
    return checks


def _checks(server_argv: list[str], cast_profile: str | None) -> list[Check]:
    checks = [
        _attempt("python", _check_python),
        _attempt("sglang", lambda: _check_package("sglang")),
        _attempt("torch", lambda: _check_package("torch")),
    ]
    checks.append(_attempt("sglang contract", _check_contract))
    if checks[1].status == FAIL:
        return [*checks, Check("the rest", SKIP, "not checked: SGLang comes first")]
    checks += [_attempt("plugin", _check_plugin), _attempt("device", _check_device)]
    is_usable = all(check.status != FAIL for check in checks[-2:])

    config = None
    try:
        config = CastConfig.load(_cast_flags(server_argv, cast_profile))
        text = f"policy {config.policy}, C1={config.c1:g} C2={config.c2:g} C3={config.c3:g}"
        text += f" R={config.r}, lookup {config.lookup}, profile {config.profile}"
        checks.append(Check("settings", OK, text))
    except FAILURES as error:
        checks.append(Check("settings", FAIL, _one_line(error)))

    rest = ("server flags", "pair", "profile")
    if not _names_a_model(server_argv):
        reason = f"not checked: no model given; add --model-path TARGET {DRAFT_FLAG} DRAFT"
        return [*checks, *(Check(name, SKIP, reason) for name in rest)]
    if config is None or not is_usable:
        reason = "not checked: what failed above comes first"
        return [*checks, *(Check(name, SKIP, reason) for name in rest)]
    return checks + _check_server(server_argv, config)


def _check_python() -> Check:
    needed = metadata.metadata(PACKAGE)["Requires-Python"]
    return _version_check("python", platform.python_version(), needed, f"use Python {needed}")


def _check_package(name: str) -> Check:
    from packaging.requirements import Requirement

    requirements = map(Requirement, metadata.requires(PACKAGE) or [])
    needed = next(str(r.specifier) for r in requirements if r.name == name and not r.marker)
    fix = f"pip install '{name}{needed}'"
    try:
        return _version_check(name, metadata.version(name), needed, fix)
    except metadata.PackageNotFoundError:
        return Check(name, FAIL, f"not installed here; {PACKAGE} needs {needed}", fix)


def _version_check(name: str, version: str, needed: str, fix: str) -> Check:
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(needed).contains(version, prereleases=True):
        return Check(name, OK, f"{version} (supported: {needed})")
    return Check(name, FAIL, f"{version}, but {PACKAGE} supports {needed}", fix)


def _check_contract() -> Check:
    contract = read_contract()
    broken = broken_promises(host_source(), contract)
    if not broken:
        return Check("sglang contract", OK, f"{len(contract)} symbols are as the plugin needs them")
    text = f"{len(broken)} of {len(contract)} symbols differ: {'; '.join(broken[:3])}"
    return Check("sglang contract", FAIL, text, "use the release of SGLang that is tested")


def _check_plugin() -> Check:
    from sglang.srt.environ import envs
    from sglang.srt.plugins import GENERAL_PLUGINS_GROUP, load_plugins
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    entries = metadata.entry_points(group=GENERAL_PLUGINS_GROUP, name="cast")
    if not entries:
        fix = f"install it into this environment: pip install {PACKAGE}"
        return Check("plugin", FAIL, f"no entry point `cast` in {GENERAL_PLUGINS_GROUP}", fix)
    load_plugins()
    try:
        SpeculativeAlgorithm.from_string("CAST")
    except ValueError:
        found = "SGLang sees the entry point `cast`, but CAST is not registered"
        names = [name.strip() for name in envs.SGLANG_PLUGINS.get().split(",") if name.strip()]
        if names and "cast" not in names:
            fix = f"unset SGLANG_PLUGINS, or add cast to it (it is {','.join(names)})"
        elif envs.SGLANG_PLATFORM.get() not in ("", "cast_cpu"):
            fix = "SGLang skips the plugins of other platforms: unset SGLANG_PLATFORM"
        else:
            fix = f"reinstall it: pip install --force-reinstall {PACKAGE}"
            # SGLang only logs why; once more, to have the reason in the report.
            next(iter(entries)).load()()
        return Check("plugin", FAIL, found, fix)
    [entry] = entries
    return Check("plugin", OK, f"SGLang finds {entry.value}; CAST is registered")


def _check_device() -> Check:
    import torch
    from sglang.srt.platforms import current_platform

    from cast_sglang.cpu.names import PLATFORM_NAME
    from cast_sglang.serving.launch.arguments import NO_DEVICE, NO_DEVICE_FIX
    from cast_sglang.serving.launch.identity import device_facts

    if current_platform.device_name == PLATFORM_NAME:
        cpu = f"{device_facts('cpu')['device_name']}; CPU platform {PLATFORM_NAME} is active"
        if glob.glob("/dev/nvidia[0-9]*"):
            fix = "unset SGLANG_PLATFORM to use them"
            return Check("device", WARN, f"{cpu} and hides this machine's GPUs", fix)
        return Check("device", OK, cpu)
    if torch.version.cuda and torch.cuda.is_available():
        facts = device_facts("cuda")
        memory = f"{facts['device_memory_bytes'] / 2**30:.0f} GiB"
        text = f"{facts['device_name']} ({memory}), {facts['device_count']} visible"
        return Check("device", OK, f"{text}, driver {facts['driver']}, {facts['runtime']}")
    return Check("device", FAIL, NO_DEVICE, NO_DEVICE_FIX)


def _check_server(server_argv: list[str], config: CastConfig) -> list[Check]:
    """Check the flags, the pair and the profile, in the order of a launch."""
    from cast_sglang.serving.launch.identity import host_identity
    from cast_sglang.serving.launch.reserve import describe_reserve, read_launch, reserve_of_server
    from cast_sglang.serving.launch.target import target_config

    def memory() -> Check:
        launch = read_launch(args, config, target, identity)
        return Check("memory", OK, describe_reserve(reserve_of_server(args, config, launch)))

    try:
        args = _resolve(server_argv)
        target = target_config(args)
        identity = host_identity(args, target)
    except FAILURES as error:
        message = _one_line(error)
        name = "pair" if message.startswith(f"{DRAFT_FLAG} ") else "server flags"
        skipped = "not checked: what failed above comes first"
        return [Check(name, FAIL, message), Check("profile", SKIP, skipped)]
    envelope = (
        args.speculative_num_steps,
        args.speculative_eagle_topk,
        args.speculative_num_draft_tokens,
    )
    text = "steps {}, topk {}, tokens {}; ".format(*envelope)
    text += f"attention {identity.attention_backend}"
    draft = "no draft: what is drafted is copied from the text"
    if identity.draft != NO_DRAFT:
        draft = f"{identity.draft.name} ({', '.join(identity.draft.architectures)})"
    pair = (
        f"{identity.target.name} ({', '.join(identity.target.architectures)}) + {draft}, "
        f"{identity.dtype}, tp {identity.tp_size}"
    )
    return [
        Check("server flags", OK, text),
        Check("pair", OK, pair),
        _attempt("memory", memory),
        *_check_profile(config, identity, args, target.context_len),
    ]


def _resolve(server_argv: list[str]) -> Any:
    """Return the server's arguments as a launch would resolve them."""
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.server_args import prepare_server_args

    # The profile is checked on its own; the last flag of a kind counts.
    forced = ["--speculative-algorithm", "CAST", "--cast-profile", "estimate"]
    usage = io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            args: ServerArgs = prepare_server_args([*server_argv, *forced])
    except SystemExit as error:
        # How argparse reports a flag: usage, then "sglang serve: error: ...".
        lines = usage.getvalue().strip().splitlines() or [f"SGLang ended with {error.code}"]
        raise HostError(lines[-1].rpartition("error: ")[2]) from error
    finally:
        # SGLang configures logging anew while it parses.
        logging.disable(logging.CRITICAL)
    args.resolve_once()
    return resolving_view(args)


def _check_profile(
    config: CastConfig, identity: HostIdentity, args: Any, context: int
) -> list[Check]:
    from cast_sglang.serving.launch.cost_profile import profile_command

    command = profile_command(args, identity)
    if config.profile == "none":
        return [Check("profile", OK, f"none, and policy {config.policy} needs none")]
    if config.profile == "estimate":
        text = "costs will be estimated from the device's bandwidth and peak rate"
        return [Check("profile", WARN, text, f"measure them: {command}")]
    try:
        allow = config.allow_foreign_profile
        found = find_profile(identity, config.profile, allow_foreign=allow, command=command)
    except MissingProfileError as error:
        fix = "the server will measure a quick table at its start; for a full one run: "
        return [Check("profile", WARN, _one_line(error), fix + command)]
    except ProfileError as error:
        return [Check("profile", FAIL, _one_line(error))]
    checks = check_profile_fit(found, command)
    return [
        *checks,
        _attempt("profile range", lambda: _check_range(found, config, args, command, context)),
    ]


def _check_range(
    found: FoundProfile, config: CastConfig, args: Any, command: str, context: int
) -> Check:
    from cast_sglang.serving.step_room import deepest_copy, most_tokens

    rows, has_draft = (
        args.speculative_num_draft_tokens,
        args.speculative_draft_model_path is not None,
    )
    depth = max(args.speculative_num_steps, deepest_copy(config, has_draft, rows))
    limits = Limits(
        max_batch_size=args.max_running_requests,
        max_context=context,
        max_verify_rows=rows,
        max_width=args.speculative_eagle_topk * has_draft,
        max_extend_rows=most_tokens(depth, rows) * has_draft,
    )
    asked = f"{limits.max_batch_size} requests, context {limits.longest_context}, {rows} rows"
    if has_draft:
        asked += f", {limits.max_width} nodes a layer"
    beyond = exceeded(found.profile, limits)
    if not beyond:
        return Check("profile range", OK, f"covers {asked}")
    ends: dict[str, int] = {}
    for name in sorted(beyond):
        table, axis = name.split(".")
        # Rows and nodes are counted apart; requests and contexts are the same in all tables.
        key = name if axis == "token_counts" else axis
        last = getattr(getattr(found.profile, table), axis)[-1]
        ends[key] = min(last, ends.get(key, last))
    text = ", ".join(f"{key} at {last}" for key, last in ends.items())
    return Check(
        "profile range",
        WARN,
        f"the server may ask for {asked}; the profile ends with {text} and is extrapolated beyond",
        "lower the server's limits (--max-running-requests, --context-length), or measure it for "
        f"them: {command}",
    )


def _cast_flags(server_argv: list[str], cast_profile: str | None) -> dict[str, Any]:
    """Return the values of the `--cast-*` flags among the server's, by key."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_flags(parser)
    given = given_flags(parser.parse_known_args(server_argv)[0])
    return {**given, "profile": cast_profile or given["profile"]}


def _names_a_model(server_argv: list[str]) -> bool:
    flags = {word.partition("=")[0] for word in server_argv}
    return not flags.isdisjoint(("--model-path", "--model", DRAFT_FLAG, "--config"))


def _attempt(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except FAILURES as error:
        return Check(name, FAIL, _one_line(error))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, CastError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep logs and prints of SGLang out of the report."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
