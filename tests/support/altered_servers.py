"""Servers that do on the CPU what SGLang or CAST does on a GPU alone.

Each changes what SGLang has imported, in a process of its own, and then serves.
"""

from collections.abc import Sequence

from tests.support.preloaded import PreloadedServer, serve

VERIFY_GRAPHS = {1: (3, 6, 12, 32), 4: (2, 5, 9, 17)}
WIDTH_GRAPHS = {1: (2, 5, 8), 4: (3, 8)}


class GraphSizesServer(PreloadedServer):
    """Its decider chooses among sizes as if graphs had been captured."""

    @staticmethod
    def program(argv: Sequence[str]) -> None:
        from cast_sglang.costs.graph_sizes import GraphSizes
        from cast_sglang.policy.decider import Decider

        init = Decider.__init__

        def __init__(self, *args, **kwargs):
            init(self, *args, **kwargs)
            self.verify_graphs, self.width_graphs = (
                GraphSizes(VERIFY_GRAPHS),
                GraphSizes(WIDTH_GRAPHS),
            )

        Decider.__init__ = __init__
        serve(argv)


class SeededServer(PreloadedServer):
    """It takes --enable-deterministic-inference, for the seeds of requests.

    Its passes are those of any server: SGLang's batch-invariant ones need a GPU. In float32 they
    differ by rounding alone, which hardly ever changes a token.
    """

    @staticmethod
    def program(argv: Sequence[str]) -> None:
        from sglang.srt import batch_invariant_ops
        from sglang.srt.arg_groups import choices

        from cast_sglang.cpu.names import ATTENTION_BACKEND

        choices.add_deterministic_attention_backend_choices([ATTENTION_BACKEND])
        batch_invariant_ops.enable_batch_invariant_mode = lambda: None
        serve(argv)
