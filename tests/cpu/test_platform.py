"""Selection of the platform, its KV pool, and the seams of SGLang it stands on."""

import inspect
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

pytest.importorskip("sglang")

from cast_sglang.cpu import install, platform
from cast_sglang.cpu.kv_pool import FusedRowKVPool
from cast_sglang.errors import HostError


def test_not_selected_means_not_active(monkeypatch):
    monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
    assert platform.activate() is None
    monkeypatch.setenv("SGLANG_PLATFORM", "another")
    assert platform.activate() is None


def test_selected_names_the_platform_class(monkeypatch):
    monkeypatch.setenv("SGLANG_PLATFORM", platform.PLATFORM_NAME)
    monkeypatch.setattr(platform.glob, "glob", lambda pattern: [])
    for variable in ("OMP_WAIT_POLICY", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(variable, "kept")
    module, _, name = platform.activate().partition(":")
    assert getattr(import_module(module), name) is platform.CastCpuPlatform
    assert os.environ["OMP_WAIT_POLICY"] == "kept"


def test_a_gpu_host_is_warned_about(monkeypatch, caplog):
    monkeypatch.setenv("SGLANG_PLATFORM", platform.PLATFORM_NAME)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setattr(platform.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    assert platform.activate()
    assert "hidden from SGLang" in caplog.text
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    "num_ranks,threads,groups", [(1, "4", "0,1,2,3"), (2, "2", "0,1|2,3"), (8, "1", None)]
)
def test_ranks_share_the_cores(monkeypatch, num_ranks, threads, groups):
    for variable in ("OMP_NUM_THREADS", "SGLANG_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(platform.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    platform.share_cores(num_ranks)
    assert os.environ["OMP_NUM_THREADS"] == threads
    bind = os.environ["SGLANG_CPU_OMP_THREADS_BIND"]
    assert bind == groups if groups else len(bind.split("|")) == num_ranks


@pytest.mark.parametrize("target", install.REPLACED)
def test_replaced_functions_exist_and_take_the_same_arguments(target):
    path, _, name = target.rpartition(".")
    original = inspect.unwrap(getattr(import_module(path), name))
    wanted = list(inspect.signature(original).parameters)
    assert list(inspect.signature(install.REPLACED[target]).parameters) == wanted


def test_platform_is_installed_in_a_model_process():
    script = (
        "import sglang.srt.model_executor.model_runner\n"
        "from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS\n"
        "from sglang.srt.speculative import eagle_utils, eagle_worker_common, eagle_worker_v2\n"
        "from cast_sglang.cpu import install, kernels, sampling\n"
        "assert 'cast_cpu' in ATTENTION_BACKENDS\n"
        "unwrap = lambda f: getattr(f, '__wrapped__', f)\n"
        "assert eagle_utils.top_k_renorm_prob is sampling.top_k_renorm\n"
        "sampler = sampling.tree_speculative_sampling\n"
        "assert eagle_utils.tree_speculative_sampling_target_only is sampler\n"
        "factory = install.CastCpuDraftBackendFactory\n"
        "assert eagle_worker_v2.DraftBackendFactory is factory\n"
        "assert unwrap(eagle_utils.verify_tree_greedy_func).__module__.startswith('sglang')\n"
        "assert hasattr(eagle_utils.verify_tree_greedy_func, '__wrapped__')\n"
        "assert hasattr(eagle_worker_common.fill_bonus_tokens_func, '__wrapped__')\n"
    )
    environment = os.environ | {"SGLANG_PLATFORM": platform.PLATFORM_NAME}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


def make_pool(dtype=torch.float32, **changes):
    fields = dict(
        size=32,
        page_size=1,
        dtype=dtype,
        head_num=2,
        head_dim=4,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
        enable_kv_cache_copy=True,
    )
    return FusedRowKVPool(**(fields | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_rows_are_the_keys_and_values_sglang_sees(dtype):
    pool = make_pool(dtype)
    slots = torch.tensor([5, 1, 30])
    k, v = torch.randn(3, 2, 4).to(dtype), torch.randn(3, 2, 4).to(dtype)
    pool.write(1, slots, k, v)
    assert torch.equal(pool.get_key_buffer(1)[slots], k)
    assert torch.equal(pool.get_value_buffer(1)[slots], v)
    expected = torch.cat((k.flatten(1), v.flatten(1)), dim=1)
    assert torch.equal(pool.layer_rows(1)[slots], expected)
    assert not pool.get_key_buffer(0).any() and not pool.get_key_buffer(2).any()


def test_pool_moves_slots_of_all_layers():
    pool = make_pool()
    pool.storage.copy_(torch.randn(pool.storage.shape))
    before = pool.storage.clone()
    # Overlapping, as an accepted path that begins where it belongs and moves up by one later.
    pool.move_kv_cache(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 3, 4, 9]))
    assert torch.equal(pool.storage[:, [0, 1, 2, 3, 4]], before[:, [0, 1, 3, 4, 9]])
    assert torch.equal(pool.storage[:, 5:], before[:, 5:])


def test_pool_refuses_what_a_row_cannot_hold():
    with pytest.raises(HostError, match="one head size"):
        make_pool(v_head_dim=8)
