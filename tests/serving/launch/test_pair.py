"""Targets and drafts: what is served is judged by what SGLang builds, not by names."""

import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import pytest
from sglang.srt.configs.model_config import AttentionArch
from transformers import LlamaConfig

from cast_sglang.errors import HostError
from cast_sglang.serving.launch.identity import is_eagle3_config
from cast_sglang.serving.launch.pair import check_target


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


def target_of(config, arch=AttentionArch.MHA):
    return SimpleNamespace(
        hf_config=config,
        hf_text_config=config,
        attention_arch=arch,
        is_draft_model=False,
        linear_attn_registry_result=None,
    )


def test_targets_of_one_attention_are_served():
    check_target("some/target", target_of(LlamaConfig()))


@pytest.mark.parametrize("name", ["Qwen3NextConfig", "NemotronHConfig", "FalconH1Config"])
def test_targets_with_linear_attention_are_refused(name):
    import sglang.srt.configs as configs

    with pytest.raises(HostError, match="^--model-path some/target.*linear-attention.*NEXTN"):
        check_target("some/target", target_of(getattr(configs, name)()))


def test_targets_with_latent_attention_are_refused():
    with pytest.raises(HostError, match="^--model-path some/target.*MLA.*NEXTN"):
        check_target("some/target", target_of(LlamaConfig(), AttentionArch.MLA))
