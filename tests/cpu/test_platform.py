"""Selection of the platform, and how its ranks share a host."""

import os
from importlib import import_module

import pytest

pytest.importorskip("sglang")

from cast_sglang.cpu import platform


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
