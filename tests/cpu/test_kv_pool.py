"""The pool of fused rows: what SGLang sees of it, moves between slots, and what it refuses."""

import pytest
import torch

pytest.importorskip("sglang")

from cast_sglang.errors import HostError
from tests.support.kv_pools import make_pool


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


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_new_pool_is_zero_and_has_a_page_of_padding(page_size):
    pool = make_pool(size=8, page_size=page_size)
    assert pool.layer_rows(2).shape == (8 + page_size, 2 * 2 * 4)
    assert not pool.storage.any()
    # The last slot of the last layer is memory of the pool too.
    pool.write(2, torch.tensor([8 + page_size - 1]), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    assert pool.storage.sum() == 16


def test_layers_are_counted_from_the_first_of_the_pool():
    pool = make_pool(start_layer=5, end_layer=7)
    k, v = torch.full((1, 2, 4), 2.0), torch.full((1, 2, 4), 3.0)
    pool.write(6, torch.tensor([9]), k, v)
    assert torch.equal(pool.get_key_buffer(6)[9], k[0])
    assert torch.equal(pool.storage[1, 9], torch.cat((k, v)))
    assert not pool.storage[[0, 2]].any()


def test_sglang_stores_into_the_same_rows():
    """It counts the layers of its own pool there, not those of the model."""
    pool, slots = make_pool(start_layer=5, end_layer=7), torch.tensor([4, 7])
    k, v = torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    pool._store_kv_layer(2, slots, k, v)
    assert torch.equal(pool.get_key_buffer(7)[slots], k)
    assert torch.equal(pool.get_value_buffer(7)[slots], v)


def test_pool_moves_slots_of_all_layers():
    pool = make_pool()
    pool.storage.copy_(torch.randn(pool.storage.shape))
    before = pool.storage.clone()
    # Overlapping, as an accepted path that begins where it belongs and moves up by one later.
    pool.move_kv_cache(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 3, 4, 9]))
    assert torch.equal(pool.storage[:, [0, 1, 2, 3, 4]], before[:, [0, 1, 3, 4, 9]])
    assert torch.equal(pool.storage[:, 5:], before[:, 5:])


def test_nothing_moves_where_all_slots_are_right():
    pool = make_pool()
    pool.storage.copy_(torch.randn(pool.storage.shape))
    before, slots = pool.storage.clone(), torch.tensor([3, 1, 7], dtype=torch.int32)
    pool.move_kv_cache(slots, slots)
    assert torch.equal(pool.storage, before)


def test_pool_refuses_what_a_row_cannot_hold():
    with pytest.raises(HostError, match="one head size.*head_dim 4/8"):
        make_pool(v_head_dim=8)
    with pytest.raises(HostError, match="--kv-cache-dtype torch.float8_e5m2"):
        make_pool(torch.float8_e5m2)
