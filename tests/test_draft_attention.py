"""Attention backends of the draft."""

import pytest


def test_unknown_backend_names_the_flag():
    from types import SimpleNamespace

    from cast_sglang.errors import HostError
    from cast_sglang.serving.draft_attention import create_tree_backend

    with pytest.raises(HostError, match="--speculative-draft-attention-backend triton"):
        create_tree_backend(SimpleNamespace(draft_attention_backend="fa3"), topk=4)
