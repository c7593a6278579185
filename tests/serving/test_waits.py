"""What watches a step for waits sees each way of reading a tensor, and leaves the host's own."""

import pytest
import torch

from tests.support import waits

READS = [
    lambda tensor: tensor.sum().item(),
    lambda tensor: bool((tensor > 0).all()),
    lambda tensor: int(tensor.max()),
    lambda tensor: tensor.nonzero(),
]


@pytest.mark.parametrize("read", READS)
def test_a_value_that_is_read_is_noted(read):
    places = set()
    with waits.Watch(places):
        torch.ones(3) + 1
        assert not places
        read(torch.ones(3))
    assert len(places) == 1 and "test_waits.py" in places.pop()


def test_what_is_the_hosts_own_is_not():
    places, mine = set(), waits.keep(torch.arange(6))
    with waits.Watch(places):
        assert mine.view(2, 3)[1, 2].item() == 5
    assert not places
