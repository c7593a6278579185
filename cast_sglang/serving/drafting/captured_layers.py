"""Draft layers as captured graphs: one graph for each batch size and width, for all depths.

The depth of a layer is in its inputs alone, as the length of its nodes' paths. So one graph serves
all layers of a width, and a tree stops after any of them without paying for the rest. Inputs stand
in buffers for K nodes of each request. The host launches their copies before it waits to learn how
many nodes are expanded, and a graph takes the first W of each request: behind the decision nothing
is left to launch but the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.model_executor.runner import ShapeKey

from cast_sglang.costs.graph_sizes import GraphSizes
from cast_sglang.errors import HostError
from cast_sglang.serving.drafting.layers import take_rows
from cast_sglang.serving.host_patches.passes import counted_capture

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from cast_sglang.serving.drafting.model import DraftModel
    from cast_sglang.tree import Frontier

__all__ = ["CapturedLayers", "LayerGraphs", "capture_layers"]


class LayerGraphs:
    """Graphs of draft layers and the buffers they read.

    Args:
        model: the draft model.
        max_layers: D, layers that a tree may have.
        sizes: widths that get a graph, for each captured batch size; K is among them.
    """

    # SGLang's graph backend reads this, `model_runner` and `device_module`.
    enable_profile_cuda_graph = False

    def __init__(self, model: DraftModel, max_layers: int, sizes: GraphSizes) -> None:
        self.sizes, self.topk = sizes, model.topk
        self._model = model
        self.model_runner = runner = model.runner
        self.device_module = torch.get_device_module(runner.device)
        max_batch, topk, depth = max(sizes.all_batch_sizes), model.topk, max_layers
        self.max_batch = max_batch
        hidden_size, hidden_dtype = model.recurrent_hidden_states()
        with torch.device(runner.device):
            self.tokens = torch.zeros((max_batch, topk), dtype=torch.int64)
            self.own_slots = torch.zeros((max_batch, topk), dtype=torch.int64)
            self.path_slots = torch.zeros((max_batch, topk, depth), dtype=torch.int64)
            self.hidden_states = torch.zeros((max_batch, topk, hidden_size), dtype=hidden_dtype)
            self.positions = torch.zeros(max_batch, dtype=torch.int64)
            self.seq_lens = torch.ones(max_batch, dtype=torch.int64)
            self.req_pool_indices = torch.zeros(max_batch, dtype=torch.int64)
            self.depth = torch.ones(1, dtype=torch.int64)
        model.attention.capture_lists(max_batch * topk)
        self._backend: Any = None

    def capture(self, backend: Any) -> None:
        """Capture every graph, the largest first, so that the others share its memory.

        Args:
            backend: SGLang's graph backend, in a capture session.
        """
        self._backend = backend
        for batch_size in reversed(self.sizes.all_batch_sizes):
            for width in reversed(self.sizes.at(batch_size)):
                backend.capture_one(_key(batch_size, width), self._layer(batch_size, width))

    def _layer(self, batch_size: int, width: int) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Return the layer to capture: everything from the buffers to the best children."""
        model = self._model
        forward_batch = self._static_batch(batch_size, width)

        def run_once() -> tuple[torch.Tensor, ...]:
            def first(x: torch.Tensor) -> torch.Tensor:
                return x[:batch_size, :width].flatten(0, 1)

            forward_batch.input_ids = first(self.tokens)
            forward_batch.out_cache_loc = first(self.own_slots)
            positions = self.positions[:batch_size].unsqueeze(1)
            forward_batch.positions = positions.expand(-1, width).flatten()
            forward_batch.spec_info.hidden_states = first(self.hidden_states)
            model.attention.init_captured_tree_metadata(
                forward_batch, self.path_slots[:batch_size, :width], self.depth
            )
            return model.forward_nodes(forward_batch)

        return run_once

    def _static_batch(self, batch_size: int, width: int) -> ForwardBatch:
        """Return the batch of a graph, whose tensors are the buffers."""
        from sglang.srt.layers.dp_attention import DpPaddingMode
        from sglang.srt.model_executor.forward_batch_info import (
            CaptureHiddenMode,
            ForwardBatch,
            ForwardMode,
        )
        from sglang.srt.speculative.eagle_info import EagleDraftInput

        forward_batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=batch_size,
            input_ids=self.tokens[:batch_size, :width].flatten(),
            req_pool_indices=self.req_pool_indices[:batch_size],
            seq_lens=self.seq_lens[:batch_size],
            seq_lens_cpu=None,
            out_cache_loc=self.own_slots[:batch_size, :width].flatten(),
            seq_lens_sum=None,
            return_logprob=False,
            dp_padding_mode=DpPaddingMode.get_default_mode_in_cuda_graph(),
            spec_algorithm=self.model_runner.spec_algorithm,
            spec_info=EagleDraftInput(
                capture_hidden_mode=CaptureHiddenMode.LAST, num_tokens_per_req=width
            ),
            capture_hidden_mode=CaptureHiddenMode.LAST,
        )
        self.model_runner.kv_index_translator.bind_runner_slots(forward_batch)
        return forward_batch

    def holds(self, batch_size: int) -> bool:
        """Return whether a batch of this size runs captured; a larger one runs eagerly."""
        return self.sizes.bucket(batch_size) is not None

    def layers(self, forward_batch: ForwardBatch) -> CapturedLayers:
        """Return the layers of a step's tree; its batch must be one that `holds`."""
        return CapturedLayers(self, forward_batch)

    def run(self, batch_size: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Replay the layer that the buffers describe.

        Args:
            batch_size: B, requests in the buffers.
            width: W, of `sizes` at this batch size.

        Returns:
            probs and tokens [B * W, K], and hidden_states [B * W, H], which stand in the graph's
            memory: they are lost with the next replay of any graph.
        """
        bucket = self.sizes.bucket(batch_size)
        assert bucket is not None
        outputs = self._backend.replay(_key(bucket, width), None)
        probs, tokens, hidden_states = (part[: batch_size * width] for part in outputs)
        return probs, tokens, hidden_states


class CapturedLayers:
    """The layers of one step's tree, run by replaying graphs.

    Args:
        graphs: those of the server; `holds` must be true of the batch.
        forward_batch: as `base.Drafter.layers` gets it.
    """

    def __init__(self, graphs: LayerGraphs, forward_batch: ForwardBatch) -> None:
        self._graphs = graphs
        self._batch_size = batch_size = forward_batch.batch_size
        self._slots = forward_batch.out_cache_loc.view(batch_size, -1)
        self._hidden_states = forward_batch.spec_info.hidden_states.unsqueeze(1)
        self._depth = self._num_nodes = 0  # of the layers that were prepared, and run
        graphs.seq_lens[:batch_size].copy_(forward_batch.seq_lens)
        graphs.req_pool_indices[:batch_size].copy_(forward_batch.req_pool_indices)
        padding = slice(batch_size, graphs.sizes.bucket(batch_size))
        if padding.stop > batch_size:
            # The graph's padding requests read and write slot 0, which no request owns.
            graphs.seq_lens[padding].fill_(1)
            for buffer in (
                graphs.req_pool_indices,
                graphs.tokens,
                graphs.own_slots,
                graphs.path_slots,
                graphs.hidden_states,
                graphs.positions,
            ):
                buffer[padding].zero_()

    def prepare(self, frontier: Frontier) -> None:
        graphs, batch_size = self._graphs, self._batch_size
        self._depth += 1
        depth = self._depth
        own = self._slots[:, self._num_nodes : self._num_nodes + graphs.topk]
        path = graphs.path_slots[:batch_size]
        if depth > 1 and graphs.topk > 1:  # in a chain each path goes on
            path.copy_(take_rows(path, frontier.parents))
        path[:, :, depth - 1] = own
        graphs.own_slots[:batch_size].copy_(own)
        graphs.tokens[:batch_size].copy_(frontier.tokens)
        graphs.hidden_states[:batch_size].copy_(take_rows(self._hidden_states, frontier.parents))
        torch.add(graphs.seq_lens[:batch_size], depth - 1, out=graphs.positions[:batch_size])
        graphs.depth.fill_(depth)

    def run(self, frontier: Frontier, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        probs, tokens, hidden_states = self._graphs.run(self._batch_size, width)
        self._num_nodes += width
        self._hidden_states = hidden_states.view(self._batch_size, width, -1)
        # The tree keeps them beyond the next replay.
        return probs.clone(), tokens.clone()


def _key(batch_size: int, width: int) -> ShapeKey:
    return ShapeKey(size=batch_size, variant_label=f"width {width}")


def capture_layers(model: DraftModel, max_layers: int, sizes: GraphSizes) -> LayerGraphs:
    """Capture the draft's layers on the device; arguments as for `LayerGraphs`."""
    from sglang.srt.distributed.parallel_state import graph_capture
    from sglang.srt.model_executor.runner import model_capture_mode
    from sglang.srt.model_executor.runner_backend.utils import resolve_decode_backend
    from sglang.srt.model_executor.runner_utils.pool import (
        get_or_create_global_graph_capture_stream,
    )

    stream = get_or_create_global_graph_capture_stream()
    with counted_capture(model.runner, "draft_decode", "draft layers, widths", sizes):
        graphs = LayerGraphs(model, max_layers, sizes)
        backend = resolve_decode_backend(graphs)
        try:
            with (
                model_capture_mode(),
                graph_capture(stream=stream) as context,
                backend.capture_session(context.stream),
            ):
                graphs.capture(backend)
        except Exception as error:
            raise HostError(
                f"capturing CUDA graphs of draft layers failed: {error}; pass --cast-graphs passes"
            ) from error
    return graphs
