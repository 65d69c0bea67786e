"""Tensors of every memory order, conjugated, negated, overlapping: files give back the same values in the same order."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pege_fx
from pege_fx import CheckpointError
from pege_fx.serialization import tensor_tree
from pege_fx.serialization.memory_order import laid_out, order_of


@given(st.permutations(range(4)), st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_an_order_is_found_and_made_again(order: list[int], sizes: list[int]) -> None:
    inverse = [order.index(dim) for dim in range(4)]
    value = torch.randn(sizes).permute(order).contiguous().permute(inverse)
    found = order_of(value)
    again = value.contiguous() if found is None else laid_out(value.contiguous(), found)
    assert torch.equal(again, value)
    assert all(size == 1 or a == b for size, a, b in zip(sizes, again.stride(), value.stride(), strict=True))


@pytest.mark.parametrize("order", [[0, 0], [0], [0, 2], [1, 2]])
def test_what_is_no_order_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="no order of 2 dimensions"):
        laid_out(torch.zeros(2, 3), order)


COMPLEX = torch.complex(torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3))
TENSORS: dict[str, Tensor] = {
    "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": torch.randn(2, 3, 4, 5, 2).contiguous(memory_format=torch.channels_last_3d),
    "transposed": torch.randn(3, 4).t(),
    "complex": COMPLEX,
    "conjugated": COMPLEX.conj(),
    "conjugated and transposed": COMPLEX.conj().t(),
    "negated": COMPLEX.conj().imag,
    "double": COMPLEX.to(torch.complex128).conj(),
    "expanded": torch.randn(3, 1).expand(3, 4),
    "expanded number": torch.tensor(2.0).expand(2, 2),
    "overlapping": torch.arange(6.0).unfold(0, 3, 1),
    "with gaps": torch.randn(6, 4)[::2, 1:3],
    "turned and with gaps": torch.randn(6, 4).t()[1:3],
    "empty": torch.zeros(0, 3).t(),
    "learned": torch.randn(2, 3, requires_grad=True).t(),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_what_a_file_is_given_comes_back(kind: str, tmp_path: Path) -> None:
    value = TENSORS[kind]
    tensor_tree.write({"value": [value]}, tmp_path / "file", "test")
    (found,) = tensor_tree.read(tmp_path / "file", "test")["value"]
    assert torch.equal(found, value.detach())
    assert found.dtype is value.dtype
    assert not found.is_conj()
    assert not found.is_neg()
    if order_of(value) is not None:
        assert found.stride() == value.stride()


def test_views_of_one_memory_that_differ_in_a_flag_are_not_taken_for_one(tmp_path: Path) -> None:
    views = [COMPLEX, COMPLEX.conj(), COMPLEX.imag, COMPLEX.conj().imag, COMPLEX.real]
    tensor_tree.write(views, tmp_path / "file", "test")
    found = tensor_tree.read(tmp_path / "file", "test")
    assert all(torch.equal(a, b) for a, b in zip(found, views, strict=True))


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), torch.zeros(2, device="meta")])
def test_what_is_not_dense_is_refused_by_name(value: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"state\.table is a tensor"):
        tensor_tree.write({"state": {"table": value}}, tmp_path / "file", "test")


@pytest.mark.parametrize("packed", [False, True])
def test_a_stored_model_computes_in_the_order_in_which_it_computed(packed: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    deployed = pege_fx.convert(pege_fx.prepare(net.eval(), "W4A4", (x,)), packed=packed)
    pege_fx.save_deployed(deployed, tmp_path / "model")
    again = pege_fx.load_deployed(tmp_path / "model")
    assert torch.equal(again(x), deployed(x))
    assert again(x).stride() == deployed(x).stride()
    mine = {name: value.stride() for name, value in deployed.named_buffers()}
    assert {name: value.stride() for name, value in again.named_buffers()} == mine
