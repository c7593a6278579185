"""Sizes from configs, against what published models are known to have."""

import pytest

from cast_sglang.errors import ProfileError
from cast_sglang.profiling.model_sizes import Precision, draft_sizes, eagle3_config, target_size
from tests.support.configs import LLAMA_8B, LLAMA_70B, QWEN3_MOE

TWO_BYTES = Precision()
EMBEDDING_8B = 128256 * 4096


def test_a_dense_target():
    """Llama 3.1 8B has 8.03 billion parameters, of which the embedding is not multiplied by."""
    size = target_size(LLAMA_8B, 1, TWO_BYTES)
    assert size.num_weights == pytest.approx(8.030e9 - EMBEDDING_8B, rel=1e-3)
    assert size.weight_bytes == 2 * size.num_weights
    assert size.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert size.attention_flops == 4 * 32 * 32 * 128
    assert (size.expert_bytes, size.num_exchanges, size.sent_bytes_per_token) == (0, 0, 0.0)
    one_byte = target_size(LLAMA_8B, 1, Precision(weight=1))
    assert one_byte.weight_bytes == one_byte.num_weights == size.num_weights


def test_ranks_share_weights_heads_and_what_they_send():
    whole, part = target_size(LLAMA_70B, 1, TWO_BYTES), target_size(LLAMA_70B, 4, TWO_BYTES)
    assert 4 * part.num_weights == pytest.approx(whole.num_weights)
    assert 4 * part.kv_bytes_per_token == whole.kv_bytes_per_token
    assert 4 * part.attention_flops == whole.attention_flops
    assert part.num_exchanges == 2 * 80 + 1
    states, logits = 2 * 2 * 80 * 8192, 128256
    assert part.sent_bytes_per_token == 2 * (states + logits) * 3 / 4
    # Eight heads of keys on sixteen ranks: each has one.
    assert target_size(LLAMA_70B, 16, TWO_BYTES).kv_bytes_per_token == 2 * 80 * 128 * 2


def test_experts():
    """Qwen3-30B-A3B has 30.5 billion parameters, of which a token takes 3.3."""
    size = target_size(QWEN3_MOE, 1, TWO_BYTES)
    embedding = 151936 * 2048
    total = size.weight_bytes + size.expert_bytes
    assert total == pytest.approx(2 * (30.53e9 - embedding), rel=2e-3)
    assert size.num_weights == pytest.approx(3.35e9 - embedding, rel=1e-2)
    assert size.expert_share == 8 / 128


def test_layers_without_experts_and_shared_experts_are_counted():
    config = QWEN3_MOE | {"first_k_dense_replace": 2, "n_shared_experts": 1}
    plain, size = (target_size(each, 1, TWO_BYTES) for each in (QWEN3_MOE, config))
    per_layer = plain.expert_bytes / 48
    assert size.expert_bytes == 46 * per_layer
    more = 2 * 3 * 2048 * 6144 + 46 * 3 * 2048 * 768
    assert size.weight_bytes - plain.weight_bytes == 2 * more


def test_an_eagle3_draft_joins_states_over_accepted_rows_alone():
    """That of Llama 3.1 8B has 0.43 billion parameters beside its embedding."""
    layer, extend = draft_sizes(eagle3_config(LLAMA_8B), LLAMA_8B, 1, TWO_BYTES)
    assert extend.num_weights - layer.num_weights == 3 * 4096 * 4096
    assert extend.num_weights == pytest.approx(0.425e9, rel=0.02)
    assert layer.kv_bytes_per_token == 2 * 8 * 128 * 2
    on_two, extend_on_two = draft_sizes(eagle3_config(LLAMA_8B), LLAMA_8B, 2, TWO_BYTES)
    assert on_two.num_weights == layer.num_weights / 2
    assert extend_on_two.num_weights - on_two.num_weights == 3 * 4096 * 4096  # whole on each


def test_an_eagle_draft_joins_in_every_pass_and_has_the_target_s_head():
    draft = LLAMA_8B | {"architectures": ["LlamaForCausalLMEagle"], "num_hidden_layers": 1}
    layer, extend = draft_sizes(draft, LLAMA_8B, 1, TWO_BYTES)
    assert layer == extend
    one_layer = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336
    assert layer.num_weights == one_layer + EMBEDDING_8B + 2 * 4096 * 4096


def test_configs_of_several_kinds_of_input():
    nested = {"architectures": ["X"], "text_config": LLAMA_8B}
    assert target_size(nested, 1, TWO_BYTES) == target_size(LLAMA_8B, 1, TWO_BYTES)
    draft = eagle3_config(nested)
    assert draft["num_hidden_layers"] == 1 and draft["hidden_size"] == 4096


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "no usable 'hidden_size'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"kv_lora_rank": 512}, "MLA"),
        ({"linear_num_key_heads": 16}, "linear attention"),
    ],
)
def test_what_is_not_known_is_refused(change, says):
    with pytest.raises(ProfileError, match=says):
        target_size(LLAMA_8B | change, 1, TWO_BYTES)


def test_a_draft_of_experts_is_refused():
    draft = QWEN3_MOE | {"architectures": ["SomethingEagle3"], "num_hidden_layers": 1}
    with pytest.raises(ProfileError, match="experts"):
        draft_sizes(draft, QWEN3_MOE, 1, TWO_BYTES)
