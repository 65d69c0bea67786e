"""Sparse buffers stay what they are; a layer with sparse gradients stays in float, and the plan says why."""

import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import ExportError, QuantPolicy, Rule

LAYOUTS = {"coo": Tensor.to_sparse, "csr": Tensor.to_sparse_csr, "csc": Tensor.to_sparse_csc}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta:UserWarning")
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "@": operator.matmul,
    "mm": torch.mm,
    "addmm": lambda a, y: torch.addmm(y, a, y),
    "linear": lambda a, y: nn.functional.linear(y.t(), a).t(),
    "sparse.mm": torch.sparse.mm,
}


class GraphLayer(nn.Module):
    def __init__(self, layout: str, product: Callable[[Tensor, Tensor], Tensor] = torch.sparse.mm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.product = nn.Linear(4, 4), product
        self.register_buffer("adjacency", LAYOUTS[layout](torch.eye(6).roll(1, 0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.adjacency, self.layer(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sparse_buffer_stays(layout: str) -> None:
    model, x = GraphLayer(layout), torch.linspace(-1.0, 1.0, 24).view(6, 4)
    gm = pege_fx.prepare(model, "W8A8", (x,))
    assert gm.get_buffer("adjacency").layout is model.adjacency.layout
    dense = pege_fx.prepare(nn.Sequential(model.layer), "W8A8", (x,))
    torch.testing.assert_close(gm.eval()(x), dense.eval()(x).roll(1, 0))
    gm.train()(x).sum().backward()


@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_sparse_operand_stays_float_and_the_plan_says_so(product: str, layout: str, tmp_path: Path) -> None:
    model, x = GraphLayer(layout, PRODUCTS[product]), torch.linspace(-1.0, 1.0, 24).view(6, 4)
    gm = pege_fx.prepare(model, "W8A8", (x,))
    edges = [edge for operation in gm.meta["plan"].operations for edge in operation.edges if edge.source == "adjacency"]
    assert all(edge.spec is None and edge.reason.endswith(f"is sparse ({model.adjacency.layout})") for edge in edges)
    assert len(edges) == (product != "sparse.mm")
    gm(x).sum().backward()
    deployed = pege_fx.convert(gm.eval())
    with torch.no_grad():
        assert torch.equal(deployed(x), gm(x))
    assert deployed.get_buffer("adjacency").layout is model.adjacency.layout
    with pytest.raises(ExportError, match=r"adjacency is sparse \(torch.sparse_\w+\), and a file holds dense tensors"):
        pege_fx.save_deployed(deployed, tmp_path / "model")
    pytest.importorskip("onnx")
    with pytest.raises(ExportError, match="adjacency is sparse"):
        pege_fx.export_onnx(deployed, tmp_path / "model.onnx", (x,))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_made_dense_is_computed_before_a_file_is_written(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    if torch.__version__ < "2.12" and layout != "coo":
        pytest.skip("torch.export of 2.11 fails on tensors of this layout")
    x = torch.linspace(-1.0, 1.0, 24).view(6, 4)
    model = GraphLayer(layout, lambda adjacency, y: adjacency.to_dense() @ y).eval()
    policy = QuantPolicy((Rule(function="linear", weight="8", input="8"),))
    deployed = pege_fx.convert(pege_fx.prepare(model, policy, (x,)))
    pege_fx.export_onnx(deployed, tmp_path / "model.onnx", (x,), dynamic_batch=False)
    assert pege_fx.verify_export(deployed, tmp_path / "model.onnx", [x]).ok


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
