"""One sort of batch everywhere: what each kind means, and that every function that takes batches takes all of them."""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pege_fx
from pege_fx import InputError
from pege_fx.training.batches import as_arguments

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu())
        return out


KINDS: dict[str, Any] = {
    "a tensor": [X],
    "an array": [X.numpy()],
    "with labels": [(X, torch.zeros(4))],
    "a list with labels": [[X, torch.zeros(4)]],
    "a mapping": [{"x": X}],
    "a mapping that is no dict": [collections.UserDict(x=X)],
    "args and kwargs": [((X,), {})],
    "kwargs alone": [((), {"x": X})],
    "a loader with labels": DataLoader(TensorDataset(X, torch.zeros(4)), 4),
    "one tensor for all": X,
    "one mapping for all": {"x": X},
}
FUNCTIONS: dict[str, Callable[[Any, Any, Path], Any]] = {
    "calibrate": lambda gm, batches, _: pege_fx.calibrate(gm, batches),
    "sensitivity": lambda gm, batches, _: pege_fx.sensitivity(gm, batches, progress=False),
    "report": lambda gm, batches, folder: pege_fx.report(gm, folder / "r.html", batches=batches),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_function_takes_every_kind(function: str, kind: str, tmp_path: Path) -> None:
    gm = pege_fx.prepare(Net(), "W4A4", (X,))
    one, other = (FUNCTIONS[function](gm, batches, tmp_path) for batches in ([X], KINDS[kind]))
    assert function != "sensitivity" or one.to_dict() == other.to_dict()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "got no batch: give at least one"),
        (iter(()), "got no batch: give at least one"),
        (3, "got int for batches: give a list, a DataLoader"),
        ("x", "got str for batches"),
        ([X[:, :3]], r"the model fails on inputs \[\(4, 3\)\]"),
        ([{"y": X, "x": X}], "the model fails on inputs"),
        ([()], r"the model fails on inputs \[\]"),
    ],
)
def test_every_function_refuses_alike(function: str, batches: Any, message: str, tmp_path: Path) -> None:
    gm = pege_fx.prepare(Net(), "W4A4", (X,))
    with pytest.raises(InputError, match=message):
        FUNCTIONS[function](gm, batches, tmp_path)


def test_verify_export_takes_every_kind(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    deployed = pege_fx.convert(pege_fx.prepare(Net(), "W4A4", (X,)))
    pege_fx.export_onnx(deployed, tmp_path / "m.onnx", X)
    for kind, batches in KINDS.items():
        assert pege_fx.verify_export(deployed, tmp_path / "m.onnx", batches).samples == 4, kind


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> Tensor:
        return x - scale * y


def test_a_keyword_only_argument_is_no_place_for_a_label() -> None:
    assert as_arguments(Two(), (1, 2, "label")) == ((1, 2), {})
    assert as_arguments(Two(), ((1, 2), {"scale": 3.0})) == ((1, 2), {"scale": 3.0})
    assert as_arguments(Two(), ((1, 2), {"boxes": 3.0})) == (((1, 2), {"boxes": 3.0}), {})  # the second argument is a dict


def test_keys_that_forward_does_not_take_are_named() -> None:
    with pytest.raises(InputError, match=r"a batch has labels, which forward does not take\.\n  it takes x, y, scale"):
        as_arguments(Two(), {"x": 1, "y": 2, "labels": 3})


def test_what_a_wrapper_hides_is_known() -> None:
    assert as_arguments(nn.DataParallel(Net()), (1, "label")) == ((1,), {})


def test_an_array_is_a_tensor_of_its_type() -> None:
    (args, _) = as_arguments(Net(), np.zeros((2, 4), dtype=np.float32))
    assert args[0].dtype == torch.float32
