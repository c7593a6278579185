"""Captured graphs without a device: what was captured is run again, and its memory used again."""

import contextlib
import dataclasses

import torch

# Static buffers that a step fills once and several replays read.
KEPT = {"path_slots", "seq_lens", "req_pool_indices", "depth"}
# What is left in the others; a number, as padded requests read it.
OLD = 7.0


class RecordedGraphs:
    """SGLang's graph backend: keeps what it is given and runs it again.

    What a replay has returned is overwritten by the next one, as all graphs share their memory.

    Attributes:
        log: one entry for each capture and replay, with the batch size and the label of the graph.
    """

    def __init__(self):
        self.log = []
        self._graphs = {}
        self._outputs = ()

    def capture_one(self, key, forward, **kwargs):
        self.log.append(("capture", key.size, key.variant_label))
        forward()
        self._graphs[key] = forward

    def replay(self, key, batch):
        self.log.append(("replay", key.size, key.variant_label))
        outputs = tuple(part.clone() for part in self._graphs[key]())
        for part in self._outputs:
            part.fill_(-1)
        self._outputs = outputs
        return outputs


class RecordedRunnerGraphs:
    """The same for SGLang's own graph runners and `LayerGraphs`, as the class of a platform.

    After a replay the static buffers that it has read hold nothing of it, so that one which the
    next step forgets to fill is noticed. All graphs of the process share the memory of their
    outputs.

    Args:
        runner: SGLang's graph runner, or `LayerGraphs`.
    """

    outputs: list[torch.Tensor] = []

    def __init__(self, runner, enable_memory_saver=False):
        self.runner, self._graphs = runner, {}

    @contextlib.contextmanager
    def capture_session(self, stream):
        yield

    @contextlib.contextmanager
    def replay_session(self):
        yield

    def capture_one(self, key, forward, capture_inputs=None, post_warmup_hook=None):
        from sglang.srt.model_executor.forward_context import (
            forward_context,
            get_forward_context,
            has_forward_context,
        )

        def run():
            return forward()

        if has_forward_context():  # what the captured code asked for is a graph's for good
            context = get_forward_context()

            def run():
                with forward_context(context):
                    return forward()

        self._graphs[key] = run, self._layout()

    def _layout(self):
        """Return what its backends have laid out, which a graph holds and replays do not change."""
        backend = getattr(self.runner, "attn_backend", None)
        backend = getattr(backend, "backend", backend)
        names = ("forward_metadata", "forward_metadata_spec_decode_expand")
        # Of a model with linear attention there are two.
        return [
            (part, name, getattr(part, name))
            for part in getattr(backend, "attn_backend_list", None) or [backend]
            for name in names
            if hasattr(part, name)
        ]

    def can_run(self, batch, key):
        return key in self._graphs

    def replay(self, key, batch):
        forward, layout = self._graphs[key]
        before = self._layout()
        for part in layout:
            setattr(*part)
        result = forward()
        for part in before:
            setattr(*part)
        for part in self.outputs:
            part.fill_(-1)
        self.outputs.clear()
        copied = _copied(result, self.outputs)
        self._empty_inputs()
        return copied

    def cleanup(self):
        self._graphs.clear()

    def _empty_inputs(self):
        """Empty the static inputs; the slots and places that are left are valid, and wrong."""
        buffers = getattr(self.runner, "buffers", self.runner)
        for name, value in vars(buffers).items():
            if isinstance(value, torch.Tensor) and not name.endswith("_buffer"):
                if buffers is self.runner and name in KEPT:
                    continue
                value.fill_(OLD if value.is_floating_point() else 0)
        backend = getattr(self.runner, "attn_backend", None)
        for name in ("cuda_graph_kv_indices", "cuda_graph_custom_mask", "verify_mask"):
            value = getattr(backend, name, None)
            for part in value if isinstance(value, list) else [value]:
                if part is not None:
                    getattr(part, "buffer", part).fill_(0)


def _copied(result, outputs):
    """Return a copy of what a graph has returned, and note the tensors of the copy."""
    if isinstance(result, torch.Tensor):
        outputs.append(result.clone())
        return outputs[-1]
    if isinstance(result, tuple):
        return tuple(_copied(part, outputs) for part in result)
    parts = {
        field.name: _copied(getattr(result, field.name), outputs)
        for field in dataclasses.fields(result)
        if isinstance(getattr(result, field.name), torch.Tensor)
    }
    return dataclasses.replace(result, **parts)
