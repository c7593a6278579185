"""Memory that CAST takes beyond SGLang's own servers, on paper: from configs and flags alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from cast_sglang.serving.launch.identity import architecture, captures_decode
from cast_sglang.serving.step_room import STOCK_TREE, needs_whole_trees, step_reserve, stock_slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang.srt.server_args import ServerArgs

    from cast_sglang.config import CastConfig

__all__ = ["Item", "Reserve", "Shapes", "describe_reserve", "reserve_of", "reserve_of_server"]

INDEX_BYTES = 8  # a cache slot in a list on a device
TABLE_BYTES = 4  # a cache slot in the request pool's table
FLOAT_BYTES = 4
# Of `triton`'s decode: its partial results are kept for so many parts of a prefix (its default).
KV_SPLITS = 8


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
    overlaps: bool  # the step before may still run when the next one is prepared
    is_whole: bool  # as of `step_reserve`


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

    Counted is what follows from shapes. The memory of graphs themselves does not: a server logs it
    when it has captured them.
    """
    s, tokens = shapes, STOCK_TREE[2]
    envelope = s.num_steps, s.topk, s.num_draft_tokens
    slots = step_reserve(*envelope, overlaps=s.overlaps, is_whole=s.is_whole)
    stock = stock_slots(*STOCK_TREE)
    more_slots = max(0, slots - stock)
    more_columns = max(0, stock_slots(*envelope) - stock)
    more_rows = max(0, s.num_draft_tokens - tokens)
    nodes = s.captured_requests * s.topk if s.draft_heads else 0
    rows = s.captured_requests * s.num_draft_tokens
    items = [
        Item("slots of the cache", s.max_requests * more_slots * s.kv_bytes, is_cache=True),
        Item("table of requests", s.max_requests * more_columns * TABLE_BYTES),
        Item("states kept for plain steps", s.max_requests * s.num_draft_tokens * s.hidden_bytes),
        Item("logits of verify", s.max_requests * more_rows * s.vocab_size * FLOAT_BYTES),
        Item("mask of captured verify", rows * (s.context + s.num_draft_tokens)),
        Item("lists of captured draft layers", nodes * (s.context + s.num_steps) * INDEX_BYTES),
        Item(
            "partial results of captured draft layers",
            nodes * s.draft_heads * KV_SPLITS * (s.draft_head_dim + 1) * FLOAT_BYTES,
        ),
    ]
    taken = [item for item in items if item.size]
    return Reserve(taken, slots, stock, s.draft_kv_bytes / s.kv_bytes, s.max_requests)


def reserve_of_server(server_args: ServerArgs, config: CastConfig) -> Reserve:
    """Return what a launch with these resolved arguments and settings takes."""
    from sglang.srt.configs.model_config import ModelConfig

    target, draft = ModelConfig.from_server_args(server_args), None
    if server_args.speculative_draft_model_path is not None:
        draft = ModelConfig.from_server_args(
            server_args,
            model_path=server_args.speculative_draft_model_path,
            model_revision=server_args.speculative_draft_model_revision,
            is_draft_model=True,
        )
    max_requests, tp_size = int(server_args.max_running_requests), server_args.tp_size
    captured = 0
    draft_kv_bytes = 0 if draft is None else _kv_bytes(draft, tp_size, server_args)
    if captures_decode(server_args):
        batch_sizes: Sequence[int] = server_args.cuda_graph_config.decode.bs or ()
        captured = min(max_requests, max(batch_sizes, default=max_requests))
    return reserve_of(
        Shapes(
            num_steps=server_args.speculative_num_steps,
            topk=server_args.speculative_eagle_topk,
            num_draft_tokens=server_args.speculative_num_draft_tokens,
            max_requests=max_requests,
            captured_requests=captured,
            context=target.context_len,
            vocab_size=target.vocab_size,
            hidden_bytes=0 if draft is None else _states(draft) * target.dtype.itemsize,
            kv_bytes=_kv_bytes(target, tp_size, server_args) + draft_kv_bytes,
            draft_kv_bytes=draft_kv_bytes,
            draft_heads=0 if draft is None else draft.num_attention_heads // tp_size,
            draft_head_dim=0 if draft is None else draft.head_dim,
            overlaps=not server_args.disable_overlap_schedule,
            is_whole=needs_whole_trees(config),
        )
    )


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


def _states(draft: Any) -> int:
    """Return the numbers per token that the target hands to the draft."""
    config = draft.hf_config
    eagle = getattr(config, "eagle_config", None) or {}
    width = getattr(config, "target_hidden_size", None) or draft.hidden_size
    if "eagle3" not in architecture(config).lower() or not eagle.get("use_aux_hidden_state", True):
        return int(width)  # the last layer's
    name = "eagle_aux_hidden_state_layer_ids"
    layers = getattr(config, name, None) or eagle.get(name)
    return int(width) * (len(layers) if layers else 3)


def _kv_bytes(model: Any, tp_size: int, server_args: ServerArgs) -> int:
    """Return the bytes of keys and values that a token takes on one GPU."""
    import torch

    name = server_args.kv_cache_dtype
    named = {"fp8_e5m2": torch.float8_e5m2, "fp8_e4m3": torch.float8_e4m3fn}
    size = named.get(name, torch.bfloat16 if name in ("bf16", "bfloat16") else model.dtype).itemsize
    per_layer = model.get_num_kv_heads(tp_size) * (model.head_dim + model.v_head_dim)
    return int(model.num_hidden_layers * per_layer * size)
