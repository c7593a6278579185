"""Hooks on SGLang: they exist where they are put, and leave servers of other algorithms alone."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.arg_groups.lora_hook import check_lora_speculative_compatibility
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.sampling.penaltylib.min_new_tokens import BatchedMinNewTokensPenalizer
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.server_args import ServerArgs

from cast_sglang.serving import step_room, weight_updates
from cast_sglang.serving.host_patches import hooks, passes
from cast_sglang.serving.step_room import PLAIN_RESERVE
from tests.support.hooks import collect_hooks, hooked

RESERVE, ROW = 128, 512 + 128


@pytest.fixture
def algorithm(monkeypatch):
    """Return a function that sets the algorithm of this process."""
    from sglang.srt.mem_cache import allocation_sizing

    monkeypatch.setattr(allocation_sizing, "get_alloc_reserve_per_decode", lambda: RESERVE)
    for module in (hooks, passes):
        monkeypatch.setattr(module, "slots_reserved", lambda: RESERVE)

    def choose(name):
        spec = SimpleNamespace(speculative_algorithm=name)
        monkeypatch.setattr(hooks, "get_spec", lambda: spec)

    choose("CAST")
    return choose


def request(committed, allocated=0):
    kv = SimpleNamespace(kv_committed_len=committed, kv_allocated_len=max(committed, allocated))
    return SimpleNamespace(kv=kv)


def batch_of(*requests, free=10_000, evictable=0, page_size=1):
    return SimpleNamespace(
        reqs=list(requests),
        token_to_kv_pool_allocator=SimpleNamespace(
            available_size=lambda: free, page_size=page_size
        ),
        tree_cache=SimpleNamespace(evictable_size=lambda: evictable),
        req_to_token_pool=SimpleNamespace(req_to_token=SimpleNamespace(shape=(9, ROW))),
    )


def prepared(batch):
    """Prepare a batch; return what each request reserves meanwhile."""
    seen = []
    hooks._prepare_for_decode(
        lambda b: seen.append(hooks._reserve_of_batch(lambda: RESERVE)), batch
    )
    assert hooks._reserve_of_batch(lambda: RESERVE) == RESERVE  # as before
    return seen[0]


@pytest.mark.parametrize(
    ("name", "extra"), [("CAST", RESERVE), ("EAGLE3", 36), (None, 36)], ids=str
)
def test_a_row_holds_what_a_step_reserves(algorithm, name, extra):
    algorithm(name)
    assert hooks._widen_rows(lambda: 36) == extra


def test_prompts_are_admitted_as_plain_decoding_admits_them(algorithm):
    for name, reserved in (("CAST", 0), ("EAGLE3", 7), (None, 7)):
        algorithm(name)
        assert hooks._reserve_no_context(lambda: 7) == reserved


@pytest.mark.parametrize(
    ("name", "given", "refused"),
    [
        ("CAST", {}, None),
        ("CAST", {"moe_runner_backend": "experimental_sgl_trtllm"}, "experimental_sgl_trtllm"),
        ("STANDALONE", {}, "not STANDALONE"),
        ("EAGLE3", {}, None),
        (None, {}, None),
    ],
)
def test_adapters_are_allowed_as_under_eagle(name, given, refused):
    args = ServerArgs(model_path="m", enable_lora=True, **given)
    # As SGLang has it when it checks: what was resolved stands beside what was given.
    args._resolved_overrides = [("flags", {"speculative_algorithm": name})]
    check = check_lora_speculative_compatibility
    if refused is None:
        hooks._check_adapters(check, args)
    else:
        with pytest.raises(ValueError, match=refused):
            hooks._check_adapters(check, args)


def test_requests_reserve_the_envelope(algorithm):
    assert prepared(batch_of(request(300))) == RESERVE
    assert prepared(batch_of(request(300), request(10), free=5)) == RESERVE  # SGLang retracts one


@pytest.mark.parametrize(("free", "evictable"), [(0, 0), (100, 27), (127, 0)])
def test_a_lone_request_is_decoded_with_what_there_is(algorithm, free, evictable):
    batch = batch_of(request(300), free=free, evictable=evictable)
    needed = hooks._tokens_required(lambda *args: RESERVE, batch, batch.reqs, 1)
    assert needed == prepared(batch) == PLAIN_RESERVE
    holds_more = batch_of(request(300, allocated=420), free=free, evictable=evictable)
    enough = free + evictable >= 8
    needed = hooks._tokens_required(lambda *args: 8, holds_more, holds_more.reqs, 1)
    assert needed == (8 if enough else 0)


def test_enough_is_enough(algorithm):
    batch = batch_of(request(300), free=100, evictable=28)
    assert hooks._tokens_required(lambda *args: 0, batch, batch.reqs, 1) == RESERVE
    assert prepared(batch) == RESERVE
    two = batch_of(request(300, allocated=330), request(10, allocated=500), free=0)
    assert hooks._tokens_required(lambda *args: 0, two, two.reqs, 1) == RESERVE - 30


@pytest.mark.parametrize(
    ("policy", "is_serial", "slots"),
    [("auto", True, 40), ("auto", False, 40), ("eagle", True, 56), ("fixed", False, 56 + 9)],
)
def test_a_step_reserves_what_its_envelope_can_take(monkeypatch, policy, is_serial, slots):
    """With the default envelope; SGLang's own number is 128, and 40 with its default tree."""
    spec = SimpleNamespace(speculative_num_steps=8, speculative_eagle_topk=8)
    spec.speculative_num_draft_tokens, spec.speculative_draft_model_path = 32, "draft"
    schedule = SimpleNamespace(disable_overlap_schedule=is_serial)
    monkeypatch.setattr(step_room, "get_spec", lambda: spec)
    monkeypatch.setattr(step_room, "get_schedule", lambda: schedule)
    monkeypatch.setenv("CAST_POLICY", policy)
    assert step_room.slots_reserved.__wrapped__() == slots


def test_no_request_writes_into_anothers_row(algorithm):
    assert prepared(batch_of(request(10), request(ROW - RESERVE))) == RESERVE
    with pytest.raises(IndexError, match=str(ROW)):
        prepared(batch_of(request(10), request(ROW - RESERVE + 1)))


def test_chains_reserve_whole_pages(algorithm):
    # 300 tokens and 128 more end in the seventh page of 64, and the request holds five.
    for free, lacks in ((128, False), (127, True)):
        batch = batch_of(request(300, allocated=320), free=free, page_size=64)
        asked = hooks._tokens_required(lambda *args: 128, batch, batch.reqs, 64)
        assert asked == (0 if lacks else 128)
        assert prepared(batch) == (PLAIN_RESERVE if lacks else RESERVE)
    # Two more tokens need a page that the request does not hold yet.
    batch = batch_of(request(320), free=64, page_size=64)
    assert hooks._tokens_required(lambda *args: 128, batch, batch.reqs, 64) == 64
    # Behind a prefill the rest of the last page is held, whatever was asked for.
    batch = batch_of(request(300, allocated=300), free=0, page_size=64)
    assert hooks._tokens_required(lambda *args: 128, batch, batch.reqs, 64) == 0
    with pytest.raises(IndexError, match=str(ROW)):
        prepared(batch_of(request(ROW - RESERVE - 63), page_size=256))


def test_other_algorithms_prepare_as_ever(algorithm):
    algorithm("EAGLE3")
    batch = batch_of(request(ROW), free=0)
    assert prepared(batch) == RESERVE
    assert hooks._tokens_required(lambda *args: 77, batch, batch.reqs, 1) == 77


@pytest.mark.parametrize(("name", "bans"), [("CAST", [2, 1, 0]), ("EAGLE3", [3, 3, 3])])
def test_min_new_tokens_counts_what_a_retracted_request_has_said(algorithm, name, bans):
    algorithm(name)
    tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=1)
    params = SimpleNamespace(min_new_tokens=3, stop_token_ids={2})
    reqs = [
        SimpleNamespace(
            sampling_params=params, eos_token_ids=None, tokenizer=tokenizer, output_ids=[7] * count
        )
        for count in (1, 2, 5)
    ]

    class Orchestrator:
        device, vocab_size = "cpu", 4

        def reqs(self):
            return reqs

    orchestrator = Orchestrator()  # a penalizer does not keep it alive
    penalizer = BatchedMinNewTokensPenalizer(orchestrator)
    hooks._count_tokens(BatchedMinNewTokensPenalizer._prepare, penalizer)
    counts = torch.zeros(3, dtype=torch.int64)
    for _ in range(5):
        logits = torch.zeros(3, 4)
        penalizer._apply(logits)
        assert torch.equal(logits[:, 1], logits[:, 2]) and not logits[:, [0, 3]].any()
        counts += torch.isinf(logits[:, 1])
        penalizer._cumulate_output_tokens(None)
    assert counts.tolist() == bans


@pytest.mark.parametrize("name", ["CAST", None])
def test_something_is_left_to_sample_where_all_is_banned(algorithm, name):
    algorithm(name)
    bans = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]])
    grammar = torch.tensor([[-torch.inf, 0.0], [0.0, -torch.inf]])
    info = object.__new__(SamplingBatchInfo)
    info.acc_additive_penalties, info.acc_scaling_penalties = bans, None
    info.penalizer_orchestrator, info.logit_bias = None, None
    info.grammar_mask = SimpleNamespace(apply=lambda logits: logits.add_(grammar))
    logits = torch.tensor([[0.5, 0.7], [0.2, 0.3]])
    hooks._apply_logits_bias(SamplingBatchInfo.apply_logits_bias, info, logits)
    assert logits[1].tolist() == [pytest.approx(0.2), -torch.inf]
    assert logits[0].tolist() == [0.0 if name == "CAST" else -torch.inf, -torch.inf]


def test_weight_updates_of_all_go_to_the_target_alone(algorithm):
    def original(manager, selector):
        return [(selector, manager)]

    for name, selected in (("CAST", "target"), ("EAGLE3", "all")):
        algorithm(name)
        assert hooks._select_runners(original, "manager") == [(selected, "manager")]
        assert hooks._select_runners(original, "manager", "draft") == [("draft", "manager")]


@pytest.mark.parametrize("has_copy", [True, False])
@pytest.mark.parametrize("tags", [None, ["kv_cache", "weights"]], ids=str)
def test_the_drafts_buffers_outlast_a_sleep(algorithm, monkeypatch, caplog, tags, has_copy):
    """And where its weights do not, the server says so."""
    features = SimpleNamespace(
        enable_weights_cpu_backup=False, enable_draft_weights_cpu_backup=has_copy
    )
    monkeypatch.setattr(weight_updates, "get_exec", lambda: SimpleNamespace(features=features))
    model, calibration = torch.nn.Module(), SimpleNamespace(last_change="")
    model.register_buffer("rotary", torch.arange(4.0))
    draft_worker = SimpleNamespace(draft_runners=[SimpleNamespace(model=model)])
    manager = SimpleNamespace(
        memory_saver_adapter=SimpleNamespace(enabled=True),
        draft_worker=SimpleNamespace(draft_worker=draft_worker, calibration=calibration),
    )
    request = SimpleNamespace(tags=tags)

    def release(manager, request):
        model.rotary.fill_(torch.nan)  # memory that is given away holds anything when it is back
        return "released"

    assert hooks._release_memory(release, manager, request) == "released"
    assert hooks._resume_memory(lambda *args: "resumed", manager, request) == "resumed"
    assert model.rotary.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert "released and resumed" in calibration.last_change
    assert ("--enable-draft-weights-cpu-backup" in caplog.text) == (not has_copy)


@pytest.mark.parametrize(("name", "tags"), [("CAST", ["kv_cache"]), ("EAGLE3", None)])
def test_a_sleep_that_is_not_the_drafts_is_sglangs_own(algorithm, name, tags):
    algorithm(name)
    for hook in (hooks._release_memory, hooks._resume_memory):
        assert hook(lambda manager, request: manager, "manager", SimpleNamespace(tags=tags))


@pytest.mark.parametrize(
    ("name", "rows", "rate", "proposed"),
    [("CAST", 12, 0.25, 8), ("CAST", 4, 0.0, 0), ("EAGLE3", 12, 0.01, 124)],
)
def test_a_requests_rate_is_of_the_drafts_that_were_verified(algorithm, name, rows, rate, proposed):
    algorithm(name)
    accepted = 2 if rows == 12 else 0
    output = SimpleNamespace(spec_num_cap_tokens=[99, rows], spec_verify_ct=[9, 4])

    def original(manager, meta_info, output, i):
        meta_info |= {"spec_accept_rate": 0.01, "spec_num_proposed_drafts": 124}
        meta_info["spec_num_correct_drafts"] = accepted

    info = {}
    hooks._request_rate(original, "manager", info, output, 1)
    assert info["spec_accept_rate"] == rate and info["spec_num_proposed_drafts"] == proposed
    empty = {}
    hooks._request_rate(lambda *args: None, "manager", empty, output, 1)  # nothing decoded yet
    assert empty == {}


@pytest.mark.parametrize("rows", [12, 4])
def test_the_reported_rate_is_of_the_drafts_that_were_verified(algorithm, monkeypatch, rows):
    rates = []
    spec = SimpleNamespace(speculative_algorithm="CAST", speculative_num_draft_tokens=32)
    monkeypatch.setattr(hooks, "get_spec", lambda: spec)

    def original(reporter):
        if reporter.forward_ct_decode % 40 == 0:  # as SGLang computes it, and resets
            rates.append(reporter.spec_num_correct_drafts / (reporter.spec_num_forward_ct * 31))
            reporter.spec_num_correct_drafts = 0

    reporter = SimpleNamespace(
        forward_ct_decode=39,
        decode_log_interval=40,
        is_stats_logging_rank=True,
        current_scheduler_metrics_enabled=False,
        spec_num_correct_drafts=2 if rows == 12 else 0,
        spec_num_forward_ct=4,
        spec_num_cap_tokens=rows,
    )
    hooks._report_decode_stats(original, reporter)
    assert rates == [] and reporter.spec_num_correct_drafts == (2 if rows == 12 else 0)
    reporter.forward_ct_decode = 40
    hooks._report_decode_stats(original, reporter)
    assert rates == [pytest.approx(2 / 8 if rows == 12 else 0.0)]


def test_what_is_hooked_is_there(monkeypatch):
    hooks_by_target = collect_hooks(monkeypatch, hooks)
    hooks.register_hooks()
    assert len(hooks_by_target) >= 9
    for target in hooks_by_target:
        assert callable(hooked(target)), target


def test_the_constructor_builds_our_draft_worker_and_no_other_does():
    from sglang.srt.speculative import eagle_worker_v2

    original = eagle_worker_v2.EagleDraftWorker
    with pytest.raises(RuntimeError), hooks.building_draft_worker(SimpleNamespace):
        assert eagle_worker_v2.EagleDraftWorker is SimpleNamespace
        raise RuntimeError
    assert eagle_worker_v2.EagleDraftWorker is original


BATCH, GRAPH_ROWS, LONGEST = 4, 8, 100


def triton_with_buffers(has_window=False, **buffers):
    """Make SGLang's buffers of captured verify passes, through the hook."""
    backend = object.__new__(TritonAttnBackend)
    facts = dict.fromkeys(("dllm_attention", "swa_v_head_dim"))
    facts |= {"num_head": 2, "max_kv_splits": 3, "v_head_dim": 4, "device": "cpu"}
    facts |= {"lean_total_programs": 1, "lean_block_m": 1, "sliding_window_size": None}
    facts |= {"is_draft_runner": False, "skip_prefill": False, "num_draft_tokens": GRAPH_ROWS}
    facts |= {"use_sliding_window_kv_pool": has_window, "max_context_len": LONGEST}
    hooks._leave_room(lambda backend: vars(backend).update(facts), backend)
    original = TritonAttnBackend.init_cuda_graph_state
    hooks._size_graph_buffers(original, backend, BATCH, BATCH * GRAPH_ROWS, **buffers)
    return backend


def test_captured_passes_have_room_for_one_prefix_per_request(algorithm):
    backend = triton_with_buffers(has_window=True)
    # And for what a step may write past the limit.
    longest = LONGEST + hooks.slots_reserved()
    assert len(backend.cuda_graph_kv_indices) == BATCH * longest
    assert len(backend.cuda_graph_attn_logits) == len(backend.cuda_graph_attn_lse) == BATCH
    # What is there for each row stays.
    assert len(backend.cuda_graph_swa_out_cache_loc) == BATCH * GRAPH_ROWS
    mask = backend.verify_mask
    assert mask.fits(BATCH) and len(mask.buffer) == BATCH * GRAPH_ROWS * (longest + GRAPH_ROWS)


def test_buffers_of_others_are_sglangs(algorithm):
    slots = torch.zeros(7, dtype=torch.int64)  # a draft layer's own list
    backend = triton_with_buffers(kv_indices_buf=slots)
    assert backend.cuda_graph_kv_indices is slots
    assert len(backend.cuda_graph_attn_logits) == BATCH * GRAPH_ROWS
    algorithm("EAGLE3")
    backend = triton_with_buffers()
    assert len(backend.cuda_graph_kv_indices) == BATCH * GRAPH_ROWS * LONGEST
