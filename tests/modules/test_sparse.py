"""Sparse buffers stay what they are; a layer with sparse gradients stays in float, and the plan says why."""

import pytest
import torch
from torch import Tensor, nn

import pege_fx

LAYOUTS = {"coo": Tensor.to_sparse, "csr": Tensor.to_sparse_csr}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")


class GraphLayer(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.register_buffer("adjacency", LAYOUTS[layout](torch.eye(6).roll(1, 0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.adjacency, self.layer(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_buffer_stays(layout: str) -> None:
    model, x = GraphLayer(layout), torch.linspace(-1.0, 1.0, 24).view(6, 4)
    gm = pege_fx.prepare(model, "W8A8", (x,))
    assert gm.get_buffer("adjacency").layout is model.adjacency.layout
    dense = pege_fx.prepare(nn.Sequential(model.layer), "W8A8", (x,))
    torch.testing.assert_close(gm.eval()(x), dense.eval()(x).roll(1, 0))
    gm.train()(x).sum().backward()


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_stay_sparse_and_the_plan_says_so(cls: type[nn.Module]) -> None:
    model = nn.Sequential(cls(10, 4, sparse=True), nn.Linear(4, 2))
    x = torch.randint(0, 10, (4, 3))
    gm = pege_fx.prepare(model, "W4A4", (x,))
    gm(x).sum().backward()
    gradient = gm.get_parameter("0.weight").grad
    assert gradient is not None
    assert gradient.is_sparse
    assert any("sparse gradients" in operation.reason for operation in pege_fx.explain(model, "W4A4", (x,)).operations)
