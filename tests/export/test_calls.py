"""How an exported model is called: keywords, None, equal tensors, names, free sizes, and what a file can not hold."""

from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import symbolic_trace

import pege_fx
from pege_fx import ExportError, InputError, QuantPolicy, Rule
from pege_fx.export.calls import copied, in_order, tensors_of

EVERYTHING = QuantPolicy((Rule(weight="8", input="8"),))
X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


class Named(nn.Module):
    """Two linears around an optional mask and an optional factor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, factor: float = 1.0, *, shift: Tensor | None = None) -> Any:
        h = torch.relu(self.a(x)) * factor
        if mask is not None:
            h = h.masked_fill(mask, torch.tensor(0.5))
        return self.b(h) if shift is None else self.b(h) + shift


def deployed_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> torch.fx.GraphModule:
    return pege_fx.convert(pege_fx.prepare(model.eval(), EVERYTHING, args, kwargs))


def sides(path: Path) -> tuple[list[str], list[str]]:
    graph = onnx.load(path).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


MASK, SHIFT = torch.rand(2, 5, 6) > 0.5, torch.randn(2, 5, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "names"),
    [
        ((X,), {}, ["x"]),
        ((X, MASK), {}, ["x", "mask"]),
        ((X, None, 0.5), {}, ["x"]),
        ((X,), {"mask": MASK, "shift": SHIFT}, ["x", "mask", "shift"]),
        ((), {"shift": SHIFT, "x": X}, ["x", "shift"]),
    ],
    ids=["plain", "mask", "None between", "keywords", "by name"],
)
def test_keywords_none_and_numbers_are_as_in_the_call(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    deployed, path = deployed_of(Named(), args, kwargs), tmp_path / "m.onnx"
    pege_fx.export_onnx(deployed, path, args, example_kwargs=kwargs)
    assert sides(path) == (names, ["output"])
    assert pege_fx.verify_export(deployed, path, [(args, kwargs)]).ok


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(self.a(x)) - self.b(y)


def test_one_tensor_given_twice_is_two_inputs(tmp_path: Path) -> None:
    deployed = deployed_of(Two(), (X, X))
    pege_fx.export_onnx(deployed, tmp_path / "m.onnx", (X, X))
    assert sides(tmp_path / "m.onnx")[0] == ["x", "y"]
    assert pege_fx.verify_export(deployed, tmp_path / "m.onnx", [(X, X.flip(0)), (X.flip(1), X)]).ok


Pair = namedtuple("Pair", ["first", "second"])


class Returning(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.a, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.wrap(y, y.relu())


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (lambda a, b: OrderedDict(out=a, aux=b), ["out", "aux"]),
        (lambda a, b: {"logits": a, "hidden": [b, a]}, ["logits", "hidden_0", "hidden_1"]),
        (Pair, ["first", "second"]),
        (lambda a, b: (a, None, b), ["output_0", "output_2"]),
    ],
    ids=["OrderedDict", "nested", "named tuple", "tuple"],
)
def test_results_have_their_keys_as_names(wrap: Any, names: list[str], tmp_path: Path) -> None:
    deployed = deployed_of(Returning(wrap), (X,))
    pege_fx.export_onnx(deployed, tmp_path / "m.onnx", (X,))
    assert sides(tmp_path / "m.onnx")[1] == names
    assert pege_fx.verify_export(deployed, tmp_path / "m.onnx", [X]).ok


def test_names_may_be_given_and_have_to_fit(tmp_path: Path) -> None:
    deployed, path = deployed_of(Two(), (X, X)), tmp_path / "m.onnx"
    pege_fx.export_onnx(deployed, path, (X, X), input_names=["left", "right"], output_names=["difference"])
    assert sides(path) == (["left", "right"], ["difference"])
    with pytest.raises(ExportError, match="the model has 2, give a name of its own for each"):
        pege_fx.export_onnx(deployed, path, (X, X), input_names=["left", "left"])


@pytest.mark.parametrize("asked", [{"x": {1: "length"}}, {"x": {1: Dim("length", min=2)}}, ({1: "length"},)], ids=repr)
def test_sizes_that_are_asked_for_stay_free(asked: Any, tmp_path: Path) -> None:
    deployed, path = deployed_of(Named(), (X,)), tmp_path / "m.onnx"
    pege_fx.export_onnx(deployed, path, (X,), dynamic_shapes=asked)
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", "length", 4]
    assert pege_fx.verify_export(deployed, path, [torch.randn(3, 9, 4), torch.randn(1, 2, 4)]).ok


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"z": {1: "n"}}, "give a dict by parameter"),
        ({"x": {7: "n"}}, "no dimension 7"),
        ({"x": {1: "not a name"}}, "give a name as Python has them"),
        ({"x": "n"}, "give its free sizes by dimension"),
    ],
)
def test_free_sizes_that_do_not_fit_are_refused(asked: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        pege_fx.export_onnx(deployed_of(Named(), (X,)), tmp_path / "m.onnx", (X,), dynamic_shapes=asked)
    assert list(tmp_path.iterdir()) == []


class Counts(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.a(x) * self.seen


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x.zero_()
        return y


@pytest.mark.parametrize(("model", "what"), [(Counts, "its buffer seen"), (Overwrites, "its input x")])
def test_what_a_model_writes_is_refused_by_name(model: type[nn.Module], what: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"the model writes into {what}"):
        pege_fx.export_onnx(deployed_of(model(), (X.clone(),)), tmp_path / "m.onnx", (X.clone(),))
    assert list(tmp_path.iterdir()) == []


HALVES = [torch.float16, torch.bfloat16]


class Summing(nn.Module):
    """Layers whose sums half precision rounds by a good part of a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.deep, self.head = nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(nn.functional.gelu(self.deep(self.wide(x).relu())))
        return out


@pytest.mark.parametrize("style", ["qdq", "qcdq", "qonnx"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_half_types_are_written_and_verified(when: str, dtype: torch.dtype, style: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    if when == "before":
        deployed, x = deployed_of(Summing().to(dtype), (x.to(dtype),)), x.to(dtype)
    else:
        deployed, x = deployed_of(Summing(), (x,)).to(dtype), x.to(dtype)
    pege_fx.export_onnx(deployed, path, (x,), style=style)
    report = pege_fx.verify_export(deployed, path, [x])
    assert report.ok, report
    assert report.widened == (dtype is torch.bfloat16)
    assert ("computed the file in float32" in str(report)) == report.widened
    assert max(check.tolerance for check in report.checks.values()) < 4.0  # the model itself is half a step away at most


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_wrong_file_in_half_precision_is_found_out(dtype: torch.dtype, tmp_path: Path) -> None:
    x = X.to(dtype)
    deployed = deployed_of(Summing().to(dtype), (x,))
    pege_fx.export_onnx(deployed, tmp_path / "m.onnx", (x,))
    proto = onnx.load(tmp_path / "m.onnx")
    (weights,) = (tensor for tensor in proto.graph.initializer if list(tensor.dims) == [64, 64])
    weights.raw_data = bytes(byte ^ 0x77 for byte in weights.raw_data)
    onnx.save(proto, tmp_path / "wrong.onnx")
    report = pege_fx.verify_export(deployed, tmp_path / "wrong.onnx", [x])
    assert report.verdict == "different"


def test_bfloat16_needs_its_opset(tmp_path: Path) -> None:
    x = X.to(torch.bfloat16)
    with pytest.raises(ExportError, match="from opset 22 on"):
        pege_fx.export_onnx(deployed_of(Two().to(torch.bfloat16), (x, x)), tmp_path / "m.onnx", (x, x), opset=21)


class Filled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = torch.where(y > 0, y, torch.tensor(-1.0))
        return y.masked_fill(y > 0.5, y.detach().amax()) + torch.full((3,), 0.25)


def test_tensors_fill_where_numbers_do(tmp_path: Path) -> None:
    deployed = deployed_of(Filled(), (X,))
    pege_fx.export_onnx(deployed, tmp_path / "m.onnx", (X,))
    assert pege_fx.verify_export(deployed, tmp_path / "m.onnx", [X]).ok


def test_a_batch_of_other_inputs_is_refused(tmp_path: Path) -> None:
    deployed = deployed_of(Two(), (X, X))
    pege_fx.export_onnx(deployed, tmp_path / "m.onnx", (X, X))
    with pytest.raises(InputError):
        pege_fx.verify_export(deployed, tmp_path / "m.onnx", [(X,)])


Y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def inputs_of(path: Path) -> list[str]:
    return [value.name for value in onnx.load(path).graph.input]


class Difference(nn.Module):
    """Two arguments that are not told apart by their values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.fc(left) - 2 * self.fc(right)
        return out


@pytest.mark.parametrize(
    "right", [Y, Y.clone(), Y[:], Y.t().contiguous().t()], ids=["itself", "equal", "a view", "other strides"]
)
def test_equal_tensors_stay_two_inputs(right: Tensor, tmp_path: Path) -> None:
    model = pege_fx.convert(pege_fx.prepare(Difference().eval(), "W4A4", (Y, Y + 1)))
    pege_fx.export_onnx(model, tmp_path / "model.onnx", (Y, right))
    assert inputs_of(tmp_path / "model.onnx") == ["left", "right"]
    assert pege_fx.verify_export(model, tmp_path / "model.onnx", [(Y, right), (Y, Y + 1), (Y + 1, Y)]).ok
    program = pege_fx.to_program(model, (Y, right))
    assert torch.equal(program.module()(Y, Y + 1), model(Y, Y + 1))


class Optional(nn.Module):
    """None and a number between tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        y: Tensor = self.fc(x) * scale
        if bias is not None:
            y = y + bias
        return y if mask is None else y * mask


SEEN = (Y > 0).float()


@pytest.mark.parametrize(
    ("args", "kwargs", "names"),
    [
        ((Y, None, SEEN), {}, ["x", "mask"]),
        ((Y,), {"mask": SEEN}, ["x", "mask"]),
        ((), {"mask": SEEN, "x": Y}, ["x", "mask"]),
        ((Y, None, None, 3.0), {}, ["x"]),
        ((Y, SEEN), {"scale": 0.5}, ["x", "bias"]),
    ],
)
def test_keywords_and_none_between_inputs(args: Any, kwargs: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    model = pege_fx.convert(pege_fx.prepare(Optional().eval(), "W4A4", args, kwargs))
    pege_fx.export_onnx(model, tmp_path / "model.onnx", args, example_kwargs=kwargs)
    assert inputs_of(tmp_path / "model.onnx") == names
    report = pege_fx.verify_export(model, tmp_path / "model.onnx", [(args, kwargs)])
    assert report.ok, report
    assert report.samples == 3
    program = pege_fx.to_program(model, args, kwargs)
    assert torch.equal(program.module()(*args, **kwargs), model(*args, **kwargs))
    with pytest.raises(InputError):
        pege_fx.verify_export(model, tmp_path / "model.onnx", [(Y, SEEN, SEEN)])


def test_names_decide_not_their_order() -> None:
    gm = symbolic_trace(Difference())
    assert in_order(gm, ((), {"right": 1, "left": 2})) == ((2, 1), {})
    assert in_order(symbolic_trace(nn.ReLU()), ((), {"input": 3})) == ((3,), {})
    with pytest.raises(InputError, match=r"they do not fit forward.*missing.*right.*\n  given: 1 positional, keywords none"):
        in_order(gm, ((Y,), {}))


def test_copies_share_no_memory() -> None:
    call = copied(((Y, Y[:2], {"a": Y}, None, 3), {"b": Y}))
    assert len({x.untyped_storage().data_ptr() for x in [*tensors_of(call), Y]}) == 5
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(call), (Y, Y[:2], Y, Y), strict=True))


class Writing(nn.Module):
    """Writes into a buffer or an argument."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.fc, self.where = nn.Linear(4, 4), where
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(8, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "seen":
            self.seen += 1
        elif self.where == "cache":
            self.cache[:2] = self.fc(x)[:2]
        elif self.where == "x":
            x.mul_(0.5)
        else:
            y = x.clone()
            y.mul_(0.5)
            return self.fc(y)  # type: ignore[no-any-return]
        return self.fc(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("where", ["seen", "cache", "x", "a copy"])
def test_what_a_file_can_not_keep_is_refused_by_name(where: str, tmp_path: Path) -> None:
    x = Y.clone()
    model = pege_fx.convert(pege_fx.prepare(Writing(where).eval(), "W4A4", (x.clone(),)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if where == "a copy":
        pege_fx.export_onnx(model, tmp_path / "model.onnx", (x,))
        assert pege_fx.verify_export(model, tmp_path / "model.onnx", [x]).ok
    else:
        what = "input x" if where == "x" else f"buffer {where}"
        with pytest.raises(
            ExportError, match=rf"writes into its {what}.*\n  (make the state an argument|let forward write into)"
        ):
            pege_fx.export_onnx(model, tmp_path / "model.onnx", (x,))
        assert not list(tmp_path.iterdir())
    assert torch.equal(x, Y)  # an export only looks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_program_keeps_its_state() -> None:
    model = pege_fx.convert(pege_fx.prepare(Writing("seen").eval(), "W4A4", (Y,)))
    before = model.get_buffer("seen").clone()
    module = pege_fx.to_program(model, (Y,)).module()
    module(Y)
    module(Y)
    assert torch.equal(module.get_buffer("seen"), before + 2)
    assert torch.equal(model.get_buffer("seen"), before)
