"""Rows that the draft lacks: every one comes back, in order, to its own request."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cast_sglang.serving.drafting.backlog import Backlog
from tests.support.copies import DEVICE, watched_copies

SLOTS, CAPACITY, HIDDEN = 6, 4, 3


def rows_of(counters: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor(counters)
    return tokens.unsqueeze(1).repeat(1, HIDDEN).float(), tokens.to(torch.int32)


@settings(max_examples=80, deadline=None)
@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "add", "take", "forget"]),
            st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True),
        ),
        max_size=40,
    )
)
def test_a_backlog_is_a_short_queue_per_request(events):
    backlog, queues = Backlog(SLOTS, CAPACITY), [[] for _ in range(SLOTS)]
    counter = 0
    for what, members in events:
        slots = np.array(members)
        missing = [queues[slot][-CAPACITY:] for slot in members]
        assert backlog.num_missing(slots) == max(map(len, missing))
        if what == "add":
            counters = list(range(counter, counter + len(members)))
            counter += len(members)
            backlog.add(slots, *rows_of(counters))
            for slot, value in zip(members, counters, strict=True):
                queues[slot].append(value)
        elif what == "forget":
            backlog.forget(slots)
        elif any(missing):
            taken = backlog.take(slots)
            width = len(taken.tokens) // len(slots)
            tokens = taken.tokens.view(-1, width)
            states = taken.hidden_states.view(-1, width, HIDDEN)
            assert width == max(map(len, missing))
            for row, expected in enumerate(missing):
                assert taken.is_missing[row] == bool(expected)
                assert taken.num_rows[row] == max(1, len(expected))
                assert tokens[row, : len(expected)].tolist() == expected
                assert (states[row, : len(expected), 0] == tokens[row, : len(expected)]).all()
        if what != "add":
            for slot in members if what == "forget" or any(missing) else []:
                queues[slot].clear()


def test_clear_drops_everything():
    backlog = Backlog(SLOTS, CAPACITY)
    backlog.add(np.array([1, 2]), *rows_of([7, 8]))
    backlog.clear()
    assert backlog.num_missing(np.arange(SLOTS)) == 0


@pytest.fixture
def empty_is_garbage():
    """Fill memory that nobody has written with what is no token and no number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("empty_is_garbage")
def test_rows_of_no_meaning_hold_tokens_that_exist():
    backlog = Backlog(SLOTS, CAPACITY)
    backlog.add(np.array([2]), *rows_of([7]))
    backlog.add(np.array([2]), *rows_of([8]))
    taken = backlog.take(np.array([0, 2]))
    assert taken.tokens.tolist() == [0, 0, 7, 8]
    assert taken.hidden_states.isfinite().all()


def test_a_backlog_on_a_device_is_kept_and_taken_without_waiting(monkeypatch):
    backlog, slots = Backlog(SLOTS, CAPACITY), np.array([4, 1])
    rows, tokens = (part.to(DEVICE) for part in rows_of([5, 6]))
    with watched_copies(monkeypatch) as spy:
        backlog.add(slots, rows, tokens)
        backlog.add(slots[:1], rows[:1], tokens[:1])
        taken = backlog.take(slots)
    assert spy.num_copies == 3 and spy.waits == []
    assert taken.hidden_states.shape == (4, HIDDEN) and taken.num_rows.tolist() == [2, 1]
