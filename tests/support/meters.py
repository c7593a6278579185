"""A meter without an engine, for runs of profiling."""

from cast_sglang.costs.limits import Limits


class FlatMeter:
    """A small device whose passes take the same time whatever their shape."""

    seconds = 1e-3

    def limits(self):
        return Limits(max_batch_size=2, max_context=130, max_verify_rows=2, max_width=2)

    def verify(self, batch_size, context, rows):
        return self.seconds

    draft = draft_extend = verify

    def step_overhead(self, batch_size):
        return None


class BrokenMeter(FlatMeter):
    """A device whose clock stands still."""

    seconds = 0.0
