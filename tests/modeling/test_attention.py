"""The block mask of trees is torch's own."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.profiler import ProfilerActivity, profile

from modeling import attention


def one_tree(prefix: int, branches: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tree and branch numbers of one tree, and of padding, which is a tree of its own."""
    places = torch.arange(prefix + branches * length, dtype=torch.int32)
    branch = (places - prefix).div(length, rounding_mode="floor") + 1
    short = -len(places) % 128
    branch = torch.nn.functional.pad(branch.clamp(min=0), (0, short))
    return torch.nn.functional.pad(0 * places, (0, short), value=1), branch


def random_trees(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    tree = torch.randint(0, 4, (length,), generator=draw).sort().values.int()
    return tree, torch.randint(0, 3, (length,), generator=draw).int()


@pytest.mark.parametrize("pairs_at_once", [2**25, 2**17, 1])
@pytest.mark.parametrize("tree, branch", [one_tree(700, 5, 150), random_trees(128), random_trees(1280)])
def test_the_block_mask_is_the_one_that_torch_makes(tree, branch, pairs_at_once, monkeypatch):
    monkeypatch.setattr(attention, "PAIRS_AT_ONCE", pairs_at_once)
    ours = attention.block_mask(tree, branch)

    def mask(_batch, _head, q, k):
        return attention.visible(tree[q], branch[q], q, tree[k], branch[k], k)

    expected = create_block_mask(mask, None, None, len(tree), len(tree), device="cpu")
    *_, mask_mod = ours.as_tuple()
    for own, torchs in zip(ours.as_tuple(), expected.as_tuple(), strict=True):
        if isinstance(own, torch.Tensor):
            assert torch.equal(own, torchs) and own.dtype == torchs.dtype and own.stride() == torchs.stride()
        elif own is not mask_mod:
            assert own == torchs


def test_no_tensor_of_the_block_mask_takes_more_than_a_byte_per_pair_of_one_pass(monkeypatch):
    monkeypatch.setattr(attention, "PAIRS_AT_ONCE", 2**18)
    tree, branch = one_tree(700, 5, 150)  # 1,536 tokens: 9 times as many pairs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        attention.block_mask(tree, branch)
    largest = max(event.cpu_memory_usage for event in profiled.events())
    assert 2**17 < largest <= 2**18
