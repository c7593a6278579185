"""CAST as a speculative algorithm of SGLang: predicates, worker, the order of a launch's checks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.runtime_context import get_context, get_model, get_spec
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from cast_sglang.config import CastConfig
from cast_sglang.serving.heads.registry import one_pass_depth
from cast_sglang.serving.launch.arguments import (
    DEFAULT_MAX_RUNNING_REQUESTS,
    check_copying,
    check_flags,
    set_draft,
    set_envelope,
    verify_sizes,
)
from cast_sglang.serving.launch.backends import limit_graphs, set_attention_backends
from cast_sglang.serving.launch.cost_profile import announce_profile
from cast_sglang.serving.launch.identity import host_identity, is_eagle3_config, read_draft_config
from cast_sglang.serving.launch.pair import check_pair
from cast_sglang.serving.launch.reserve import (
    describe_reserve,
    read_launch,
    reserve_of_server,
    shrink_envelope,
)
from cast_sglang.serving.launch.target import target_config
from cast_sglang.serving.learned import LearnedFile

if TYPE_CHECKING:
    from sglang.srt.managers.overlap_utils import FutureMap
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.spec_info import SpecInput

__all__ = ["CastAlgorithm", "register"]

logger = logging.getLogger(__name__)


class CastAlgorithm(CustomSpecAlgo):
    """`--speculative-algorithm CAST`. Behaves as EAGLE or EAGLE-3 wherever SGLang asks.

    Without a draft model it behaves as SGLang's STANDALONE, whose target hands on no hidden states,
    and has none of the parts that a draft model takes.
    """

    def is_eagle(self) -> bool:
        return _has_draft()

    def is_standalone(self) -> bool:
        return not _has_draft()

    def has_draft_kv(self) -> bool:
        return _has_draft()

    def is_eagle3(self) -> bool:
        if not _has_draft():
            return False
        spec = get_spec()
        draft_config = read_draft_config(
            spec.speculative_draft_model_path,
            spec.speculative_draft_model_revision,
            get_model().trust_remote_code,
        )
        return is_eagle3_config(draft_config)

    def supports_grammar_overlap(self) -> bool:
        return True

    def need_topk(self) -> bool:
        return _has_draft()

    def carries_draft_hidden_states(self) -> bool:
        return _has_draft()

    def create_future_map(
        self,
        device: torch.device,
        req_to_token_pool: Any,
        needs_cpu_seq_lens: bool = True,
        needs_confidence_relay: bool = False,
    ) -> FutureMap:
        from sglang.srt.managers.overlap_utils import FutureMap

        return FutureMap(
            device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay
        )

    def build_disagg_draft_input(
        self, batch: ScheduleBatch, last_tokens_tensor: torch.Tensor, future_map: FutureMap
    ) -> SpecInput | None:
        from sglang.srt.speculative.eagle_disaggregation import build_eagle_disagg_draft_input

        return build_eagle_disagg_draft_input(batch, last_tokens_tensor, future_map)

    def get_platform_worker_cls(self) -> type | None:
        return None

    def handle_server_args(self, server_args: ServerArgs) -> None:
        """Fill in CAST's defaults and refuse what it cannot run.

        Raises:
            ConfigError, HostError, ProfileError: one line that names the flag and the fix.
        """
        config = CastConfig.load()
        set_draft(server_args)
        draft_config = None
        if server_args.speculative_draft_model_path is not None:
            draft_config = read_draft_config(
                server_args.speculative_draft_model_path,
                server_args.speculative_draft_model_revision,
                server_args.trust_remote_code,
            )
        target = target_config(server_args)
        set_envelope(server_args, one_pass_depth(draft_config), target)
        verify_sizes(config, server_args.speculative_num_draft_tokens)
        check_copying(config, server_args)
        check_pair(server_args, target)
        set_attention_backends(server_args)

        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS
            logger.info(
                "CAST: --max-running-requests not given, using %d", DEFAULT_MAX_RUNNING_REQUESTS
            )
        server_args.enable_mixed_chunk = False
        if server_args.device == "cpu":
            server_args.disable_overlap_schedule = True
        else:
            limit_graphs(config, server_args)

        identity = host_identity(server_args, target)
        announce_profile(config, server_args, identity)
        launch = read_launch(server_args, config, target, identity)
        if (shrunk := shrink_envelope(server_args, config, launch)) is not None:
            logger.info("CAST: %s", shrunk)
        file = LearnedFile.of(config, identity)
        if file is not None:
            file.load()  # so that a bad file stops the launch
        logger.info(
            "CAST: policy %s, C1=%g C2=%g C3=%g R=%d; envelope steps %d, topk %d, tokens %d",
            config.policy,
            config.c1,
            config.c2,
            config.c3,
            config.r,
            server_args.speculative_num_steps,
            server_args.speculative_eagle_topk,
            server_args.speculative_num_draft_tokens,
        )
        if server_args.speculative_draft_model_path is None:
            logger.info(
                "CAST: no --speculative-draft-model-path, and the target has no MTP layer: drafts "
                "are copied from the text of each request, and from nothing else"
            )
        logger.info("CAST: %s", describe_reserve(reserve_of_server(server_args, config, launch)))


def _has_draft() -> bool:
    """Return whether a draft model is served; true as long as a process does not know it."""
    if not get_context().is_config_namespace_published("spec"):
        return True
    return get_spec().speculative_draft_model_path is not None


def register() -> None:
    """Make `--speculative-algorithm CAST` legal in this process."""

    @SpeculativeAlgorithm.register(
        "CAST",
        supports_overlap=True,
        validate_server_args=check_flags,
        spec_class=CastAlgorithm,
    )
    def _worker_class(server_args: ServerArgs) -> type:
        from cast_sglang.serving.draftless import DraftlessWorker
        from cast_sglang.serving.worker import CastWorker

        return CastWorker if _has_draft() else DraftlessWorker
