"""An engine without models, whose idle worker can be measured."""

import contextlib
from types import SimpleNamespace

import torch
from sglang.srt.runtime_context import get_context
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from cast_sglang.costs.limits import Limits
from cast_sglang.serving.drafting.backlog import Backlog
from cast_sglang.serving.pass_clock import PassClock

TOPK, HIDDEN, STEPS, ROWS, CONTEXT = 3, 6, 4, 8, 40


class Worker(SimpleNamespace):
    """As much of `CastWorker` as a meter reads."""

    def discard_pending_steps(self):
        self.discarded += 1


@contextlib.contextmanager
def published():
    """Make this process that of an engine."""
    settings = get_context().override_server_args(
        device="cpu",
        page_size=1,
        speculative_algorithm="EAGLE3",
        speculative_num_steps=STEPS,
        speculative_eagle_topk=TOPK,
        speculative_num_draft_tokens=ROWS,
    )
    with settings:
        yield


def make_worker(num_rows=5, num_slots=90):
    """Return a worker of a process with this request pool and this many cache slots."""
    eagle = SpeculativeAlgorithm.EAGLE3
    target = SimpleNamespace(
        model_config=SimpleNamespace(vocab_size=50, is_encoder_decoder=False),
        decode_attention_backend_str="cast_cpu",
    )
    draft_config = SimpleNamespace(spec_hidden_size=HIDDEN, dtype=torch.bfloat16)
    table = torch.zeros(num_rows, CONTEXT, dtype=torch.int32)
    return Worker(
        device="cpu",
        topk=TOPK,
        verify_graphs=None,
        spec_v2_attn_backends=(SimpleNamespace(needs_cpu_seq_lens=True),),
        speculative_num_steps=STEPS,
        speculative_algorithm=eagle,
        limits=Limits(max_batch_size=4, max_context=CONTEXT, max_verify_rows=ROWS, max_width=TOPK),
        req_to_token_pool=SimpleNamespace(req_to_token=table, device="cpu"),
        token_to_kv_pool_allocator=SimpleNamespace(size=num_slots, page_size=1),
        target_worker=SimpleNamespace(model_runner=target),
        draft_worker=SimpleNamespace(
            draft_runner=SimpleNamespace(model_config=draft_config, spec_algorithm=eagle),
            drafter=SimpleNamespace(
                graphs=None, takes_one_pass=False, layers_held=1, begin=lambda *args: None
            ),
            extend_graphs=None,
            model=SimpleNamespace(num_proposed=TOPK),
            parallel_layout=None,
        ),
        tools=SimpleNamespace(
            backlog=Backlog(num_rows, 4),
            decider=SimpleNamespace(policy="the server's"),
            calibration="the server's",
            copies="the server's",
        ),
        calibration="the server's",
        reads=None,
        clock=PassClock("cpu"),
        cast_stats="the server's",
        discarded=0,
    )
