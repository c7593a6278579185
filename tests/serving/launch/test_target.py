"""Targets: what is served, and how, is judged by what SGLang builds, not by names."""

from types import SimpleNamespace

import pytest
import sglang.srt.configs as configs
from sglang.srt.configs.model_config import AttentionArch
from transformers import LlamaConfig

from cast_sglang.errors import HostError
from cast_sglang.serving.launch.target import check_target, keeps_states, why_chains


def target_of(config, arch=AttentionArch.MHA):
    return SimpleNamespace(
        hf_config=config,
        hf_text_config=config,
        attention_arch=arch,
        is_draft_model=False,
        linear_attn_registry_result=None,
    )


def test_targets_of_one_attention_take_trees():
    target = target_of(LlamaConfig())
    check_target("some/target", target)
    assert why_chains(target) is None and not keeps_states(target)


@pytest.mark.parametrize(
    "config", [configs.Qwen3NextConfig, configs.Qwen3_5Config, configs.Qwen3_5MoeConfig]
)
def test_gated_delta_nets_take_chains(config):
    target = target_of(config())
    check_target("some/target", target)
    assert keeps_states(target) and "state for each verified row" in why_chains(target)


@pytest.mark.parametrize(
    "config",
    [
        configs.NemotronHConfig,
        configs.FalconH1Config,
        configs.KimiLinearConfig,
        configs.Qwen4ExpConfig,
    ],
)
def test_targets_with_other_linear_attention_are_refused(config):
    with pytest.raises(HostError, match="^--model-path some/target.*linear-attention.*NEXTN"):
        check_target("some/target", target_of(config()))


def test_latent_attention_takes_chains():
    target = target_of(LlamaConfig(), AttentionArch.MLA)
    check_target("some/target", target)
    assert "MLA" in why_chains(target) and not keeps_states(target)


def test_sparse_attention_is_refused():
    config = LlamaConfig(architectures=["GlmMoeDsaForCausalLM"], index_topk=2048)
    with pytest.raises(HostError, match="^--model-path some/target.*DSA.*NEXTN"):
        check_target("some/target", target_of(config, AttentionArch.MLA))
