"""Draws: the children of a step's tree, drawn at random for the requests that sample.

Whose drafts are drawn is settled before the step. Requests of temperature 0 get the draft's
likeliest tokens, as do all where no request of the batch is drawn.
"""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING

import numpy as np
import torch
from sglang.srt.runtime_context import get_spec

from cast_sglang.ops.copies import to_device
from cast_sglang.ops.sampled import sampled_ops_for
from cast_sglang.ops.sampled.contract import DrawCuts
from cast_sglang.serving.step import Drawn
from cast_sglang.tree import proposer_of

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    from cast_sglang.config import CastConfig
    from cast_sglang.tree import Selection

__all__ = ["Draws", "cut_links", "draws_children", "num_proposed"]

# Tokens that a draft's distribution is kept of; a token beyond them is never proposed, and still
# comes from verify as often as the target wants it. Chosen as four times the children of a node;
# how many serve fastest has not been measured.
MAX_KEPT = 32
# The exponential distribution may round to 0, by which nothing can be divided.
_LEAST_NOISE = 1e-30


def draws_children(config: CastConfig) -> bool:
    """Return whether a server of these settings draws the drafts of requests that sample.

    Only policy `auto` says before a step what is verified in it, which draws need. Thresholds of
    acceptance, which change the law, are known to SGLang's verify alone.
    """
    is_on = config.policy == "auto" and config.draws == "on" and not config.trace_full
    return is_on and get_spec().speculative_accept_threshold_single == 1.0 == (
        get_spec().speculative_accept_threshold_acc
    )


def cut_links(
    verify_input: EagleVerifyInput, index: torch.Tensor, settled_scores: torch.Tensor
) -> None:
    """Take the nodes that a drawn request may not verify out of its tree.

    A link to one of them goes to its next sibling that stays: a copy, if any.

    Args:
        index: [B, N - 1] int64, candidate numbers of the nodes.
        settled_scores: [B, M] float32, 0 for such nodes.
    """
    stays = torch.nn.functional.pad(settled_scores.gather(1, index) > 0.0, (1, 0), value=True)
    siblings = verify_input.retrieve_next_sibling

    def skip(links: torch.Tensor) -> None:
        places = links.clamp(min=0)
        is_cut = (links >= 0) & ~stays.gather(1, places)
        links.copy_(torch.where(is_cut, siblings.gather(1, places), links))

    # Each time a link skips twice as many siblings that are cut.
    for _ in range(index.shape[1].bit_length()):
        skip(siblings)
    skip(verify_input.retrieve_next_token)


def num_proposed(config: CastConfig, runner: ModelRunner, topk: int) -> int:
    """Return M, tokens of the draft that are kept for each node.

    Where no children are drawn they are the K children, and two of a chain: SGLang states a
    probability of 1 for a token that is the only one.

    Args:
        runner: of the draft model.
    """
    if not draws_children(config):
        return max(topk, 2)
    vocab_size = getattr(runner.model_config.hf_config, "draft_vocab_size", None)
    return max(topk, min(MAX_KEPT, vocab_size or runner.model_config.vocab_size))


class Draws:
    """Draws the children of one step's tree after the other.

    Each step draws from a stream of its own, which is the same on all ranks of a tensor parallel
    group, and none of those that verify takes its coins from.

    Args:
        device: of the draft model.
        seed: of the server.
        topk: K, children of a node.
    """

    def __init__(self, device: torch.device | str, seed: int, topk: int) -> None:
        self._ops, self._topk = sampled_ops_for(device), topk
        self._generator = torch.Generator(device)
        self._seed, self._num_steps = seed, 0
        self._device = device
        self._whose: np.ndarray | None = None
        self._how: tuple[torch.Tensor, ...] = ()
        self._cuts: DrawCuts | None = None
        # Of the tree that grows, one entry a layer: [B, W, M].
        self._proposals: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor] = []

    @property
    def is_drawn(self) -> torch.Tensor | None:
        """[B] bool, whose drafts are drawn in this step; None where no one's are."""
        return None if self._cuts is None else self._cuts.is_drawn

    @property
    def whose(self) -> np.ndarray | None:
        """The same on the host."""
        return self._whose

    def begin_step(self, whose: np.ndarray | None, info: SamplingBatchInfo) -> None:
        """Note how the step's requests sample.

        Args:
            whose: [B] bool, whose drafts are drawn; the same array as long as that is the same.
            info: of the batch.
        """
        self._proposals, self._tokens = [], []
        self._num_steps += 1
        if whose is None:
            self._whose = self._cuts = None
            return
        key = f"{self._seed} draws {self._num_steps}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        self._generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        # SGLang copies the object in each step, but not its tensors.
        how = info.temperatures, info.top_ks, info.top_ps, info.min_ps
        is_same = len(self._how) == len(how) and all(map(operator.is_, how, self._how))
        if self._cuts is None or whose is not self._whose or not is_same:
            self._whose, self._how = whose, how
            is_drawn = to_device(whose, self._device)
            self._cuts = DrawCuts(info.temperatures.reshape(-1).float(), *how[1:], is_drawn)

    def children(
        self, probs: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return probs and tokens [B * W, K] of the children of a layer's nodes.

        Args:
            probs: [B * W, M] float32, the draft's probabilities, descending; M >= K.
            tokens: [B * W, M] int64, in the target's vocabulary.
        """
        if self._cuts is None:
            if probs.shape[1] == self._topk:
                return probs, tokens
            return probs[:, : self._topk].contiguous(), tokens[:, : self._topk].contiguous()
        noise = torch.empty_like(probs).exponential_(generator=self._generator)
        noise.clamp_(min=_LEAST_NOISE)
        drawn = self._ops.draw_children(probs, tokens, self._cuts, noise, self._topk)
        batch_size = len(self._cuts.is_drawn)
        self._proposals.append(drawn.proposals.view(batch_size, -1, probs.shape[1]))
        self._tokens.append(tokens.view(batch_size, -1, probs.shape[1]))
        return drawn.probs, drawn.tokens

    def compile_ops(self, num_tokens: int) -> None:
        """Run the ops once at the shapes they are compiled for; `num_tokens` is M."""
        device = self._device
        one = torch.ones(1, device=device)
        cuts = DrawCuts(one, one.to(torch.int32), one, one, one.bool())
        probs = torch.full((1, num_tokens), 1.0 / num_tokens, device=device)
        tokens = torch.arange(num_tokens, device=device).unsqueeze(0)
        drawn = self._ops.draw_children(probs, tokens, cuts, probs, self._topk)
        nodes = torch.zeros((1, 2), dtype=torch.int64, device=device)
        self._ops.accept_draws(
            probs.expand(1, 2, -1).contiguous(),
            nodes,
            nodes - 1,
            nodes - 1,
            nodes,
            drawn.proposals.unsqueeze(0),
            tokens.unsqueeze(0),
            cuts.is_drawn,
            probs[:, :2].contiguous(),
            one / 2,
            2,
        )

    def drawn(self, selection: Selection) -> Drawn | None:
        """Return what verify needs to know of the step's draws; None where there are none."""
        if self._cuts is None:
            return None
        most = max(part.shape[2] for part in self._proposals)

        def joined(parts: list[torch.Tensor]) -> torch.Tensor:
            padded = [torch.nn.functional.pad(x, (0, most - x.shape[2])) for x in parts]
            return torch.cat(padded, dim=1)

        proposals = joined(self._proposals)
        proposers = proposer_of(selection.top_scores_index, self._topk)
        # Copies were not drawn, and a place that no candidate fills hangs nowhere.
        proposers = torch.where(proposers < proposals.shape[1], proposers, -1)
        proposers = torch.nn.functional.pad(proposers, (1, 0))
        return Drawn(proposals, joined(self._tokens), proposers, self._cuts.is_drawn)
