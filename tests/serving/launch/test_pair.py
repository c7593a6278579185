"""Drafts: what they read is judged by what SGLang builds, not by names."""

import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import pytest

from cast_sglang.serving.launch.identity import is_eagle3_config


def config_of(name):
    return SimpleNamespace(architectures=[name])


@pytest.mark.parametrize(
    ("name", "is_eagle3"),
    [
        ("LlamaForCausalLMEagle3", True),
        ("Eagle3DeepseekV2ForCausalLM", True),
        ("LlamaForCausalLMEagle", False),
        ("Qwen2ForCausalLMEagle", False),
        ("MistralLarge3ForCausalLMEagle", False),
    ],
)
def test_what_a_draft_reads_does_not_depend_on_how_its_name_ends(name, is_eagle3):
    assert is_eagle3_config(config_of(name)) == is_eagle3


def test_every_eagle3_head_of_sglang_is_known():
    """SGLang tells them apart by the flag alone, so a new one is to be looked at."""
    import sglang.srt.models as models

    found = {}
    for module in pkgutil.iter_modules(models.__path__):
        if "eagle" in module.name:
            loaded = importlib.import_module(f"{models.__name__}.{module.name}")
            entry = loaded.EntryClass
            for each in entry if isinstance(entry, list) else [entry]:
                source = inspect.getsource(inspect.getmodule(each))
                found[each.__name__] = "d2t" in source, is_eagle3_config(config_of(each.__name__))
    assert len(found) >= 6
    assert {name for name, (maps, known) in found.items() if maps != known} == set()
