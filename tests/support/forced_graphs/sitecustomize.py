"""Gives a server's decider the sizes of captured graphs, on a device that captures none.

Python imports this module at the start of every process that has its directory in PYTHONPATH. The
decider is changed when the server imports it.
"""

import importlib.abc
import importlib.util
import sys

DECIDER = "cast_sglang.policy.decider"
VERIFY = {1: (3, 6, 12, 32), 4: (2, 5, 9, 17)}
WIDTHS = {1: (2, 5, 8), 4: (3, 8)}


class _AtImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != DECIDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _force(module.Decider)

        spec.loader.exec_module = exec_module
        return spec


def _force(decider: type) -> None:
    from cast_sglang.costs.graph_sizes import GraphSizes

    init = decider.__init__

    def __init__(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.verify_graphs, self.width_graphs = GraphSizes(VERIFY), GraphSizes(WIDTHS)

    decider.__init__ = __init__


sys.meta_path.insert(0, _AtImport())
