"""Chances of copies: the first guess, what is learned, and that nothing depends on its order."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cast_sglang.copying.chances import (
    AGREEMENTS,
    CLASSES_OF_KIND,
    EVIDENCE,
    Chances,
    class_of,
)
from cast_sglang.policy.acceptance import PRIOR_WEIGHT


def learn(chances, kind, num_followed, num_copies):
    followed = np.arange(num_copies) < num_followed
    chances.update(np.full(num_copies, kind), followed)


def test_classes_are_octaves_of_length_by_evidence_by_what_the_draft_says():
    kinds = [class_of(length, 1, 1, 0) for length in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 9999)]
    assert [kind // 12 for kind in kinds] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert [class_of(1, *seen, 0) // 4 for seen in ((1, 1), (2, 2), (9, 9), (2, 1))] == [0, 1, 1, 2]
    assert [class_of(1, 1, 1, place) for place in range(len(AGREEMENTS))] == [0, 1, 2, 3]
    assert CLASSES_OF_KIND == 7 * len(EVIDENCE) * len(AGREEMENTS)
    assert len(Chances().table()) == 2 * CLASSES_OF_KIND


def test_without_data_the_share_of_a_token_in_its_context_decides():
    table = Chances().table()
    for length in (1, 40):
        for seen, guess in (((1, 1), 1 / 2), ((2, 2), 2 / 3), ((2, 1), 1 / 3)):
            for agreement in range(4):
                assert table[class_of(length, *seen, agreement)] == pytest.approx(guess)


def test_a_class_learns_its_own_chance_and_lends_it_to_those_without_data():
    chances = Chances()
    known = class_of(4, 1, 1, 0)
    learn(chances, known, 900, 1000)
    table = chances.table()
    assert table[known] == pytest.approx(0.9, abs=0.01)
    # What the draft says otherwise of such a copy, and longer contexts, go by it.
    assert table[class_of(4, 1, 1, 2)] == pytest.approx(0.9, abs=0.01)
    assert table[class_of(32, 1, 1, 1)] == pytest.approx(0.9, abs=0.01)
    # Shorter contexts and other evidence know nothing of it.
    assert table[class_of(2, 1, 1, 0)] == pytest.approx(1 / 2)
    assert table[class_of(4, 2, 2, 0)] == pytest.approx(2 / 3)
    learn(chances, class_of(4, 1, 1, 2), 0, 100)
    assert chances.table()[class_of(4, 1, 1, 2)] < 0.05 < 0.8 < chances.table()[known]
    # Nor do requests that sample, of which the target says the likeliest token less often.
    assert chances.table()[CLASSES_OF_KIND + known] == pytest.approx(1 / 2)


def test_first_guesses_weigh_as_much_as_some_copies():
    chances = Chances()
    learn(chances, class_of(1, 1, 1, 0), 3, 3)
    above = (3 + PRIOR_WEIGHT / 2) / (3 + PRIOR_WEIGHT)
    expected = (3 + PRIOR_WEIGHT * above) / (3 + PRIOR_WEIGHT)
    assert chances.table()[0] == pytest.approx(expected)


def test_old_copies_count_less():
    chances = Chances()
    learn(chances, 0, 100, 100)
    for _ in range(3000):
        learn(chances, 0, 0, 1)
    assert chances.table()[0] < 0.01
    [row] = chances.classes()
    assert row[:4] == (1, "once", "likeliest", False)
    assert row.followed < 0.1 < row.num_copies < 400
    chances.update(np.empty(0, np.int64), np.empty(0, bool))
    assert chances.classes() == [row]


@given(st.lists(st.tuples(st.integers(0, 2 * CLASSES_OF_KIND - 1), st.booleans()), max_size=60))
def test_chances_are_chances(copies):
    chances = Chances()
    for kind, followed in copies:
        chances.update(np.array([kind]), np.array([followed]))
    table = chances.table()
    assert ((table > 0.0) & (table < 1.0)).all()
    assert sum(row.num_copies for row in chances.classes()) <= len(copies)


def test_another_object_goes_on_from_what_was_learned():
    first, second = Chances(), Chances()
    learn(first, class_of(4, 1, 1, 0), 90, 100)
    second.table()  # must not be kept
    second.load_state(json.loads(json.dumps(first.state())))
    np.testing.assert_array_equal(second.table(), first.table())
    assert second.classes() == first.classes()
    for chances in (first, second):
        learn(chances, class_of(4, 1, 1, 0), 0, 10)
    np.testing.assert_array_equal(second.table(), first.table())


def test_a_damaged_state_is_refused_and_changes_nothing():
    chances = Chances()
    learn(chances, 0, 5, 9)
    before, state = chances.table().copy(), chances.state()
    more = np.array(state["copies"]) + 1.0
    for damaged in (
        None,
        {},
        {"copies": 1, "followed": 2},
        {"copies": [1.0], "followed": [0.5]},
        {"copies": "many", "followed": "few"},
        state | {"followed": more.tolist()},
        state | {"copies": (more * np.nan).tolist()},
        state | {"copies": (-more).tolist()},
    ):
        with pytest.raises(ValueError, match="state of copies"):
            chances.load_state(damaged)
    np.testing.assert_array_equal(chances.table(), before)
