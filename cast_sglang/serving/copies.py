"""Copies: the text of the running requests, and what of it is grafted into a step's trees.

Text is read where verify leaves it, on the device, and reaches the host with the scores of the next
tree's first layer, which the host waits for anyway. A request whose text here is not the one that
it is served with (a new one, one that was retracted) is read anew from the request itself.
"""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from cast_sglang.copying.automaton import SuffixIndex
from cast_sglang.copying.chances import Chances
from cast_sglang.copying.contexts import roots_of
from cast_sglang.copying.graft import Grafts, Seen, graft
from cast_sglang.copying.outcomes import judge
from cast_sglang.copying.paths import copied_paths
from cast_sglang.copying.pools import Pools, pool_key
from cast_sglang.errors import ConfigError
from cast_sglang.ops.copies import to_device
from cast_sglang.policy.acceptance import DRAWN, GREEDY, SAMPLED
from cast_sglang.policy.auto import LEAST_CUT
from cast_sglang.serving.host_reads import HostReads, Read
from cast_sglang.serving.request_modes import parse_pool
from cast_sglang.serving.step import Copied
from cast_sglang.serving.step_room import copies_text
from cast_sglang.tree import Selection

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from cast_sglang.config import CastConfig
    from cast_sglang.serving.step import Drafted, Verified
    from cast_sglang.tree import DraftTree

__all__ = ["Copies"]

# Tokens of new texts that a step reads, which takes 1 to 2 ms: of source of the standard library,
# 30,000 tokens took 1.5 to 3 ms on an AMD EPYC, with other work beside.
_MOST_READ = 1 << 14
# Plain steps whose outcomes may wait to be read: the one that runs, and the one before, whose copy
# may still be under way.
_MOST_UNREAD = 2


class _Outcome(NamedTuple):
    """What a step brought, on its way to the host."""

    requests: list[Req]
    read: Read
    grafts: Grafts | None  # None for a plain step


class Copies:
    """Grafts copies into the trees of requests, and learns what they are worth.

    The text of a request is forgotten when a tree is grown without the request. Requests are known
    as SGLang's objects: a client chooses their names, and two that run may have the same.

    Of a step with a tree its owner calls, in this order: `begin_step`; `start`; `look` for each of
    the tree's layers; `graft_into` when it has grown; `on_drafted`; and of any step `on_verified`.
    Where nothing is drafted, it calls `look_at_text` and `verify_chains` after `start`.

    Args:
        reads: of the server.
        topk: K, drafted children of a node.
        num_nodes: nodes that may be verified of a tree, without the root.
        max_tokens: for the text of all requests together, see `SuffixIndex`.
        pool_tokens: the same for all pools.
        vocab_size: of the target.

    Attributes:
        seconds: host time spent since `begin_step`.
        num_accepted: tokens that were accepted and that copying alone proposed.
    """

    def __init__(
        self,
        reads: HostReads,
        *,
        topk: int,
        num_nodes: int,
        max_tokens: int,
        pool_tokens: int = 0,
        vocab_size: int,
    ) -> None:
        self.index, self.chances = SuffixIndex(max_tokens + pool_tokens), Chances()
        self._pools = Pools(self.index, pool_tokens)
        self.seconds, self.num_accepted = 0.0, 0
        self._reads, self._topk = reads, topk
        self._num_nodes, self._vocab_size = num_nodes, vocab_size
        self._reqs: list[Req] = []
        self._has_no_room: set[Req] = set()  # requests whose text the index could not take
        self._reading: set[Req] = set()  # those whose text was read in part
        self._whose: tuple[np.ndarray | None, ...] = (None, None)  # weights, is_drawn
        self._unwanted: np.ndarray | None = None  # [B] bool, who gets no copies; None for no one
        self._kinds = np.empty(0, np.int64)
        self._max_depth, self._least_scores = 0, np.empty(0, np.float32)
        self._outcomes: deque[_Outcome] = deque()
        # Of the step that runs.
        self._batch: Any = None
        self._roots: Read | None = None
        self._starts = np.empty((0, 4), np.int64)  # as of `roots_of`
        self._drafted: Any = None  # tokens, scores and parents [B, M] of the layers so far
        self._seen = Seen(0, 0, 0)
        self._nodes = np.empty((0, 0), np.int64)  # of the newest layer, best first
        self._grafts: Grafts | None = None
        self._selection: Selection | None = None

    @classmethod
    def of(cls, config: CastConfig, worker: Any, num_nodes: int) -> Copies | None:
        """Return the copies of a server, None where nothing is to be copied.

        Args:
            worker: its `CastWorker`.
            num_nodes: as above.
        """
        if not copies_text(config, worker.has_draft):
            return None
        return cls(
            worker.reads,
            topk=worker.topk,
            num_nodes=num_nodes,
            # A block has up to twice the tokens of its text, which the cache has slots for.
            max_tokens=2 * worker.token_to_kv_pool_allocator.size,
            pool_tokens=worker.token_to_kv_pool_allocator.size,
            vocab_size=worker.target_worker.model_runner.model_config.vocab_size,
        )

    @property
    def num_bytes(self) -> int:
        """Memory that the text of the running requests takes."""
        return self.index.num_bytes

    def begin_step(
        self,
        batch: ScheduleBatch,
        weights: np.ndarray | None,
        is_drawn: np.ndarray | None,
        max_depth: int,
        least_scores: np.ndarray,
    ) -> None:
        """Note whose trees are grafted; forget requests that do not run any more.

        Args:
            weights: [B], what a token of each request is worth; None for 1 each.
            is_drawn: [B] bool, whose children are drawn at random; None where no one's are. It and
                weights are the same objects until the requests change.
            max_depth: of a node that is copied in this step.
            least_scores: [B] float32, of such a node.
        """
        began = time.perf_counter()
        self._max_depth, self._least_scores, self._batch = max_depth, least_scores, batch
        whose = weights, is_drawn
        if self._reqs != batch.reqs or any(map(operator.is_not, whose, self._whose)):
            self._reqs, self._whose = list(batch.reqs), whose
            self._has_no_room.clear()
            self._reading.intersection_update(self._reqs)
            is_greedy = [req.sampling_params.top_k == 1 for req in batch.reqs]
            self._kinds = np.where(is_greedy, GREEDY, SAMPLED)
            if is_drawn is not None:
                self._kinds[is_drawn] = DRAWN
            self._unwanted = None if weights is None else weights <= 0.0
            self._pools.run((req, _pool_of(req), len(req.origin_input_ids)) for req in self._reqs)
            self.index.keep([*self._reqs, *self._pools.keys])
        self.seconds = time.perf_counter() - began

    def start(self) -> None:
        """Begin to read what the texts of the step's requests end with."""
        batch, self._batch = self._batch, None
        self._roots = self._reads.start(batch.spec_info.bonus_tokens, batch.seq_lens)
        self._drafted = None

    def look(self, arrays: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Find the copies of the tree with its newest layer.

        Args:
            arrays: on the host, what `DraftTree.newest` was.

        Returns:
            best [B, n] and left [B, K], as `TreePolicy.stand` takes them; None where there are no
            copies, so that the policy decides as it does without.
        """
        began = time.perf_counter()
        self._read_text()
        tokens, scores, nodes = (array.numpy() for array in arrays)
        if self._drafted is None:
            above = np.full((len(scores), 1), -1)
        else:
            above = self._nodes[:, : scores.shape[1] // self._topk]
        layer = tokens.reshape(len(scores), -1), scores, np.repeat(above, self._topk, axis=1)
        if self._drafted is not None:
            layers = zip(self._drafted, layer, strict=True)
            layer = tuple(np.concatenate(parts, axis=1) for parts in layers)
        self._nodes, self._drafted = nodes, layer
        shape = len(scores), layer[0].shape[1], self._max_depth
        if not self._seen.holds(*shape):
            self._seen = Seen(*shape)
        grafts = self._grafts = self._graft(nodes, self._seen)
        self.seconds += time.perf_counter() - began
        if not grafts.has_copies:
            return None
        return torch.from_numpy(grafts.best), torch.from_numpy(grafts.left)

    def look_at_text(self) -> Grafts:
        """Find what follows the texts, where no draft model proposes anything."""
        began = time.perf_counter()
        self._read_text()
        nothing = np.empty((len(self._reqs), 0), np.int64)
        self._drafted = nothing, nothing.astype(np.float32), nothing
        self._grafts = self._graft()
        self.seconds += time.perf_counter() - began
        return self._grafts

    def verify_chains(self, num_draft_tokens: int) -> Selection:
        """Return what `look_at_text` found as N rows, of which the step verifies all; on the host.

        Args:
            num_draft_tokens: N, 1 for the roots alone.
        """
        assert self._grafts is not None
        arrays = self._grafts.chains(num_draft_tokens)
        self._selection = Selection(*map(torch.from_numpy, arrays))
        return self._selection

    def _read_text(self) -> None:
        """Bring the texts of the step's requests up to their roots, once a step."""
        if self._roots is not None:
            roots, seq_lens = (part.numpy() for part in self._roots.wait())
            ends = np.empty((len(roots), 2), np.int64)
            ends[:, 0], ends[:, 1] = seq_lens + 1, roots
            if self._unwanted is not None:
                ends[self._unwanted] = -1
            self._roots = None
            self._take_in(0)
            self._seen.forget()
            self._pools.update()
            self._starts = self._checked_texts(ends)

    def _graft(self, nodes: np.ndarray | None = None, seen: Seen | None = None) -> Grafts:
        tokens, scores, parents = self._drafted
        return graft(
            *(self.index.ints, self._starts, tokens, scores, parents),
            *(self._topk, self.chances.table(), self._kinds),
            num_nodes=self._num_nodes,
            max_depth=self._max_depth,
            least_scores=self._least_scores,
            vocab_size=self._vocab_size,
            nodes=nodes,
            seen=seen,
        )

    def traced(self) -> Copied:
        """Return what a trace needs to know of the step's trees, which have grown."""
        assert self._grafts is not None, "`look` comes first"
        table, (tokens, scores, parents) = self.chances.table(), self._drafted
        paths = copied_paths(
            *(self.index.ints, self._starts, tokens, scores, parents),
            *(self._topk, table, self._kinds),
            max_depth=self._max_depth,
            least_scores=np.maximum(self._least_scores, np.float32(LEAST_CUT)),
            vocab_size=self._vocab_size,
        )
        return Copied(self._grafts, paths, table)

    def graft_into(self, tree: DraftTree) -> Grafts | None:
        """Add what `look` found to the tree that has grown; None where no request has a copy."""
        grafts = self._grafts
        if grafts is None or not grafts.has_copies:
            return None
        began = time.perf_counter()
        device = tree.frontier().scores.device
        arrays = grafts.scores, grafts.parents, grafts.tokens, grafts.copied_scores
        tree.graft(*(to_device(part, device) for part in arrays))
        self.seconds += time.perf_counter() - began
        return grafts

    def on_drafted(self, drafted: Drafted) -> None:
        """Keep what the step verifies."""
        self._selection = drafted.selection

    def on_verified(self, reqs: Sequence[Req], verified: Verified) -> None:
        """Begin to read what the step brought."""
        if self._selection is None and not any(req in self.index for req in reqs):
            return  # Nothing would be learned, and reads of plain steps alone would pile up.
        began = time.perf_counter()
        tensors = [verified.tokens, verified.accept_lens, verified.accept_index]
        grafts = None
        if self._selection is not None:
            grafts = self._grafts
            tensors.append(self._selection.top_scores_index)
        requests, self._selection = list(reqs), None
        self._outcomes.append(_Outcome(requests, self._reads.start(*tensors), grafts))
        self._take_in(_MOST_UNREAD)
        self.seconds += time.perf_counter() - began

    def discard(self) -> None:
        """Forget steps whose results belong to no request, as those of synthetic batches."""
        self._outcomes.clear()

    def state(self) -> dict[str, Any]:
        """Return what an operator wants to see, as JSON."""
        return {
            "copies_accepted": self.num_accepted,
            "copy_bytes": self.num_bytes,
            "copies": [row._asdict() for row in self.chances.classes()],
        }

    def _take_in(self, most_unread: int) -> None:
        """Add what earlier steps brought to the texts, and learn from it."""
        while len(self._outcomes) > most_unread:
            outcome = self._outcomes.popleft()
            tokens, lens, accept_index, *index = (part.numpy() for part in outcome.read.wait())
            lens = lens.astype(np.int64)
            tokens = tokens.reshape(len(lens), -1).astype(np.int64)
            requests: list[Req | None] = [*outcome.requests]
            if self._reading:  # a text lacks what comes before
                requests = [None if req in self._reading else req for req in requests]
            self.index.add_rows(requests, tokens, lens)
            if outcome.grafts is not None and index:
                rows = accept_index.astype(np.int64)
                seen = judge(outcome.grafts, index[0], rows, tokens, lens)
                self.chances.update(*seen[:2])
                self.num_accepted += seen[2]

    def _checked_texts(self, ends: np.ndarray) -> np.ndarray:
        """Make sure that each text ends with the root of its tree; return `roots_of` the texts.

        Args:
            ends: [B, 2] int64, tokens of the text with the root, and the root's; -1 for a request
                that wants no copies.
        """
        pools = self._pools.blocks(self._reqs)
        roots = roots_of(self.index.ints, self.index.blocks(self._reqs), pools, ends)
        left = _MOST_READ
        for place in np.flatnonzero(roots[:, 0] < 0).tolist():
            req, (size, root) = self._reqs[place], ends[place].tolist()
            if 0 < size and 0 < left and req not in self._has_no_room:
                left -= self._read_on(req, size, root, left)
        if left < _MOST_READ:
            roots = roots_of(self.index.ints, self.index.blocks(self._reqs), pools, ends)
        return roots

    def _read_on(self, req: Req, size: int, root: int, most: int) -> int:
        """Read a request's text from the request, or some of it; return how many tokens.

        Nothing is read where the request does not hold the text that it is served with.

        Args:
            size, root: as `ends` of `_checked_texts`.
            most: tokens that may be read.
        """
        if req not in self._reading:
            self.index.drop(req)
        prompt, answer = req.origin_input_ids, req.output_ids
        known = len(prompt) + len(answer)
        if known != size - 1 and (known != size or (answer or prompt)[-1] != root):
            self.index.drop(req)
            self._reading.discard(req)
            return 0
        first = self.index.num_tokens(req)
        end = min(first + most, size)
        parts = [prompt[first:end], answer[max(0, first - len(prompt)) : max(0, end - len(prompt))]]
        if end > known:
            parts.append([root])  # of a result that the request does not hold yet
        text = np.concatenate([np.array(part, np.int64) for part in parts])
        if not self.index.add(req, text):
            self._has_no_room.add(req)
            end = size
        if end < size:
            self._reading.add(req)
        else:
            self._reading.discard(req)
        return len(text)


def _pool_of(req: Req) -> Hashable | None:
    """Return the key of a request's pool; None for none, or for a name that was not checked."""
    if req.sampling_params.custom_params is None:  # as of most requests
        return None
    try:
        name = parse_pool(req.sampling_params.custom_params)
    except ConfigError:
        return None
    return None if name is None else pool_key(name)
