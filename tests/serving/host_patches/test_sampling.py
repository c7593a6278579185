"""Sampling in a verify pass cuts as plain decoding does and leaves lone tokens to its sampler."""

import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.layers import sampler as sglang_sampler
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from sglang.srt.sampling.sampling_params import TOP_K_ALL

from cast_sglang.cpu.sampling import top_k_renorm, top_p_renorm
from cast_sglang.serving.host_patches import sampling
from cast_sglang.serving.host_patches.sampling import sample_as_plain, sampling_as_plain
from cast_sglang.serving.requests import SamplingNeeds
from cast_sglang.serving.step import Drawn
from tests.support.copies import DEVICE, watched_copies

VOCAB, ROWS = 40, 3


@dataclass
class Info:
    """SGLang's `SamplingBatchInfo`, as far as it is read here."""

    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    min_ps: torch.Tensor
    need_top_k_sampling: bool = True
    need_top_p_sampling: bool = True
    need_min_p_sampling: bool = True
    is_all_greedy: bool = False
    acc_additive_penalties: torch.Tensor | None = None
    acc_scaling_penalties: torch.Tensor | None = None
    logit_bias: torch.Tensor | None = None
    has_custom_logit_processor: bool = False
    custom_logit_processor: dict | None = None


@dataclass
class Entry:
    """SGLang's `ProcessorEntry`, as far as it is read here."""

    processor: object
    rows: list[int]


@dataclass
class Batch:
    sampling_info: Info
    forward_mode: SimpleNamespace = field(
        default_factory=lambda: SimpleNamespace(is_idle=lambda: False)
    )


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """The kernels of the CPU platform, one rank, and plain decoding's backend, to be changed."""
    kernel = SimpleNamespace(sampling_backend="pytorch")
    monkeypatch.setattr(sampling, "get_exec", lambda: SimpleNamespace(kernel=kernel))
    monkeypatch.setattr(sampling, "get_parallel", lambda: SimpleNamespace(tp_size=1))
    monkeypatch.setattr(sampling, "top_k_renorm_prob", top_k_renorm)
    monkeypatch.setattr(sampling, "top_p_renorm_prob", top_p_renorm)
    return kernel


def make_info(*rows: tuple[float, int, float, float]) -> Info:
    """Return the parameters of requests: temperature, top_k, top_p, min_p."""
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    return Info(columns[0][:, None], columns[1], columns[2], columns[3])


REQUESTS = (
    (1.0, TOP_K_ALL, 1.0, 0.0),
    (0.7, 5, 0.8, 0.0),
    (1.5, TOP_K_ALL, 0.6, 0.1),
    (1.0, 1, 1.0, 0.0),
    (2.0, 12, 0.95, 0.3),
)


def make_logits(seed: int, info: Info) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(ROWS * len(info.top_ks), VOCAB, generator=generator)


@pytest.mark.parametrize("seed", range(5))
def test_every_node_is_cut_as_the_plain_sampler_cuts(seed):
    info = make_info(*REQUESTS)
    logits = make_logits(seed, info)
    kept = sampling._truncated(logits, info, ROWS)
    expand = lambda values: values.repeat_interleave(ROWS, dim=0)  # noqa: E731
    probs = (logits / expand(info.temperatures)).softmax(-1)
    _, weights, tokens, _ = sglang_sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        probs,
        *(expand(values) for values in (info.top_ks, info.top_ps, info.min_ps)),
        True,
        None,
        None,
        return_filtered_probs=True,
    )
    expected = torch.zeros_like(probs).scatter_(1, tokens.long(), weights)
    torch.testing.assert_close(
        kept / kept.sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True)
    )


def test_flashinfer_cuts_by_top_k_first_where_it_cuts_by_min_p(host):
    info = make_info((1.0, 3, 0.75, 0.01))
    logits = torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.1]]).log()
    assert (sampling._truncated(logits, info, 1) > 0).sum() == 3
    host.sampling_backend = "flashinfer"
    # 0.3 + 0.25 of 0.75 is below the 0.75 asked, the third token ends it either way.
    assert (sampling._truncated(logits, info, 1) > 0).sum() == 3
    info.top_ps = torch.tensor([0.7])
    # Before the cut by top-k three tokens are needed for 0.7, behind it two have 0.73.
    assert (sampling._truncated(logits, info, 1) > 0).sum() == 2
    host.sampling_backend = "pytorch"
    assert (sampling._truncated(logits, info, 1) > 0).sum() == 3


def run(info: Info, logits: torch.Tensor, needs: SamplingNeeds | None):
    """Sample as SGLang would call it; return what its own function saw, and the result."""
    seen = {}
    num = len(info.top_ks)

    def original(verify_input, batch, logits_output, grammar_mask):
        seen.update(info=batch.sampling_info, logits=logits_output.next_token_logits.clone())
        seen["grammar_mask"] = grammar_mask
        index = torch.arange(num * ROWS, dtype=torch.int32).view(num, ROWS)
        return torch.full((num * ROWS,), 7, dtype=torch.int32), torch.full((num,), ROWS), index

    def sampler(output, info, return_logprob, top, ids, positions):
        seen.update(root_logits=output.next_token_logits.clone(), positions=positions)
        output.next_token_logits.zero_()  # SGLang's own works in place
        return torch.arange(num) + 20

    batch, output = Batch(info), SimpleNamespace(next_token_logits=logits.clone())
    verify_input = SimpleNamespace(
        draft_token_num=ROWS, positions=torch.arange(num * ROWS), retrieve_index=None
    )
    with sampling_as_plain(needs, sampler):
        result = sample_as_plain(original, verify_input, batch, output)
    assert batch.sampling_info is info
    return seen, result, output.next_token_logits


def test_what_needs_nothing_is_left_to_sglang():
    info = make_info(*REQUESTS)
    logits = make_logits(0, info)
    seen, _, after = run(info, logits, None)
    assert seen["info"] is info and torch.equal(seen["logits"], logits)
    assert torch.equal(after, logits)


def test_the_cut_is_made_before_sglang_samples_and_leaves_the_logits_for_logprobs():
    info = make_info(*REQUESTS)
    info.logit_bias = torch.randn(len(REQUESTS), VOCAB)
    info.acc_additive_penalties = -torch.rand(len(REQUESTS), VOCAB)
    logits = make_logits(1, info)
    seen, _, after = run(info, logits, SamplingNeeds(True, None))
    biased = logits + (info.acc_additive_penalties + info.logit_bias).repeat_interleave(ROWS, 0)
    torch.testing.assert_close(after, biased)
    expected = sampling._truncated(biased, info, ROWS)
    torch.testing.assert_close(
        seen["logits"].softmax(-1), expected / expected.sum(-1, keepdim=True)
    )
    assert seen["info"].logit_bias is None and seen["info"].acc_additive_penalties is None
    assert not (seen["info"].need_top_k_sampling or seen["info"].need_top_p_sampling)
    assert (seen["info"].temperatures == 1).all()


def test_a_node_where_everything_is_banned_leaves_the_others_alone():
    """Where a grammar allows only the end, and `min_new_tokens` forbids it."""
    info = make_info(*REQUESTS)
    num_rows = len(REQUESTS) * ROWS
    info.acc_additive_penalties = torch.zeros(len(REQUESTS), VOCAB)
    info.acc_additive_penalties[1, 4] = -torch.inf
    allowed = torch.zeros(num_rows, VOCAB)
    allowed[ROWS] = -torch.inf
    allowed[ROWS, 4] = 0.0  # the end
    mask = SimpleNamespace(apply=lambda logits: logits.add_(allowed))
    logits = make_logits(4, info)
    expected = logits.clone()
    expected[ROWS : 2 * ROWS, 4] = -torch.inf
    expected[ROWS] = -torch.inf
    expected[ROWS, 0] = 0.0  # as greedy decoding has it
    sampling._bias(logits, info, ROWS, mask)
    assert torch.equal(logits, expected)


def test_plain_requests_get_the_plain_samplers_token_and_no_draft():
    info = make_info(*REQUESTS)
    logits = make_logits(2, info)
    is_plain = np.array([False, True, False, True, False])
    seen, (predict, accept_lens, accept_index), after = run(
        info, logits, SamplingNeeds(False, is_plain)
    )
    assert torch.equal(seen["root_logits"], logits[::ROWS])
    assert seen["positions"].tolist() == [0, 3, 6, 9, 12]
    assert torch.equal(after, logits)
    assert predict.view(-1, ROWS)[:, 0].tolist() == [7, 21, 7, 23, 7]
    assert (predict.view(-1, ROWS)[:, 1:] == 7).all()
    assert accept_lens.tolist() == [ROWS, 1, ROWS, 1, ROWS]
    assert accept_index[1].tolist() == [3, -1, -1] and accept_index[2].tolist() == [6, 7, 8]


def test_a_custom_processor_changes_the_logits_of_plain_rows_for_logprobs_too(monkeypatch):
    info = make_info(*REQUESTS)
    info.has_custom_logit_processor = True
    monkeypatch.setattr(
        sampling, "apply_custom_logit_processor", lambda logits, info: logits[:, 3].fill_(-9.0)
    )
    logits = make_logits(3, info)
    is_plain = np.array([False, True, False, False, False])
    seen, _, after = run(info, logits, SamplingNeeds(False, is_plain))
    assert (seen["root_logits"][:, 3] == -9.0).all()
    expected = logits.clone()
    expected[ROWS, 3] = -9.0
    assert torch.equal(after, expected)


class Asked:
    """A request, as far as it is ended here; processors have a weak reference."""

    to_finish = None


def test_a_processor_that_fails_ends_its_own_request():
    processor = DisallowedTokensLogitsProcessor()
    ids: list[object] = [[1], [1, 3], "none", [VOCAB], [2]]
    requests = [Asked() for _ in ids]
    params = [
        {"token_ids": tokens, "__req__": weakref.proxy(request)}
        for tokens, request in zip(ids, requests, strict=True)
    ]
    params[2].pop("token_ids")
    info = make_info(*REQUESTS)
    info.custom_logit_processor = {5: Entry(processor, list(range(5)))}
    [entry] = sampling.guarded(info).custom_logit_processor.values()
    logits = torch.zeros(len(ids), VOCAB)
    result = entry.processor(logits, params)
    assert [row.isinf().nonzero().flatten().tolist() for row in result] == [
        [1],
        [1, 3],
        [],
        [],
        [2],
    ]
    ended = [number for number, request in enumerate(requests) if request.to_finish is not None]
    assert ended == [2, 3]
    assert requests[2].to_finish.status_code == 400
    assert "KeyError('token_ids')" in requests[2].to_finish.message
    assert not logits.any()


@pytest.mark.parametrize("result", [torch.zeros(1, VOCAB), torch.zeros(2, VOCAB + 1), None])
def test_a_processor_must_return_what_it_got(result):
    request = Asked()
    params = [{"__req__": request}, None]  # of a front end that does not give the second one any
    logits = torch.ones(2, VOCAB)
    assert torch.equal(sampling._processed(lambda *args: result, logits, params), logits) == (
        result is None or result.shape[1] > VOCAB
    )
    assert (request.to_finish is not None) == (result is None or result.shape[1] > VOCAB)


def test_drawn_drafts_are_accepted_by_rejection_beside_greedy_and_plain_requests():
    """Where the target is sure, so that no coin matters."""
    info = make_info((0.7, TOP_K_ALL, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.3, TOP_K_ALL, 0.9, 0.0))
    num = len(info.top_ks)
    wanted = torch.tensor([[11, 12, 13], [21, 22, 23], [31, 32, 33]])  # behind each node
    logits = torch.full((num, ROWS, VOCAB), -50.0).scatter_(2, wanted.unsqueeze(2), 50.0)
    # A root with a child, and that with one: all right, the first wrong, right but plain.
    drafted = torch.tensor([[0, 11, 12], [0, 5, 22], [0, 31, 32]])
    kept = torch.arange(10, 35).repeat(num, 2, 1)
    drawn = Drawn(
        proposals=torch.full(kept.shape, 1.0 / kept.shape[2]),
        tokens=kept,
        proposers=torch.tensor([[0, 0, 1]] * num),
        is_drawn=torch.tensor([True, False, True]),
    )
    batch, output = Batch(info), SimpleNamespace(next_token_logits=logits.view(-1, VOCAB))
    verify_input = SimpleNamespace(
        draft_token_num=ROWS,
        draft_token=drafted.flatten(),
        positions=torch.arange(num * ROWS),
        retrieve_next_token=torch.tensor([[1, 2, -1]] * num),
        retrieve_next_sibling=torch.full((num, ROWS), -1),
        max_tree_depth=ROWS,
        drawn=drawn,
    )
    needs = SamplingNeeds(True, np.array([False, False, True]))

    def sampler(output, *args):
        return output.next_token_logits.argmax(-1)

    with sampling_as_plain(needs, sampler):
        predict, lens, index = sample_as_plain(None, verify_input, batch, output)
    assert lens.tolist() == [3, 1, 1]
    assert index.tolist() == [[0, 1, 2], [3, -1, -1], [6, -1, -1]]
    assert predict[:3].tolist() == [11, 12, 13]
    assert predict[3] == 21 and predict[6] == 31
    assert {part.dtype for part in (predict, lens, index)} == {torch.int32}


@pytest.mark.parametrize("needs", [None, SamplingNeeds(True, np.array([True, False, True]))])
def test_where_nothing_is_drafted_the_sampler_of_plain_decoding_serves_all(needs):
    info = make_info(*REQUESTS[:3])
    logits = make_logits(0, info)[::ROWS].contiguous()
    info.logit_bias = torch.zeros_like(logits)
    info.logit_bias[1, 2] = 50.0
    output = SimpleNamespace(next_token_logits=logits)
    verify_input = SimpleNamespace(
        draft_token_num=1, positions=torch.tensor([5, 6, 7]), max_tree_depth=2
    )
    seen = []

    def sampler(output, info, return_logprob, top, ids, positions):
        seen.append(positions.tolist())
        tokens = output.next_token_logits.argmax(-1)
        output.next_token_logits.zero_()  # SGLang's own works in place
        return tokens

    with sampling_as_plain(needs, sampler):
        predict, lens, index = sample_as_plain(None, verify_input, Batch(info), output)
    assert predict.tolist() == logits.argmax(-1).tolist() and predict[1] == 2
    assert logits.any()
    assert lens.tolist() == [1, 1, 1] and index.tolist() == [[0, -1], [1, -1], [2, -1]]
    assert seen == [[5, 6, 7]]
    assert {part.dtype for part in (predict, lens, index)} == {torch.int32}


def test_marked_texts_are_left_to_sglang_s_verify():
    info = make_info(*REQUESTS)
    info.has_watermark_candidates = True
    asked = []

    def original(*args, **kwargs):
        asked.append(kwargs)
        return "sampled"

    verify_input = SimpleNamespace(draft_token_num=ROWS, drawn="drawn")
    output = SimpleNamespace(next_token_logits=make_logits(0, info))
    with sampling_as_plain(None, None):
        found = sample_as_plain(original, verify_input, Batch(info), output, watermark_state="on")
    assert found == "sampled" and asked == [{"watermark_state": "on"}]


def test_nothing_waits_to_say_who_is_decoded_plainly(monkeypatch):
    is_plain = np.array([False, True])
    index = torch.zeros(2, ROWS, dtype=torch.int32, device=DEVICE)
    found = index.flatten(), index[:, 0].contiguous(), index
    logits = torch.zeros(2 * ROWS, VOCAB, device=DEVICE)
    info = make_info(REQUESTS[0], REQUESTS[1])
    verify_input = SimpleNamespace(positions=torch.zeros(2 * ROWS, device=DEVICE))
    with (
        watched_copies(monkeypatch) as spy,
        sampling_as_plain(
            SamplingNeeds(False, is_plain), lambda output, *args: output.next_token_logits[:, 0]
        ),
    ):
        sampling._with_plain_tokens(found, logits, Batch(info), verify_input, ROWS)
    assert spy.num_copies == 1 and spy.waits == []
