"""Greedy and sampled decoding of many requests by the target, in slots that are filled again.

Every state that the draft will be trained on falls out of decoding, so it is kept here and the
target never reads an answer twice.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .layers import LayerCache, rope_tables
from .target_model import Target

PREFILL_TOKENS = 512  # of prompts that are read in one pass: more takes longer a token on a CPU


@dataclass
class Request:
    """What is decoded: `tokens` grows, and `states` holds a row for each of them but the last."""

    name: str
    tokens: list[int]
    max_new_tokens: int
    temperature: float  # 0 decodes greedily
    stop_ids: frozenset[int] = frozenset()
    num_prompt_tokens: int = field(init=False)
    states: torch.Tensor = field(init=False)  # [T - 1, state_size] bfloat16

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.tokens)

    @property
    def is_finished(self) -> bool:
        """Whether the answer has ended, by its length or by a stop token."""
        num_new = len(self.tokens) - self.num_prompt_tokens
        return num_new >= self.max_new_tokens or (num_new > 0 and self.tokens[-1] in self.stop_ids)


class Decoder:
    """Decodes requests in a fixed number of slots.

    Args:
        target: on CPU, its weights in the dtype to compute in.
        num_slots: requests decoded together.
        max_tokens: prompt and answer of the longest request.
        generator: for sampled requests.
    """

    def __init__(
        self, target: Target, num_slots: int, max_tokens: int, generator: torch.Generator
    ) -> None:
        shape = target.shape
        self._target = target
        self._generator = generator
        self._max_tokens = max_tokens
        dtype = target.lm_head.weight.dtype
        size = (shape.num_layers, num_slots, shape.num_kv_heads, max_tokens, shape.head_dim)
        self._keys, self._values = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
        self._states = torch.zeros(num_slots, max_tokens, shape.state_size, dtype=torch.bfloat16)
        self._requests: list[Request | None] = [None] * num_slots

    @torch.inference_mode()
    def run(self, waiting: deque[Request]) -> Iterator[Request]:
        """Yield each request when it has ended, in the order of their ends.

        Args:
            waiting: requests are taken from its left as slots become free; the caller may add some
                whenever one is yielded.

        Raises:
            ValueError: a request does not fit into a slot.
        """
        while True:
            yield from self._fill(waiting)
            busy = [slot for slot, request in enumerate(self._requests) if request is not None]
            if not busy:
                return
            self._step(busy)
            yield from self._take_finished(busy)

    def _fill(self, waiting: deque[Request]) -> Iterator[Request]:
        """Read prompts into free slots, and yield those whose first token ends them."""
        free = [slot for slot, request in enumerate(self._requests) if request is None]
        while free:
            batch: list[Request] = []
            longest = 0
            while waiting and len(batch) < len(free):
                request = waiting.popleft()
                if len(request.tokens) + request.max_new_tokens > self._max_tokens:
                    raise ValueError(f"request {request.name} is longer than a slot")
                batch.append(request)
                longest = max(longest, len(request.tokens))
                if (len(batch) + 1) * longest > PREFILL_TOKENS:
                    break
            if not batch:
                return
            slots, free = free[: len(batch)], free[len(batch) :]
            self._prefill(batch, slots)
            finished = list(self._take_finished(slots))
            free += [slot for slot in slots if self._requests[slot] is None]
            yield from finished

    def _prefill(self, batch: list[Request], slots: list[int]) -> None:
        """Run prompts that are padded behind their ends; no token sees what comes after it."""
        lengths = torch.tensor([len(request.tokens) for request in batch])
        padded = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
        for row, request in enumerate(batch):
            padded[row, : len(request.tokens)] = torch.tensor(request.tokens)
        output = self._target(padded)
        for layer, cache in enumerate(output.cache):
            self._keys[layer, slots, :, : padded.shape[1]] = cache.keys
            self._values[layer, slots, :, : padded.shape[1]] = cache.values
        self._states[slots, : padded.shape[1]] = output.states.to(torch.bfloat16)
        for slot, request in zip(slots, batch, strict=True):
            self._requests[slot] = request
        self._append(slots, output.states[torch.arange(len(batch)), lengths - 1])

    def _step(self, busy: list[int]) -> None:
        """Decode one token in each busy slot."""
        shape, rows = self._target.shape, torch.tensor(busy)
        last = [len(self._requests[slot].tokens) - 1 for slot in busy]
        positions = torch.tensor(last)
        length = max(last) + 1
        mask = (torch.arange(length) <= positions[:, None])[:, None, None]
        rope = rope_tables(positions[:, None], shape)
        x = self._target.model.embed_tokens(
            torch.tensor([[self._requests[slot].tokens[-1]] for slot in busy])
        )
        is_full = len(busy) == len(self._requests)
        states = []
        for index, layer in enumerate(self._target.model.layers):
            queries, new = layer.self_attn.project(layer.input_layernorm(x), rope)
            keys, values = self._keys[index], self._values[index]
            keys[rows, :, positions] = new.keys[:, :, 0]
            values[rows, :, positions] = new.values[:, :, 0]
            cache = LayerCache(keys[:, :, :length], values[:, :, :length])
            if not is_full:
                cache = LayerCache(cache.keys[rows], cache.values[rows])
            # The query heads of a group are rows over the same keys, so nothing is copied.
            grouped = queries.view(len(busy), shape.num_kv_heads, -1, shape.head_dim)
            heads = F.scaled_dot_product_attention(grouped, *cache, attn_mask=mask)
            x = layer.finish(x, heads.reshape(queries.shape))
            if index in shape.aux_layer_ids:
                states.append(x)
        row_states = torch.cat([*states, self._target.model.norm(x)], dim=-1)[:, 0]
        self._states[rows, positions] = row_states.to(torch.bfloat16)
        self._append(busy, row_states)

    def _append(self, slots: list[int], states: torch.Tensor) -> None:
        """Choose the next token of each slot from its last state [len(slots), state_size]."""
        logits = self._target.logits(states).float()
        tokens = logits.argmax(-1)
        temperatures = torch.tensor([self._requests[slot].temperature for slot in slots])
        drawn = (temperatures > 0).nonzero()[:, 0]
        if len(drawn):
            sums = (logits[drawn] / temperatures[drawn, None]).softmax(-1).cumsum(-1)
            points = torch.rand(len(drawn), 1, generator=self._generator) * sums[:, -1:]
            tokens[drawn] = torch.searchsorted(sums, points, right=True)[:, 0].clamp(
                max=logits.shape[1] - 1
            )
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            self._requests[slot].tokens.append(token)

    def _take_finished(self, slots: list[int]) -> Iterator[Request]:
        for slot in slots:
            request = self._requests[slot]
            if request.is_finished:
                request.states = self._states[slot, : len(request.tokens) - 1].clone()
                self._requests[slot] = None
                yield request
