"""Records of a trace: exact arrays, parents, and the candidates that the text goes on with."""

import numpy as np

from cast_sglang.trace.records import Continuation, packed, tables_digest, unpacked
from cast_sglang.tree import parents_of
from tests.support.builders import make_profile, make_table
from tests.support.traces import SETTINGS, make_header


def test_arrays_are_exact():
    values = np.random.default_rng(0).random(100).astype(np.float32)
    assert (unpacked(packed(values, "float32"), "float32") == values).all()
    # Floats of double precision come back as the nearest of single precision.
    assert unpacked(packed(values.astype(float), "float32"), "float32").dtype == np.float32


def test_digests_are_those_of_earlier_releases():
    """A trace names its tables by their digest, tables that nothing reads any more included."""
    plain = make_table(base_us=900.0, token_counts=(1,))
    old = "299ad496e82fe5afe2eaa04a2e4490fbc03afecc74bcd1b52022778c9606b391"
    assert tables_digest(make_profile(plain=plain)) == old
    without = "b81b210b3b0aa4db0acd8ace968540ab10fd43ac935e2fa0dc3fe7b34dfedc99"
    assert tables_digest(make_profile()) == without


def test_policies_have_their_present_names():
    assert make_header(None).policy == "auto"
    renamed = make_header(None, settings={**SETTINGS, "policy": "optimal"})
    assert renamed.policy == "full-width"


def test_parents():
    assert parents_of(np.array([1, 0, 5]), 2).tolist() == [-1, -1, 1, 1, 0, 0, 5, 5]


class TestContinuation:
    """Candidates 0, 1 below the root; 2, 3 below candidate 1; 4, 5 below candidate 0."""

    def path(self):
        tokens = np.array([10, 11, 20, 21, 30, 31])
        return Continuation(tokens, parents_of(np.array([1, 0]), 2))

    def test_follows_the_text_over_several_steps(self):
        path = self.path()
        path.go_on([11])
        assert path.follows == [1] and not path.is_closed
        path.go_on([21, 99])
        assert path.follows == [1, 3] and path.is_closed and not path.is_open

    def test_goes_on_along_copies(self):
        """Candidates 6 and 7 were copied below candidate 5, one below the other."""
        path = Continuation(
            np.array([10, 11, 20, 21, 30, 31, 40, 41]), np.array([-1, -1, 1, 1, 0, 0, 5, 6])
        )
        path.go_on([10, 31])
        assert not path.is_closed
        path.go_on([40, 41, 42])
        assert path.follows == [0, 5, 6, 7] and path.is_closed and not path.is_open

    def test_leaves_the_tree(self):
        path = self.path()
        path.go_on([10, 99, 30])
        assert path.follows == [0] and path.is_closed and not path.is_open

    def test_the_text_ends_inside_the_tree(self):
        path = self.path()
        path.go_on([10])
        path.end()
        assert path.follows == [0] and path.is_open
        path.end()  # as the recorder does in every step until the trace is written
        assert path.is_open
        path.go_on([30])
        assert path.follows == [0]

    def test_an_end_below_the_tree_changes_nothing(self):
        path = self.path()
        path.go_on([11, 20])
        path.end()
        assert path.follows == [1, 2] and not path.is_open
