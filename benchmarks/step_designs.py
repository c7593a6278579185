"""Ways to drive a step of speculative decoding, as programs for `step_simulation`.

`static` is SGLang's: one captured graph over all draft passes, a tree of one shape, no decision.
The others are ways to run CAST:

- `sync`: after each draft pass the host reads the layer's gain, waits for it and decides;
- `async`: it decides on a layer while the next one runs already, so that one pass is surplus where
  the tree stops early;
- `ahead`: depth and width follow from the steps before, so one graph of just those passes is
  launched; what the step's own layers say comes too late for it;
- `device`: one graph over the greatest depth; what is pruned is masked, not saved;
- `blind`: like `device`, and the number of verified rows is the one the step before decided on, so
  that nothing is waited for.

All but `blind` and `static` read the number of rows to verify and wait for it, as it chooses the
verify graph. `sync` comes with captured passes and, as `eager`, with single launches.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.step_simulation import Launch, Op, Read, Wait, Work

DESIGNS = ("static", "eager", "sync", "async", "ahead", "device", "blind")


@dataclasses.dataclass(frozen=True)
class HostCosts:
    """Times of the host and between host and device, in microseconds.

    Orders of magnitude, not measurements of one machine; every one can be set. Measure those of a
    host with its profiler before a close decision is taken by them.
    """

    # Replay of a captured graph through PyTorch. NVIDIA gives 2.5 us and a nanosecond a node for
    # the launch alone (developer blog, "Constant time launch for straight-line CUDA graphs", 2024);
    # inputs must be copied into place before.
    graph_us: float = 12.0
    # One kernel through PyTorch or Triton, checks and dispatch included: assumed.
    kernel_us: float = 6.0
    # Submission of a small asynchronous copy: 5 to 7 us (arXiv 2602.21548, section 5.2).
    copy_us: float = 6.0
    # From the end of a kernel to its value in pinned memory and the host awake: assumed.
    read_us: float = 10.0
    # From a launch to the begin of the kernel on an idle device: assumed.
    latency_us: float = 4.0
    # Python of the policy for a layer, numbers at hand: assumed, as for a few numpy calls.
    layer_us: float = 20.0
    # Python around the passes of a step, the same for all designs: assumed.
    step_us: float = 150.0
    # SGLang's scheduler between two steps: assumed.
    scheduler_us: float = 500.0
    # A policy kernel on the device: assumed, as for the smallest kernels.
    policy_kernel_us: float = 3.0


class Tree(NamedTuple):
    """The tree of a step. Its first layer comes from draft extend, each further one from a pass."""

    passes: int
    width: int
    rows: int  # verified per request, root included


class PassTimes(NamedTuple):
    """Device time of passes at one batch size, in microseconds."""

    draft: Callable[[int], float]  # nodes per request
    verify: Callable[[int], float]  # rows per request
    extend: Callable[[int], float]  # rows per request


class Setting(NamedTuple):
    """What is compared."""

    times: PassTimes
    host: HostCosts
    tree: Tree  # what CAST's policy decides on
    envelope: Tree  # the greatest tree
    static: Tree
    has_overlap: bool


# Kernels that are launched one by one where a pass is not captured.
KERNELS_PER_PASS = 28
# Score update, mean utility, choice of the width.
POLICY_KERNELS_PER_LAYER = 3
# Ranking and choice of the size; then tokens and links of the tree.
RANK_KERNELS, BUILD_KERNELS = 2, 2
# Acceptance, sampling and moving of the cache.
ACCEPT_KERNELS = 12


def useful_us(setting: Setting, design: str) -> float:
    """Return the device time of a design's own tree: what a step would take if nothing was lost."""
    tree = setting.static if design == "static" else setting.tree
    times = setting.times
    drafts = tree.passes * times.draft(tree.width)
    return drafts + times.verify(tree.rows) + times.extend(tree.passes + 2)


def program(setting: Setting, design: str, num_steps: int) -> list[Op]:
    """Return the host's program of several steps in a row.

    Raises:
        ValueError: there is no such design.
    """
    if design not in DESIGNS:
        raise ValueError(f"{design!r} is none of {', '.join(DESIGNS)}")
    ops: list[Op] = []
    for step in range(num_steps):
        ops += _step(setting, design, step)
        # With overlap the host takes the results of a step when the next one is on its way.
        done = step - 1 if setting.has_overlap else step
        if done >= 0:
            ops.append(Wait(f"{done} results"))
        ops.append(Work("scheduler", setting.host.scheduler_us))
    return ops


def _step(setting: Setting, design: str, step: int) -> list[Op]:
    host, times = setting.host, setting.times
    tree = setting.static if design == "static" else setting.tree
    ops: list[Op] = [Work("step", host.step_us)]
    if design == "static":
        ops.append(Launch("draft", host.graph_us, tree.passes * times.draft(tree.width)))
    elif design == "ahead":
        policy_us = (tree.passes + 1) * POLICY_KERNELS_PER_LAYER * host.policy_kernel_us
        ops.append(Launch("draft", host.graph_us, tree.passes * times.draft(tree.width)))
        ops.append(Launch("policy", 0.0, policy_us, "policy"))
    elif design in ("device", "blind"):
        ops += _whole_depth(setting)
    else:
        ops += _layers(setting, design, step)
    if design != "static":
        ops.append(_kernels("rank", host, RANK_KERNELS, "policy"))
        if design != "blind":
            ops += [Read(f"{step} rows", host.copy_us), Wait(f"{step} rows")]
        ops.append(Work("policy", host.layer_us))
    ops += [
        _kernels("tree", host, BUILD_KERNELS, "policy"),
        Launch("verify", host.graph_us, times.verify(tree.rows)),
        _kernels("accept", host, ACCEPT_KERNELS, "pass"),
        Launch("extend", host.graph_us, times.extend(tree.passes + 2)),
        Read(f"{step} results", host.copy_us),
    ]
    return ops


def _whole_depth(setting: Setting) -> list[Op]:
    """Return one graph over the greatest depth, policy included."""
    host, envelope = setting.host, setting.envelope
    each_us = setting.times.draft(envelope.width)
    useful = setting.tree.passes * setting.times.draft(setting.tree.width)
    surplus = envelope.passes * each_us - useful
    policy = (envelope.passes + 1) * POLICY_KERNELS_PER_LAYER * host.policy_kernel_us
    return [
        Launch("draft", host.graph_us, useful),
        Launch("surplus", 0.0, surplus, "surplus"),
        Launch("policy", 0.0, policy, "policy"),
    ]


def _layers(setting: Setting, design: str, step: int) -> list[Op]:
    """Return pass after pass, with a decision for each."""
    host, tree = setting.host, setting.tree
    layer_policy_us = POLICY_KERNELS_PER_LAYER * host.policy_kernel_us
    pass_us = setting.times.draft(tree.width)
    # The layer after the last pass is judged too, unless it is the last there may be.
    stops_early = tree.passes < setting.envelope.passes
    ops: list[Op] = []

    def launch_pass(number: int, kind: str) -> None:
        if design == "eager":
            host_us = KERNELS_PER_PASS * host.kernel_us
            ops.append(Launch(f"draft {number}", host_us, pass_us, kind, KERNELS_PER_PASS))
            ops.append(_kernels("policy", host, POLICY_KERNELS_PER_LAYER, "policy"))
        else:
            ops.append(Launch(f"draft {number}", host.graph_us, pass_us, kind))
            ops.append(Launch("policy", 0.0, layer_policy_us, "policy"))
        ops.append(Read(f"{step} layer {number}", host.copy_us))

    # The layer that draft extend brought is judged without a pass.
    ops.append(_kernels("policy", host, POLICY_KERNELS_PER_LAYER, "policy"))
    ops.append(Read(f"{step} layer 0", host.copy_us))
    if design == "async":
        # While pass n runs, the host decides by layer n - 1 whether n + 1 follows.
        for number in range(1, tree.passes + 1 + stops_early):
            launch_pass(number, "pass" if number <= tree.passes else "surplus")
            if number < setting.envelope.passes:
                ops += [Wait(f"{step} layer {number - 1}"), Work("policy", host.layer_us)]
        return ops
    for number in range(tree.passes + 1):
        if number < tree.passes or stops_early:
            ops += [Wait(f"{step} layer {number}"), Work("policy", host.layer_us)]
        if number < tree.passes:
            launch_pass(number + 1, "pass")
    return ops


def _kernels(name: str, host: HostCosts, count: int, kind: str) -> Launch:
    """Return small kernels in a row, launched one by one."""
    return Launch(name, count * host.kernel_us, count * host.policy_kernel_us, kind, count)
