"""Multiply-accumulates: the same as torch's own counter of floating point operations, which runs the model."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import pege_fx


class Products(nn.Module):
    """Every kind of product that has no weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(-1, -2)
        a, b = x[0], y[0]
        total = (x @ y).sum() + torch.mm(a, b).sum() + torch.bmm(x, y).sum() + torch.addmm(torch.zeros(4, 4), a, b).sum()
        total = total + torch.baddbmm(torch.zeros(2, 4, 4), x, y).sum()
        total = total + torch.einsum("bij,bjk->bik", x, y).sum() + torch.einsum("...i,oi->...o", x, a).sum()
        out: Tensor = total + F.scaled_dot_product_attention(x, x, x).sum()
        return out


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "convolutions": (
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, stride=2), nn.Conv2d(8, 8, 3, groups=8)),
        torch.randn(2, 4, 9, 9),
    ),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)), torch.randn(2, 4, 5, 5)),
    "other dimensions": (
        nn.Sequential(
            nn.Conv1d(2, 3, 2),
            nn.ConvTranspose1d(3, 2, 3),
            nn.Unflatten(2, (2, 2, 3)),
            nn.Conv3d(2, 3, 2),
            nn.ConvTranspose3d(3, 2, 3),
        ),
        torch.randn(2, 2, 11),
    ),
    "padded": (nn.Conv1d(3, 5, 3, padding=1, padding_mode="circular"), torch.randn(2, 3, 7)),
    "linear": (nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3)), torch.randn(2, 5, 6)),
    "attention": (Attention(), torch.randn(2, 5, 8)),
    "products": (Products(), torch.randn(2, 4, 3)),
    "resnet18": (torchvision.models.resnet18(), torch.randn(2, 3, 32, 32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_count_is_half_of_what_torch_counts(name: str) -> None:
    model, x = MODELS[name]
    explanation = pege_fx.explain(model, "W4A4", (x,))
    kernel = sdpa_kernel(SDPBackend.MATH)  # not every torch counts what its fused kernels for a CPU do
    with FlopCounterMode(display=False) as counter, torch.no_grad(), kernel:
        model(x)
    counts = [operation.macs for operation in explanation.operations]
    assert None not in counts
    assert 2 * sum(filter(None, counts)) == counter.get_total_flops()


def test_without_examples_no_count_is_made_up() -> None:
    explanation = pege_fx.explain(nn.Sequential(nn.Conv2d(3, 4, 3)), "W4A4")
    assert explanation["0"].macs is None
    assert explanation["0"].bit_operations is None
    assert "not known without example_inputs" in str(explanation)


def test_a_look_up_multiplies_nothing() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    explanation = pege_fx.explain(model, "W4A4", (torch.tensor([[1, 2]]),))
    assert [operation.macs for operation in explanation.operations] == [0, 2 * 4 * 2]


def test_bit_operations_count_the_bits_of_both_factors() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    policy = pege_fx.QuantPolicy((pege_fx.Rule(weight="3", input="5"), pege_fx.Rule(match="2", input=None)))
    explanation = pege_fx.explain(model, policy, (torch.randn(7, 4),))
    assert explanation["0"].bit_operations == 7 * 4 * 4 * 3 * 5
    assert explanation["2"].bit_operations == 7 * 4 * 2 * 3 * 32
    assert [operation.format for operation in explanation.operations] == ["W3A5", "W3A32"]
