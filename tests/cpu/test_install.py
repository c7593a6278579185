"""The seams of SGLang that the platform stands on, and what stands there once it is installed."""

import inspect
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang")

from benchmarks.harness.servers import CPU_PLATFORM
from cast_sglang.cpu import install, sampling
from cast_sglang.cpu.attention import CastCpuAttnBackend, CastCpuMultiStepDraftBackend
from cast_sglang.cpu.names import ATTENTION_BACKEND
from tests.support.kv_pools import make_pool
from tests.support.preloaded import run


@pytest.mark.parametrize("target", install.REPLACED)
def test_replaced_functions_exist_and_take_the_same_arguments(target):
    path, _, name = target.rpartition(".")
    original = inspect.unwrap(getattr(import_module(path), name))
    wanted = list(inspect.signature(original).parameters)
    assert list(inspect.signature(install.REPLACED[target]).parameters) == wanted


def look_at_a_model_process(argv):
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.speculative import eagle_utils, eagle_worker_common, eagle_worker_v2

    assert ATTENTION_BACKEND in ATTENTION_BACKENDS
    assert eagle_utils.top_k_renorm_prob is sampling.top_k_renorm
    sampler = sampling.tree_speculative_sampling
    assert eagle_utils.tree_speculative_sampling_target_only is sampler
    assert eagle_worker_v2.DraftBackendFactory is install.CastCpuDraftBackendFactory
    assert torch.get_device_module() is torch.get_device_module("cpu") is torch.cpu
    assert inspect.unwrap(eagle_utils.verify_tree_greedy_func).__module__.startswith("sglang")
    assert hasattr(eagle_utils.verify_tree_greedy_func, "__wrapped__")
    assert hasattr(eagle_worker_common.fill_bonus_tokens_func, "__wrapped__")


@pytest.mark.slow
def test_platform_is_installed_in_a_model_process(tmp_path):
    code, output = run(look_at_a_model_process, [], CPU_PLATFORM, tmp_path / "log")
    assert code == 0, output


@pytest.mark.parametrize("name", install.FILLED)
def test_filled_names_are_sglangs(name):
    home, _ = install.FILLED[name]
    assert name in vars(import_module(home))


def test_a_missing_kernel_is_filled_wherever_it_was_imported(monkeypatch):
    modules = {
        path: ModuleType(path)
        for path in ("sglang.made_up_home", "sglang.made_up_user", "sglang.made_up_other")
    }
    home, user, other = modules.values()
    home.made_up_kernel = user.made_up_kernel = None
    other.made_up_kernel = other_kernel = object()
    elsewhere = ModuleType("made_up_elsewhere")
    elsewhere.made_up_kernel = None
    for path, module in {**modules, "made_up_elsewhere": elsewhere}.items():
        monkeypatch.setitem(sys.modules, path, module)
    unrelated = sys.modules["sglang.srt.plugins.hook_registry"]

    def ours():
        raise NotImplementedError

    install.fill_missing("made_up_kernel", home, ours)
    assert home.made_up_kernel is ours and user.made_up_kernel is ours
    # A module's own function of that name stays, and other packages are not SGLang's.
    assert other.made_up_kernel is other_kernel and elsewhere.made_up_kernel is None
    assert not hasattr(unrelated, "made_up_kernel")


@pytest.fixture
def factory(monkeypatch):
    """Return a function that makes the factory for this draft backend and number of steps."""
    from sglang.srt.speculative import draft_utils

    monkeypatch.setattr(draft_utils, "attention_backends", lambda: ("none", "none"))
    spec = SimpleNamespace(speculative_attention_mode="prefill")
    monkeypatch.setattr(draft_utils, "get_spec", lambda: spec)

    def make(backend, num_steps):
        config = SimpleNamespace(context_len=16, hf_config=None, hf_text_config=None)
        runner = SimpleNamespace(
            draft_attention_backend=backend,
            use_mla_backend=False,
            token_to_kv_pool=make_pool(),
            req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(2, 16).int()),
            model_config=config,
            linear_attn_model_spec=None,
        )
        return install.CastCpuDraftBackendFactory(runner, 2, num_steps)

    return make


def test_draft_backends_are_the_platforms(factory):
    decode = factory(ATTENTION_BACKEND, 4).create_decode_backend()
    assert isinstance(decode, CastCpuMultiStepDraftBackend)
    assert [type(child) for child in decode.attn_backends] == [CastCpuAttnBackend] * 3
    assert {child.decode_attention_backend_str for child in decode.attn_backends} == {"cast_cpu"}
    extend = factory(ATTENTION_BACKEND, 4).create_draft_extend_backend()
    assert isinstance(extend, CastCpuAttnBackend)
    assert factory(ATTENTION_BACKEND, 1).create_decode_backend() is None


def test_other_draft_backends_are_sglangs(factory):
    with pytest.raises(ValueError, match="not supported in decode attention backend made_up"):
        factory("made_up", 4).create_decode_backend()
