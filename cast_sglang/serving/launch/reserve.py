"""Memory that CAST takes beyond SGLang's own servers, on paper: from configs and flags alone.

And the envelope that can pay by the profile and fits.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, NamedTuple

from cast_sglang.costs.model import CostModel
from cast_sglang.serving.launch.arguments import verify_sizes
from cast_sglang.serving.launch.backends import VERIFY_BACKENDS, verify_backend
from cast_sglang.serving.launch.cost_profile import find_server_profile
from cast_sglang.serving.launch.graph_plan import choose_sizes, most_rows
from cast_sglang.serving.launch.identity import captures_decode
from cast_sglang.serving.launch.model_bytes import (
    kv_bytes,
    kv_splits,
    num_layers,
    states,
    value_dim,
)
from cast_sglang.serving.launch.target import draft_config
from cast_sglang.serving.step_room import (
    STOCK_TREE,
    Envelope,
    deepest_copy,
    needs_whole_trees,
    step_reserve,
    stock_slots,
)

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

    from cast_sglang.config import CastConfig
    from cast_sglang.costs.profiles import FoundProfile
    from cast_sglang.costs.schema import HostIdentity

__all__ = [
    "Captured",
    "Item",
    "Launch",
    "Reserve",
    "Shapes",
    "describe_reserve",
    "read_launch",
    "reserve_of",
    "reserve_of_server",
    "shrink_envelope",
]

INDEX_BYTES = 8  # a cache slot in a list on a device
TABLE_BYTES = 4  # a cache slot in the request pool's table
FLOAT_BYTES = 4
# A captured graph beside torch's memory: what SGLang counts for those of prefill
# (`reserve_for_graph_mb`).
GRAPH_BYTES = 8 << 20
TRTLLM_REQUESTS = 8192  # `trtllm_mha` counts parts of so many prefixes (TRTLLM_MLA_MAX_BATCH_SIZE)
# A wrapper of `flashinfer`: its plan, and its list of lengths. And what SGLang keeps there for each
# token of the longest context, before each row: its slot, and a byte of the mask.
PLAN_BYTES, PREFIX_BYTES = (8 << 20) + 32768 * 4, 5
# SGLang leaves memory for activations and its own graphs; CAST takes no more than half of it.
ROOM_SHARE = 0.5


class Captured(NamedTuple):
    """What is captured beyond a server of SGLang's default tree, whose graphs share one pool."""

    num_graphs: float = 0.0  # in those of the target; one of the draft counts by its layers
    held_rows: int = 0  # of all graphs, whose states stay in the pool as their outputs
    own_rows: tuple[int, ...] = ()  # rows per request of the objects that share tables with another
    num_plans: int = 0  # of `flashinfer`, each with a wrapper of its own
    most_rows: int = 0  # that can pay at any of the batch sizes


class Shapes(NamedTuple):
    """What decides how much is taken; of one GPU where there are several."""

    num_steps: int
    topk: int
    num_draft_tokens: int
    max_requests: int
    captured_requests: int  # the largest batch with graphs; 0 where nothing is captured
    context: int  # tokens of one request
    vocab_size: int
    hidden_bytes: int  # of the target's states that the draft reads, per token
    kv_bytes: int  # of target and draft, per token
    draft_kv_bytes: int  # the draft's part of it
    draft_heads: int  # 0 without a draft model
    draft_head_dim: int
    draft_kv_splits: int
    overlaps: bool  # the step before may still run when the next one is prepared
    is_whole: bool  # as of `step_reserve`
    captured: Captured = Captured()
    activation_bytes: int = 0  # of one row inside of a target's layer, at most
    copy_depth: int = 0  # as of `Envelope`
    backend: str = "triton"  # of verify
    heads: int = 0  # of the target, of all ranks


class Item(NamedTuple):
    """One part of what is taken."""

    name: str
    size: int  # bytes
    is_cache: bool = False  # slots of the cache, which no other request can have meanwhile


class Reserve(NamedTuple):
    """What CAST takes; sizes in bytes."""

    items: list[Item]
    slots: int  # of the cache, reserved for each running request
    stock_slots: int  # what a request reserves with SGLang's default tree
    draft_share: float  # of a slot's bytes that hold the draft's keys and values
    max_requests: int

    @property
    def total(self) -> int:
        """Bytes on the device beside the cache."""
        return sum(item.size for item in self.items if not item.is_cache)


def reserve_of(shapes: Shapes) -> Reserve:
    """Return what a server of these shapes takes beyond one of SGLang's default tree.

    What graphs take is a bound. They share one pool, in which activations of the largest pass have
    room for those of all others, and their outputs stay. A server logs what it took.
    """
    s, tokens = shapes, STOCK_TREE[2]
    envelope = s.num_steps, s.topk, s.num_draft_tokens
    slots = step_reserve(
        *envelope, copy_depth=s.copy_depth, overlaps=s.overlaps, is_whole=s.is_whole
    )
    stock = stock_slots(*STOCK_TREE)
    more_slots = max(0, slots - stock)
    more_columns = max(0, stock_slots(*envelope) - stock)
    more_rows = max(0, s.num_draft_tokens - tokens)
    nodes = s.captured_requests * s.topk if s.draft_heads else 0
    rows = s.captured_requests * s.num_draft_tokens
    longest = s.context + slots  # what a step may write past the limit
    kind = VERIFY_BACKENDS[s.backend].rows if s.captured_requests else None
    plain = s.captured_requests if kind == "any" else 0  # others decode by what verify has too
    masked = rows if s.backend in ("triton", "fa3") else 0
    wide = s.captured_requests * more_rows if kind == "batch" else 0
    items = [
        Item("slots of the cache", s.max_requests * more_slots * s.kv_bytes, is_cache=True),
        Item("table of requests", s.max_requests * more_columns * TABLE_BYTES),
        Item("states kept for plain steps", s.max_requests * s.num_draft_tokens * s.hidden_bytes),
        Item("logits of verify", s.max_requests * more_rows * s.vocab_size * FLOAT_BYTES),
        Item("mask of captured verify", masked * (longest + s.num_draft_tokens)),
        Item("lists and mask of captured verify", wide * s.context * PREFIX_BYTES),
        Item("lists of captured draft layers", nodes * longest * INDEX_BYTES),
        Item(
            "partial results of captured draft layers",
            nodes * s.draft_heads * s.draft_kv_splits * (s.draft_head_dim + 1) * FLOAT_BYTES,
        ),
        Item("lists of captured plain steps", plain * longest * INDEX_BYTES),
        Item(
            "backends of captured verify by rows",
            sum(OWN_BYTES[s.backend](s, rows, longest) for rows in s.captured.own_rows),
        ),
        Item("plans of captured verify", s.captured.num_plans * PLAN_BYTES),
        Item("activations in graphs", s.captured_requests * more_rows * s.activation_bytes),
        Item("states in graphs", s.captured.held_rows * s.hidden_bytes),
        Item("graphs", int(s.captured.num_graphs * GRAPH_BYTES)),
    ]
    taken = [item for item in items if item.size]
    return Reserve(taken, slots, stock, s.draft_kv_bytes / s.kv_bytes, s.max_requests)


def _fa3_bytes(shapes: Shapes, rows: int, longest: int) -> int:
    """Return what an object of `fa3` keeps of its own for graphs of so many rows, at most.

    Three lists of the places of pages, the rows' table of one another, and ends of sequences.
    """
    per_request = rows * rows + 3 * rows + 3 * shapes.topk + 24
    return 3 * longest * INDEX_BYTES + shapes.captured_requests * per_request * TABLE_BYTES


def _trtllm_bytes(shapes: Shapes, rows: int, longest: int) -> int:
    """Return what an object of `trtllm_mha` keeps of its own for graphs of so many rows, at most.

    Counters of the parts of each head's prefix, the rows' mask of one another on Hopper, ends of
    sequences and, where layers have a window, the rows' slots.
    """
    requests, captured = shapes.max_requests + 1, shapes.captured_requests
    counters = max(TRTLLM_REQUESTS, requests * rows) * shapes.heads
    mask = requests * rows * -(-rows // 32)
    ends = 6 * (requests + 1) + 12 * (captured + 1)
    return (counters + mask + ends) * TABLE_BYTES + captured * rows * INDEX_BYTES


# Of the backends of which each number of rows has an object; tables of slots and the mask are
# shared (`host_patches.passes.sharing_buffers`).
OWN_BYTES = {"fa3": _fa3_bytes, "trtllm_mha": _trtllm_bytes}


class Launch(NamedTuple):
    """What a launch has read of its models and its profile."""

    target: ModelConfig
    draft: ModelConfig | None
    found: FoundProfile | None


def read_launch(
    server_args: ServerArgs, config: CastConfig, target: ModelConfig, identity: HostIdentity
) -> Launch:
    """Read what memory depends on, once for all envelopes that are looked at.

    Args:
        target: config of the target.
        identity: of the server, by which its profile is found.
    """
    has_draft = server_args.speculative_draft_model_path is not None
    draft = draft_config(server_args) if has_draft else None
    return Launch(target, draft, find_server_profile(config, server_args, identity))


def reserve_of_server(server_args: ServerArgs, config: CastConfig, launch: Launch) -> Reserve:
    """Return what a launch with these resolved arguments and settings takes."""
    return reserve_of(_shapes_of_server(server_args, config, launch))


def shrink_envelope(server_args: ServerArgs, config: CastConfig, launch: Launch) -> str | None:
    """Verify no more rows than can pay at any batch size, and draft and verify what fits.

    A policy that promises a shape keeps it, and so do sizes that were asked for. Before there is a
    profile, every size may pay. No tree gets smaller than SGLang's default one for want of memory.

    Returns:
        What to say of it; None where nothing has changed.
    """
    is_asked_for = needs_whole_trees(config) or config.verify_sizes is not None
    if is_asked_for or not captures_decode(server_args):
        return None
    before, reasons = _envelope(server_args), ""
    most = max(2, _shapes_of_server(server_args, config, launch).captured.most_rows)
    if most < before[2]:
        server_args.speculative_num_draft_tokens = most
        reasons = "; by the profile no more rows can pay at any batch size"
    room = _room(server_args)
    if reserve_of_server(server_args, config, launch).total > room:
        _shrink_to(room, server_args, config, launch)
        reasons += f"; CAST may take half of what --mem-fraction-static leaves, {_gib(room)}"
    after = _envelope(server_args)
    if after == before:
        return None
    shapes = ["-".join(map(str, shape)) for shape in (before, after)]
    return f"the envelope shrinks from {shapes[0]} to {shapes[1]}{reasons}"


def _envelope(server_args: ServerArgs) -> tuple[int, int, int]:
    steps, topk = server_args.speculative_num_steps, server_args.speculative_eagle_topk
    return steps, topk, server_args.speculative_num_draft_tokens


def _shrink_to(room: int, server_args: ServerArgs, config: CastConfig, launch: Launch) -> None:
    """Take rows off the envelope, then width, until it fits, or is SGLang's default tree."""
    for name, least in zip(
        ("speculative_num_draft_tokens", "speculative_eagle_topk"), STOCK_TREE[:0:-1], strict=True
    ):
        while getattr(server_args, name) > least:
            if reserve_of_server(server_args, config, launch).total <= room:
                return
            setattr(server_args, name, getattr(server_args, name) - 1)


def _room(server_args: ServerArgs) -> int:
    """Return the bytes that CAST may take beside weights and cache."""
    from sglang.srt.utils.common import get_device_memory_capacity

    capacity = get_device_memory_capacity(server_args.device)
    fraction = server_args.mem_fraction_static
    if capacity is None or fraction is None:
        return sys.maxsize
    return int(ROOM_SHARE * (1.0 - fraction) * capacity * 2**20)


def _shapes_of_server(server_args: ServerArgs, config: CastConfig, launch: Launch) -> Shapes:
    target, draft, _ = launch
    max_requests, tp_size = int(server_args.max_running_requests), server_args.tp_size
    batch_sizes: list[int] = []
    if captures_decode(server_args):
        given = server_args.cuda_graph_config.decode.bs or ()
        batch_sizes = sorted({size for size in given if size <= max_requests} or {max_requests})
    draft_kv_bytes = 0 if draft is None else kv_bytes(draft, tp_size, server_args)
    text = target.hf_text_config
    inner = getattr(text, "intermediate_size", 0) or 0
    experts = getattr(text, "num_experts_per_tok", 0) or 0
    inner = max(inner, experts * (getattr(text, "moe_intermediate_size", 0) or 0))
    return Shapes(
        num_steps=server_args.speculative_num_steps,
        topk=server_args.speculative_eagle_topk,
        num_draft_tokens=server_args.speculative_num_draft_tokens,
        max_requests=max_requests,
        captured_requests=max(batch_sizes, default=0),
        context=target.context_len,
        vocab_size=target.vocab_size,
        hidden_bytes=0 if draft is None else states(draft) * target.dtype.itemsize,
        kv_bytes=kv_bytes(target, tp_size, server_args) + draft_kv_bytes,
        draft_kv_bytes=draft_kv_bytes,
        draft_heads=0 if draft is None else draft.num_attention_heads // tp_size,
        draft_head_dim=0 if draft is None else value_dim(draft),
        draft_kv_splits=0 if draft is None else kv_splits(draft),
        overlaps=not server_args.disable_overlap_schedule,
        is_whole=needs_whole_trees(config),
        copy_depth=deepest_copy(
            config, draft is not None, server_args.speculative_num_draft_tokens
        ),
        captured=_captured(server_args, config, batch_sizes, launch),
        backend=verify_backend(server_args),
        heads=target.num_attention_heads,
        # The residual, its norm, queries or attention and the layer's output; of the two parts of
        # its middle, and their product, each rank has a share.
        activation_bytes=(4 * target.hidden_size + 3 * inner // tp_size) * target.dtype.itemsize,
    )


def _captured(
    server_args: ServerArgs, config: CastConfig, batch_sizes: list[int], launch: Launch
) -> Captured:
    """Return what is captured at these batch sizes, by the profile of the launch or without one."""
    target, draft, found = launch
    envelope = _envelope(server_args)
    rows = envelope[2]
    if not batch_sizes:
        return Captured(most_rows=rows)
    max_requests = int(server_args.max_running_requests)
    copy_depth = deepest_copy(config, draft is not None, rows)
    limits = Envelope(*envelope, copy_depth=copy_depth).limits(max_requests, target.context_len)
    if draft is None:
        limits = dataclasses.replace(limits, max_width=0, max_extend_rows=0)
    most = rows
    model: CostModel | None = None
    if found is not None:
        model = CostModel(found.profile, limits, lookup=config.lookup)
        most = max(most_rows(model, limits, config, size) for size in (1, *batch_sizes))
    plan = choose_sizes(batch_sizes, limits, config, verify_sizes(config, rows), model)
    kind = VERIFY_BACKENDS[verify_backend(server_args)]
    held, num_plans, graphs = 0, 0, 0.0
    for size in batch_sizes:
        # One row of plain steps, and what SGLang has captured before, unless that is done anew.
        of_verify = {1, *plan.verify.at(size), *(() if kind.rows == "each" else (rows,))}
        held += size * (sum(of_verify) - STOCK_TREE[2])
        graphs += len(of_verify) - 1
        num_plans += len(of_verify) - 1 if kind.rows == "batch" else 0
        if draft is not None:
            widths = plan.widths.at(size) if plan.widths and config.graphs == "all" else ()
            share = num_layers(draft) / target.num_hidden_layers
            graphs += (len(widths) + len(plan.extend.at(size)) - 2) * share
    own = {1, *plan.verify.sizes} - {rows} if kind.rows == "each" else set()
    return Captured(max(0.0, graphs), max(0, held), tuple(sorted(own)), num_plans, most)


def describe_reserve(reserve: Reserve) -> str:
    """Return one line for people: what speculation takes of the cache, and what CAST takes."""
    parts = ", ".join(f"{item.name} {_gib(item.size)}" for item in reserve.items)
    tree = "-".join(map(str, STOCK_TREE))
    return (
        f"each of at most {reserve.max_requests} requests reserves {reserve.slots} slots of the "
        f"cache ({reserve.stock_slots} with SGLang's default tree {tree}, plain decoding 1), and "
        f"the draft takes {reserve.draft_share:.0%} of a slot, as it does there; beyond that tree "
        f"CAST takes {_gib(reserve.total)} beside the cache: {parts}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
