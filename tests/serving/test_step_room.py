"""A step's tree keeps within what its requests may still get and the slots that they hold."""

import random
from types import SimpleNamespace

import pytest

from cast_sglang.config import CastConfig
from cast_sglang.serving.step_room import (
    PLAIN_RESERVE,
    STOCK_TREE,
    Envelope,
    deepest_copy,
    most_tokens,
    needs_whole_trees,
    step_reserve,
    stock_slots,
)

LAYERS, TOPK, ROWS = 8, 8, 32
FULL_RESERVE = 2 * LAYERS * TOPK


def request(left: int, slots: int = FULL_RESERVE, generated: int = 10) -> SimpleNamespace:
    return SimpleNamespace(
        sampling_params=SimpleNamespace(max_new_tokens=generated + left),
        output_ids=[0] * generated,
        kv=SimpleNamespace(kv_committed_len=100, kv_allocated_len=100 + slots),
    )


def has_drafts(room) -> bool:
    """Whether a step may draft, as `Decider.begin_step` reads it."""
    return room.max_layers > 0 and room.max_rows > 1


@pytest.mark.parametrize(("left", "layers"), [(1, 0), (2, 1), (5, 4), (9, 8), (500, 8)])
def test_no_tree_is_deeper_than_what_is_left(left, layers):
    for others in ([], [request(1)], [request(left), request(1)]):
        room = Envelope(LAYERS, TOPK, ROWS).room([request(left), *others], [], True)
        assert room.max_layers == layers
        assert has_drafts(room) == (layers > 0) and room.copy_depth == 0
        envelope = Envelope(LAYERS, TOPK, ROWS, copy_depth=ROWS - 1)
        copying = envelope.room([request(left), *others], [], True)
        assert copying == room._replace(copy_depth=min(left, ROWS) - 1)


def test_a_path_of_copies_is_as_long_as_the_rows():
    on, off = CastConfig(copying="on"), CastConfig()
    assert deepest_copy(on, True, ROWS) == deepest_copy(off, False, ROWS) == ROWS - 1
    for config in (off, CastConfig(copying="on", policy="fixed"), CastConfig(copying="off")):
        assert deepest_copy(config, True, ROWS) == 0
    envelope = Envelope(LAYERS, TOPK, ROWS, copy_depth=ROWS - 1)
    assert envelope.limits(4, 1024).max_extend_rows == ROWS
    assert Envelope(LAYERS, TOPK, ROWS).limits(4, 1024).max_extend_rows == LAYERS + 1


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("slots", range(1, FULL_RESERVE + 1))
def test_a_lone_request_keeps_within_its_slots(slots, is_whole):
    room = Envelope(LAYERS, TOPK, ROWS, is_whole=is_whole).room([request(500, slots)], [], True)
    if has_drafts(room):
        assert room.max_nodes <= slots
        if is_whole:
            assert (room.max_layers - 1) * TOPK <= room.max_nodes
        # Every verified row may be accepted, and the step after needs a slot for its root.
        assert room.max_rows < slots
    assert has_drafts(room) == (slots > PLAIN_RESERVE)


def test_requests_that_share_a_batch_have_the_whole_envelope():
    envelope = Envelope(LAYERS, TOPK, ROWS, is_whole=True)
    room = envelope.room([request(500, 3), request(500, 3)], [], True)
    assert room == (LAYERS, ROWS, (LAYERS - 1) * TOPK, 0)


@pytest.mark.parametrize(
    ("layers", "topk", "rows"), [(8, 8, 32), (8, 8, 64), (8, 8, 39), (5, 4, 8), (3, 1, 4)]
)
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("copies", [False, True])
def test_trees_of_a_batch_keep_within_its_reserve(layers, topk, rows, overlaps, copies):
    copy_depth = (rows - 1) * copies
    envelope = Envelope(layers, topk, rows, copy_depth=copy_depth, overlaps=overlaps)
    assert envelope.reserve <= max(rows + 1, stock_slots(*STOCK_TREE))
    # A step keeps within its reserve, whatever the one before it has brought.
    most = min(most_tokens(max(layers, copy_depth), rows), envelope.reserve - PLAIN_RESERVE - 1)
    for tokens in range(most + 1 if overlaps else 1):
        pending = [tokens] if tokens else []
        room = envelope.room([request(500)] * 2, pending, True)
        # One slot is left for the step after.
        assert has_drafts(room) and room.max_rows + tokens < envelope.reserve
        assert room.max_nodes + tokens <= envelope.reserve
    # Most of the envelope is there even behind the deepest step.
    assert room.max_rows >= rows - most_tokens(max(layers, copy_depth), rows)


def test_a_policy_that_promises_a_shape_gets_it():
    assert not needs_whole_trees(CastConfig())
    assert needs_whole_trees(CastConfig(trace="t.jsonl", trace_full=True))
    assert needs_whole_trees(CastConfig(policy="eagle"))


@pytest.mark.parametrize("copy_depth", [0, ROWS - 1])
@pytest.mark.parametrize("seed", range(20))
def test_the_end_is_seen_although_requests_are_looked_at_seldom(seed, copy_depth):
    """The room is what a look in each step would find, whatever the steps brought."""
    rng, deepest = random.Random(seed), max(LAYERS, copy_depth)
    envelope = Envelope(LAYERS, TOPK, ROWS, copy_depth=copy_depth)
    reqs = [request(rng.randint(1, 80)) for _ in range(3)]
    pending: list[int] = []  # tokens of a step that the requests do not show yet
    is_new = True
    while True:
        left = max(r.sampling_params.max_new_tokens - len(r.output_ids) for r in reqs)
        truly_left = left - sum(pending)
        if truly_left < 1:
            return
        most = [deepest + 1] * len(pending)
        room = envelope.room(reqs, most, is_new)
        # It is known of a step that is pending only that it brought one token at least.
        assert room.max_layers == min(LAYERS, left - len(pending) - 1)
        assert room.copy_depth == min(copy_depth, left - len(pending) - 1)
        brought = rng.randint(1, max(room.max_layers, room.copy_depth) + 1)
        for tokens in pending:
            for r in reqs:
                r.output_ids += [0] * tokens
        pending = [min(brought, truly_left)] if rng.random() < 0.5 else []
        if not pending:
            for r in reqs:
                r.output_ids += [0] * brought
        is_new = False


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize(
    ("layers", "topk", "rows"), [(8, 8, 32), (8, 8, 80), (1, 2, 2), (2, 4, 5), (5, 4, 8), (3, 1, 9)]
)
def test_a_reserve_holds_the_whole_envelope_and_no_more(layers, topk, rows, overlaps):
    reserve = step_reserve(layers, topk, rows, overlaps=overlaps, is_whole=True)
    envelope = Envelope(layers, topk, rows, overlaps=overlaps, is_whole=True)
    assert envelope.reserve == reserve
    # What the step before may have brought, if it still runs.
    pending = [most_tokens(layers, rows)] if overlaps else []

    def room(slots):
        return envelope.room([request(500, slots)], pending, True)

    assert room(reserve) == envelope.whole
    assert room(reserve - 1) != envelope.whole
