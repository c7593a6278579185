"""The host contract: it holds for the SGLang that is here, it is complete, and it sees changes."""

import pytest

from cast_sglang.errors import HostError
from cast_sglang.serving.launch import host_contract
from cast_sglang.serving.launch.host_contract import (
    HostSource,
    broken_promises,
    host_source,
    read_contract,
)


def test_the_contract_holds_for_this_sglang():
    contract = read_contract()
    assert len(contract) > 150
    assert broken_promises(host_source(), contract) == []


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        # A hook's target, an overridden method, a called function, a replaced kernel, a constant.
        ("sglang.srt.managers.scheduler.Scheduler.get_internal_state", "(self, recv_req)"),
        ("sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2.verify", None),
        ("sglang.srt.mem_cache.allocation_sizing.get_alloc_reserve_per_decode", "()"),
        ("sglang.kernels.ops.speculative.spec_tree.build_tree_kernel_efficient_func", None),
        ("sglang.srt.sampling.sampling_params.TOP_K_ALL", "value"),
        ("sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker", None),
    ],
)
def test_it_lists_what_is_used_in_every_way(name, signature):
    assert name in read_contract()
    assert signature is None or read_contract()[name] == signature


@pytest.fixture
def source(tmp_path) -> HostSource:
    files = {
        "__init__.py": "",
        "a/__init__.py": "from sglang.a.b import Base as Renamed\nfrom .b import function\n",
        "a/b.py": """
import typing
from typing import Any
LIMIT = 3
x, y = 1, 2
def function(a, /, b, c=1, *rest, d, e=2, **more): pass
async def later(*, a): pass
class Base:
    def __init__(self, a, b=None): pass
    def method(self, a): pass
class Record:
    first: int
    second: int = 2
class Empty: pass
class Wrapped:
    def method(self): pass
Wrapped = typing.final(Wrapped)
""",
        "d.py": "from typing import *\nfrom .a.b import *\n",
        "c.py": """
from sglang.a import Renamed
from sglang import a
try:
    from sglang.a.b import later
except ImportError:
    later = None
if True:
    def chosen(a): pass
else:
    chosen = None
class Derived(Renamed):
    def own(self): pass
    attribute = 1
""",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return HostSource(tmp_path)


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("a", "module"),
        ("a.b", "module"),
        ("a.b.LIMIT", "value"),
        ("a.b.y", "value"),
        ("a.b.function", "(a, /, b, c=, *rest, d, e=, **more)"),
        ("a.function", "(a, /, b, c=, *rest, d, e=, **more)"),
        ("a.b.Base", "class(self, a, b=)"),
        ("a.Renamed.method", "(self, a)"),
        ("a.b.Record", "class(first, second=)"),
        ("a.b.Empty", "class"),
        ("a.b.Wrapped.method", "(self)"),
        ("a.b.Any", "value"),
        ("c.later", "(*, a)"),
        ("c.chosen", "(a)"),
        ("c.Derived", "class(self, a, b=)"),
        ("c.Derived.method", "(self, a)"),
        ("c.Derived.attribute", "value"),
        ("c.Derived.missing", None),
        ("c.missing", None),
        ("d.Record", "class(first, second=)"),
        ("d.missing", None),
        ("missing.c", None),
        ("a.b.function.within", None),
    ],
)
def test_signatures_are_read_from_the_source(source, name, signature):
    assert source.signature(f"sglang.{name}") == signature


def test_what_changed_is_named(source):
    contract = {
        "sglang.a.b.LIMIT": "value",
        "sglang.a.b.later": "(*, a, b)",
        "sglang.a.b.gone": "()",
    }
    assert broken_promises(source, contract) == [
        "sglang.a.b.later is (*, a), not (*, a, b)",
        "sglang.a.b.gone is not there",
    ]


def test_without_sglang_there_is_nothing_to_check(monkeypatch):
    monkeypatch.setattr(host_contract, "_HOST", "no_such_host")
    with pytest.raises(HostError, match="not installed"):
        host_source()
