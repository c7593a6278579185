"""SGLang's own backend objects at every number of rows, over dense references of their kernels.

They run in Triton's interpreter, so in a process of their own. What the kernels are given, and that
each number of rows is laid out apart, is checked by `tests.support.dense_attention`; what they
return is compared with attention over the slots of the requests.
"""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_context
from sglang.srt.speculative.eagle_info import EagleVerifyInput

from cast_sglang.cpu.kv_pool import FusedRowKVPool
from cast_sglang.serving.graphs.backends import PlainStepBackend, VerifyBackends
from cast_sglang.serving.host_patches import passes as patches
from cast_sglang.serving.host_patches.passes import sharing_buffers
from cast_sglang.serving.launch.reserve import Captured, reserve_of
from cast_sglang.serving.step_room import STOCK_TREE
from tests.serving.launch.test_reserve import SHAPES
from tests.support import dense_attention
from tests.support.kv_pools import make_pool

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[3]
ROWS, CAPTURED, CONTEXT, RESERVED = 6, 4, 24, 8
HEADS, KV_HEADS, HEAD_DIM, SCALE = 4, 2, 4, 0.5
SLOTS = 192
LENGTHS = [5, 24, 9]  # the second is at the limit of the context; padded to four requests
WINDOW = 7  # keys before a row's own, fewer than one of the requests has
CASES = [  # name, trees, layers with a window, whose slots are others, and sinks
    *(("flashinfer", True, False), ("flashinfer", False, False)),
    *(("trtllm_mha", False, False), ("trtllm_mha", False, True)),
]

if IS_INTERPRETED:
    dense_attention.install()


@pytest.mark.skipif(IS_INTERPRETED, reason="this starts the others")
def test_in_the_interpreter():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            __file__,
            "-p",
            "no:cacheprovider",
            "-n",
            "0",
            "-W",
            "ignore",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    summary = rf"{3 * len(CASES)} passed, 1 skipped(, \d+ warnings?)? in"
    assert re.search(summary, done.stdout), done.stdout[-2000:]


interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="run by the test above")


def windowed_pool(page_size):
    """A pool in which a layer with a window has slots of its own, pages in another order."""
    sizes = {"head_num": KV_HEADS, "head_dim": HEAD_DIM, "page_size": page_size, "device": "cpu"}
    pool = SWAKVPool(
        *(SLOTS, SLOTS),
        dtype=torch.float32,
        swa_attention_layer_ids=[0],
        full_attention_layer_ids=[1],
        token_to_kv_pool_class=FusedRowKVPool,
        enable_kv_cache_copy=True,
        **sizes,
    )
    pages = torch.arange(SLOTS // page_size + 1)
    pages[1:] = pages[1:].flip(0)
    pool.register_mapping((pages.unsqueeze(1) * page_size + torch.arange(page_size)).flatten())
    return pool


def runner_on(name, page_size, has_window, server_args):
    """A model runner without a model, whose requests have their slots in no order."""
    pages = torch.randperm(SLOTS // page_size - 1, generator=torch.Generator().manual_seed(3)) + 1
    width = -(-(CONTEXT + RESERVED) // page_size) * page_size
    slots = (pages.unsqueeze(1) * page_size + torch.arange(page_size)).flatten()
    table = slots[: 4 * width].view(4, width).int()
    sizes = {"head_num": KV_HEADS, "head_dim": HEAD_DIM, "layer_num": 1}
    pool = windowed_pool(page_size)
    if not has_window:
        pool = make_pool(size=SLOTS, page_size=page_size, **sizes)
    allocator = SimpleNamespace(get_kvcache=lambda: pool)
    # Row 0 is that of padding, whose slots are the first.
    table = torch.cat((torch.zeros(1, width, dtype=torch.int32), table))
    config = SimpleNamespace(
        context_len=CONTEXT,
        head_dim=HEAD_DIM,
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        hidden_size=HEADS * HEAD_DIM,
        is_encoder_decoder=False,
        is_multimodal=False,
        num_attention_heads=HEADS,
        v_head_dim=HEAD_DIM,
        get_max_num_attention_heads=lambda: HEADS,
        get_num_kv_heads=lambda *sizes: KV_HEADS,
    )
    runner = SimpleNamespace(
        decode_attention_backend_str=name,
        decode_num_tokens_per_req=lambda: ROWS,
        device="cpu",
        dtype=torch.float32,
        init_new_workspace=False,
        is_draft_worker=False,
        kv_cache_dtype=torch.float32,
        kv_index_translator=KVIndexTranslator(
            req_to_token=table,
            token_to_kv_pool_allocator=allocator,
            token_to_kv_pool=pool,
            page_size=page_size,
            device="cpu",
        ),
        max_running_requests=CAPTURED,
        model=torch.nn.Module(),
        model_config=config,
        page_size=page_size,
        prefill_attention_backend_str=name,
        req_to_token_pool=SimpleNamespace(req_to_token=table, size=4),
        server_args=server_args,
        sliding_window_size=WINDOW if has_window else None,
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=allocator,
        use_mla_backend=False,
    )
    runner.attn_backend = ATTENTION_BACKENDS[name](runner)
    return runner


@pytest.fixture
def served(request, monkeypatch):
    """The backends of a server, whose buffers for captured passes were made by SGLang."""
    name, is_tree, has_window = request.param
    monkeypatch.setattr(patches, "slots_reserved", lambda: RESERVED)
    given = {"speculative_num_draft_tokens": ROWS, "speculative_eagle_topk": 3 if is_tree else 1}
    with get_context().override_server_args(speculative_algorithm="EAGLE3", **given) as args:
        runner = runner_on(name, 16 if name == "trtllm_mha" else 1, has_window, args)
        yield runner, is_tree


LAYER = dict(
    attn_type=AttentionType.DECODER,
    head_dim=HEAD_DIM,
    is_cross_attention=False,
    k_scale=None,
    k_scale_float=None,
    layer_id=0,
    logit_cap=0.0,
    scaling=SCALE,
    tp_k_head_num=KV_HEADS,
    tp_q_head_num=HEADS,
    tp_v_head_num=KV_HEADS,
    v_head_dim=HEAD_DIM,
    v_scale=None,
    v_scale_float=None,
)


def ancestors(rows, is_tree, generator):
    """Return which rows each row sees: itself, and its path to the root; [rows, rows] bool."""
    seen = torch.eye(rows, dtype=torch.bool)
    for row in range(1, rows):
        parent = int(torch.randint(row, (), generator=generator)) if is_tree else row - 1
        seen[row] |= seen[parent]
    return seen


class Pass:
    """One verify pass of `LENGTHS`, its random keys and what it should return."""

    def __init__(self, runner, rows, is_tree):
        generator = torch.Generator().manual_seed(rows)
        self.window, self.sinks, self.translator = -1, None, runner.kv_index_translator
        if runner.sliding_window_size is not None:
            self.window, self.sinks = WINDOW, torch.randn(HEADS, generator=generator)
        self.to_layer = getattr(runner.token_to_kv_pool, "full_to_swa_index_mapping", None)
        self.rows, self.table = rows, runner.req_to_token_pool.req_to_token
        tokens = len(LENGTHS) * rows
        self.q = torch.randn(tokens, HEADS, HEAD_DIM, generator=generator)
        self.k, self.v = torch.randn(2, tokens, KV_HEADS, HEAD_DIM, generator=generator)
        self.seen = [ancestors(rows, is_tree, generator) for _ in LENGTHS]
        self.requests = torch.tensor([2, 4, 1])
        self.caches = runner.token_to_kv_pool.get_kv_buffer(0)
        for cache in self.caches:
            cache.copy_(torch.randn(cache.shape, generator=generator))
        starts = zip(self.requests.tolist(), LENGTHS, strict=True)
        slots = [self.table[request, start : start + rows] for request, start in starts]
        self.slots = torch.cat(slots).long()

    def expected(self):
        found = []
        for number, (request, length) in enumerate(zip(self.requests, LENGTHS, strict=True)):
            rows = slice(number * self.rows, (number + 1) * self.rows)
            slots = self.table[request, : length + self.rows].long()
            if self.to_layer is not None:
                slots = self.to_layer[slots]
            keys, values = (cache[slots].clone() for cache in self.caches)
            keys[length:], values[length:] = self.k[rows], self.v[rows]
            total = length + self.rows
            allowed = dense_attention.up_to_the_own(self.rows, total, window=self.window)
            allowed[:, length:] &= self.seen[number]
            parts = self.q[rows], keys, values, SCALE, allowed, self.sinks
            found.append(dense_attention.attend(*parts)[0])
        return torch.cat(found).flatten(1)

    def spec_info(self):
        parts = [torch.ones(self.rows, length, dtype=torch.bool) for length in LENGTHS]
        masks = [torch.cat(pair, dim=1) for pair in zip(parts, self.seen, strict=True)]
        fields = dict.fromkeys(EagleVerifyInput.__dataclass_fields__)
        fields |= {"draft_token_num": self.rows, "num_tokens_per_req": -1, "topk": 1}
        fields["custom_mask"] = torch.cat([mask.flatten() for mask in masks])
        return EagleVerifyInput(**fields)

    def batch(self, knows_lengths, padding=0):
        """Return SGLang's batch of it, with requests of padding behind."""
        lengths = torch.tensor(LENGTHS + [1] * padding)
        no_requests = torch.zeros(padding, dtype=torch.int64)
        tokens = len(lengths) * self.rows
        requests = torch.cat((self.requests, no_requests))
        slots = torch.cat((self.slots, no_requests.repeat(self.rows)))
        plan = self.translator.plan(
            req_pool_indices=requests, seq_lens=lengths, seq_lens_cpu=None, write_virtual=slots
        )
        return SimpleNamespace(
            _attn_output=None,
            batch_size=len(lengths),
            encoder_lens=None,
            forward_mode=ForwardMode.TARGET_VERIFY,
            input_ids=torch.zeros(tokens),
            kv_loc_plan=plan,
            out_cache_loc=slots,
            out_cache_loc_is_physical=True,
            positions=torch.zeros(tokens),
            req_pool_indices=requests,
            seq_lens=lengths,
            seq_lens_cpu=lengths.clone() if knows_lengths else None,
            seq_lens_sum=int(lengths.sum()) if knows_lengths else None,
            spec_info=self.spec_info(),
        )

    def run(self, backend, batch):
        padding = batch.batch_size - len(LENGTHS)
        rows = [
            torch.cat((part, part.new_zeros(padding * self.rows, *part.shape[1:])))
            for part in (self.q, self.k, self.v)
        ]
        layer, more = SimpleNamespace(**LAYER, sliding_window_size=self.window), {}
        if self.sinks is not None:
            more["sinks"] = self.sinks
        attended = backend.forward(*rows, layer, batch, save_kv_cache=True, **more)
        return attended.reshape(-1, HEADS * HEAD_DIM)[: len(self.q)]


def inner(backend):
    return backend.backend if isinstance(backend, PlainStepBackend) else backend


@interpreted
@pytest.mark.parametrize("served", CASES, indirect=True)
def test_each_number_of_rows_is_attended_to_kernel_by_kernel(served):
    runner, is_tree = served
    backends = VerifyBackends(runner)
    for rows in (*range(ROWS, 0, -1), ROWS, 3):
        wanted, backend = Pass(runner, rows, is_tree), backends.at(rows)
        batch = wanted.batch(knows_lengths=backends.shared.needs_cpu_seq_lens)
        expected = wanted.expected()
        backend.init_forward_metadata(batch)
        torch.testing.assert_close(wanted.run(backend, batch), expected)


def captured(backends, wanted):
    """Make the buffers of captured passes of this size; return the static batch and its layout."""
    rows, knows_lengths = wanted.rows, backends.shared.needs_cpu_seq_lens
    backend = backends.at(rows)
    with contextlib.ExitStack() as stack:
        if backends.has_own_buffers(rows) and backend is not backends.shared:
            stack.enter_context(sharing_buffers(backend, backends.shared))
            backend.init_cuda_graph_state(CAPTURED, CAPTURED * rows)
    if isinstance(backend, PlainStepBackend) and not backends.has_own_buffers(rows):
        with patches.keeping_buffers(backend.backend):
            backend.init_cuda_graph_state(CAPTURED, CAPTURED)
    static = wanted.batch(knows_lengths, padding=CAPTURED - len(LENGTHS))
    static.seq_lens.fill_(1)
    static.req_pool_indices.fill_(0)
    if knows_lengths:
        static.seq_lens_cpu, static.seq_lens_sum = torch.ones(CAPTURED).long(), CAPTURED
    static.spec_info.custom_mask = torch.ones(CAPTURED * rows * (rows + 1), dtype=torch.bool)
    backend.init_forward_metadata_out_graph(static, in_capture=True)
    backend.init_forward_metadata_in_graph(static)
    patches.plan_on_the_host(backend)
    return static, inner(backend).forward_metadata


@interpreted
@pytest.mark.parametrize("served", CASES, indirect=True)
def test_captured_passes_of_every_number_of_rows_stand_side_by_side(served):
    """Each is laid out before its replay, where its capture left the layout and nowhere else."""
    runner, is_tree = served
    backends, layouts = VerifyBackends(runner), {}
    backends.shared.init_cuda_graph_state(CAPTURED, CAPTURED * ROWS)
    knows_lengths = backends.shared.needs_cpu_seq_lens
    for rows in range(ROWS, 0, -1):
        layouts[rows] = captured(backends, Pass(runner, rows, is_tree))
    for rows in (*range(1, ROWS + 1), 2, ROWS):
        wanted, backend = Pass(runner, rows, is_tree), backends.at(rows)
        view, (static, layout) = wanted.batch(knows_lengths, CAPTURED - len(LENGTHS)), layouts[rows]
        for name in ("seq_lens", "req_pool_indices", "out_cache_loc"):
            getattr(static, name).copy_(getattr(view, name))
            setattr(view, name, getattr(static, name))
        expected = wanted.expected()
        backend.init_forward_metadata_out_graph(view)
        # What was captured runs again.
        inner(backend).forward_metadata = layout
        backend.init_forward_metadata_in_graph(static)
        torch.testing.assert_close(wanted.run(backend, static), expected)


def taken(backends):
    """Return the bytes of all tensors of these objects, each memory once, their wrappers too."""
    found, seen, parts = {}, set(), list(backends)
    while parts:
        part = parts.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, torch.Tensor):
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, list | tuple):
            parts += part
        elif type(part).__module__.startswith(("sglang.srt.layers.attention", "tests.", "cast_")):
            parts += vars(part).values()
    return sum(found.values())


@interpreted
@pytest.mark.parametrize("served", CASES, indirect=True)
def test_no_more_is_kept_than_is_counted(served):
    runner, is_tree = served
    backends, name = VerifyBackends(runner), runner.decode_attention_backend_str
    backends.shared.init_cuda_graph_state(CAPTURED, CAPTURED * ROWS)
    captured(backends, Pass(runner, ROWS, is_tree))
    before = taken([backends.shared])
    for rows in (4, 3, 1):
        captured(backends, Pass(runner, rows, is_tree))
    more = taken([backends.shared, *map(backends.at, (4, 3, 1))]) - before
    shapes = SHAPES._replace(
        backend=name,
        captured=Captured(own_rows=(1, 3, 4)) if name == "trtllm_mha" else Captured(num_plans=3),
        captured_requests=CAPTURED,
        context=CONTEXT,
        heads=HEADS,
        max_requests=CAPTURED,
        num_draft_tokens=STOCK_TREE[2] + ROWS,
    )
    counted = {item.name: item.size for item in reserve_of(shapes).items}
    parts = ("backends of captured verify by rows", "plans of captured verify")
    found = sum(counted.get(part, 0) for part in parts)
    assert 0.9 * found <= more <= found
    if name == "flashinfer":  # the lists and the mask of so many rows beyond SGLang's tree
        lists = *backends.shared.cuda_graph_kv_indices, backends.shared.cuda_graph_custom_mask
        assert counted["lists and mask of captured verify"] == sum(part.nbytes for part in lists)
