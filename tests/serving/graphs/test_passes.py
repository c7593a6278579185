"""Runners of a pass at several sizes."""

import contextlib

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.serving.graphs.passes import PassGraphs


def test_runners_are_built_the_largest_first_and_each_for_its_batch_sizes():
    log = []

    @contextlib.contextmanager
    def capturing(size, batch_sizes):
        log.append(("begin", size, batch_sizes))
        yield
        log.append(("end", size))

    def build(size):
        log.append(("build", size))
        return f"runner {size}"

    graphs = PassGraphs(GraphSizes({1: (1, 4, 16), 8: (1, 2, 4, 16)}))
    graphs.capture(build, capturing, {16: "SGLang's own"})
    assert [entry[1] for entry in log if entry[0] == "build"] == [4, 2, 1]
    assert [entry[2] for entry in log if entry[0] == "begin"] == [[1, 8], [8], [1, 8]]
    assert [entry[0] for entry in log] == ["begin", "build", "end"] * 3
    assert graphs.runner(1, 16) == "SGLang's own" and graphs.runner(3, 2) == "runner 2"
    # Not captured for so few requests, for so many, and at all.
    assert graphs.runner(1, 2) is graphs.runner(9, 4) is graphs.runner(8, 3) is None
