"""Stored graphs: the same answers, to the byte as large as said, nothing run of a file, broken ones named."""

import dataclasses
import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import pege_fx
from pege_fx import CheckpointError, ExportError, PegeError, PegeWarning, QuantPolicy, VerifyError, testing
from pege_fx.numerics.packing import unpack
from pege_fx.passes import inline_modules, pack_weights, run, unpack_weights
from pege_fx.serialization import deployed as storage
from pege_fx.serialization.allowlist import functions
from pege_fx.serialization.deployed import FILE, _encode, _encode_node

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def deployed(bits: int = 4, **options: Any) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3), nn.GELU(),
        nn.Dropout(0.5), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3),
    )  # fmt: skip
    gm = pege_fx.prepare(model, QuantPolicy.parse(f"W{bits}A{bits}", first=str(bits), last=str(bits)), (X,))
    return pege_fx.convert(gm.eval(), **options)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, {"packed": True}, {"integer_bias": True}])
def test_a_stored_graph_gives_the_same_answers(bits: int, options: dict[str, bool], tmp_path: Path) -> None:
    model = deployed(bits, **options)
    size = pege_fx.save_deployed(model, tmp_path / "model.safetensors")
    loaded = pege_fx.load_deployed(tmp_path / "model.safetensors")
    assert torch.equal(loaded(X), model(X))
    assert size == (tmp_path / "model.safetensors").stat().st_size
    assert {name: value.dtype for name, value in loaded.state_dict().items()} == {
        name: value.dtype for name, value in model.state_dict().items()
    }
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [node.name for node in loaded.graph.nodes] == [node.name for node in model.graph.nodes]


class Unusual(nn.Module):
    """A write through a view, and a product of experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.experts = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y.view(-1).add_(1.0)
        offsets = torch.tensor([1, 3], dtype=torch.int32)
        out: Tensor = F.grouped_mm(y, self.experts.transpose(1, 2), offs=offsets)
        return out


def test_writes_and_experts_are_stored(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    model = pege_fx.convert(pege_fx.prepare(Unusual(), "W4A4", (x,)).eval())
    pege_fx.save_deployed(model, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(pege_fx.load_deployed(tmp_path / "model")(x), model(x))


class Tagger(nn.Module):
    """A recurrent layer, a new tensor, and an argument that is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = x.new_zeros(1, x.shape[0], 3)
        out: Tensor = self.fc(self.lstm(x, (h, h))[0])
        return out if mask is None else out * mask


def test_recurrent_layers_and_default_arguments_are_stored(tmp_path: Path) -> None:
    x = torch.randn(3, 5, 4)
    model = pege_fx.convert(pege_fx.prepare(Tagger(), "W4A4", (x,)).eval())
    pege_fx.save_deployed(model, tmp_path / "model")
    loaded = pege_fx.load_deployed(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        with pytest.raises(PegeError, match="mask was None when the model was traced"):
            loaded(x, torch.ones(3, 5, 1))


class Masked(nn.Module):
    """Fills with the limits of a number type, asked of the values themselves and of a type by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        limits = torch.finfo(y.dtype)
        low = y.masked_fill(y > 0, limits.min).amax(1) + limits.eps + limits.tiny
        return low + torch.where(low > 0, 1, torch.iinfo(x.argmax().dtype).max).clamp(max=torch.iinfo(torch.int8).max)


def test_limits_of_number_types_are_stored(tmp_path: Path) -> None:
    model = pege_fx.convert(pege_fx.prepare(Masked(), "W4A4", (X,)).eval())
    pege_fx.save_deployed(model, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(pege_fx.load_deployed(tmp_path / "model")(X), model(X))


@pytest.mark.parametrize("name", ["__class__", "dtype", "shape", "__init__"])
def test_no_more_is_read_of_limits(name: str) -> None:
    graph = torch.fx.Graph()
    limits = graph.call_function(torch.finfo, (torch.float32,))
    graph.output(graph.call_function(getattr, (limits, name)))
    model = torch.fx.GraphModule(nn.Module(), graph)
    with pytest.raises(ExportError, match=f"reads the attribute '{name}'"):
        list(map(_encode_node, model.graph.nodes))


def test_instance_norms_on_a_batch_are_stored(tmp_path: Path) -> None:
    norms = nn.InstanceNorm2d(5, affine=True), nn.InstanceNorm2d(4, track_running_stats=True)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), norms[0], nn.Conv2d(5, 4, 3), norms[1])
    model = pege_fx.convert(pege_fx.prepare(testing.as_trained(network, 0), "W4A4", (X,)).eval())
    pege_fx.save_deployed(model, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(pege_fx.load_deployed(tmp_path / "model")(X), model(X))


@pytest.mark.filterwarnings("ignore:nothing is quantized")
@given(testing.networks(), testing.policies())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_converted_network_is_stored(tmp_path: Path, case: testing.Case, policy: QuantPolicy) -> None:
    gm = pege_fx.prepare(case.network, policy, tuple(case.inputs)).eval()
    model = pege_fx.convert(gm)
    with torch.no_grad():
        expected = gm(*case.inputs)
        pege_fx.save_deployed(model, tmp_path / "model")
        assert torch.equal(pege_fx.load_deployed(tmp_path / "model")(*case.inputs), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_the_size_report_is_the_file_to_the_byte(packed: bool, tmp_path: Path) -> None:
    model = deployed(3, packed=packed)
    pege_fx.save_deployed(model, tmp_path / "model")
    stored = sum(value.numel() * value.element_size() for value in load_file(tmp_path / "model").values())
    assert pege_fx.size_report(model).quantized_bytes == stored
    assert pege_fx.size_report(model) == pege_fx.size_report(deployed(3))


def test_packing_is_undone() -> None:
    model = deployed(3)
    names = set(model.state_dict())
    run([model], [pack_weights])
    model.delete_all_unused_submodules()
    assert torch.equal(deployed(3, packed=True)(X), model(X))
    unpacks = {"op": "call_function", "target": unpack}
    assert len(model.graph.find_nodes(**unpacks)) == 3
    run([model], [unpack_weights])
    assert not model.graph.find_nodes(**unpacks)
    assert names <= set(model.state_dict())
    assert torch.equal(model(X), deployed(3)(X))


def test_a_file_is_read_without_the_code_that_made_it(tmp_path: Path) -> None:
    gm = pege_fx.prepare(torchvision.models.resnet18(num_classes=4), "W2A4", (X,))
    model = pege_fx.convert(gm.eval())
    pege_fx.save_deployed(model, tmp_path / "model")
    torch.save((X, model(X).detach()), tmp_path / "expected.pt")
    code = f"""
import torch, pege_fx
x, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = pege_fx.load_deployed({str(tmp_path / "model")!r})
assert torch.equal(model(x), expected)
assert {{type(m).__module__ for _, m in model.named_modules()}} - {{"torch.nn.modules.module"}} == {{type(model).__module__}}
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_become_functions_and_dropout_goes() -> None:
    model = deployed()
    assert not list(model.graph.find_nodes(op="call_module"))
    assert "dropout" not in str(model.graph)
    names = {node.name for node in model.graph.nodes}
    assert {"_2", "_3", "_5", "_8"} <= names  # what a module computed keeps its name


class Own(nn.Module):
    """A layer whose forward asks for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if float(x.sum()) > 0 else self.fc(-x)


def test_python_code_can_not_be_stored_and_is_named(tmp_path: Path) -> None:
    with pytest.warns(PegeWarning, match="stays Python"):
        gm = pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), Own()), "W4A4", (torch.randn(2, 4),))
    with pytest.raises(ExportError, match=r"calls the module 1, .*code of its own"):
        pege_fx.save_deployed(pege_fx.convert(gm), tmp_path / "model")
    assert not list(tmp_path.iterdir())


class Reading(nn.Module):
    """Reads attributes of results: those of named tuples, and one that nobody needs."""

    def __init__(self, more: bool) -> None:
        super().__init__()
        self.fc, self.more = nn.Linear(4, 4), more

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        named = y.max(1).values + torch.sort(y, 1).indices[:, 0]
        return named + y.nbytes if self.more else named


def test_named_results_are_stored_and_what_can_not_be_read_back_is_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    model, refused = (pege_fx.convert(pege_fx.prepare(Reading(more), "W4A4", x)) for more in (False, True))
    pege_fx.save_deployed(model, tmp_path / "model")
    assert torch.equal(pege_fx.load_deployed(tmp_path / "model")(x), model(x))
    with pytest.raises(ExportError, match="reads the attribute 'nbytes'"):
        pege_fx.save_deployed(refused, tmp_path / "refused")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Parts(NamedTuple):
    """A result by place and by name."""

    logits: Tensor
    hidden: Any = None


@dataclasses.dataclass
class Output:
    """A result by name."""

    logits: Tensor
    loss: Tensor | None = None


@dataclasses.dataclass
class Doubled:
    """A result that computes when it is made."""

    logits: Tensor

    def __post_init__(self) -> None:
        self.logits = self.logits * 2


class Giving(nn.Module):
    """Gives its result in the form that it is asked for."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.form = nn.Linear(4, 3), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.fc(x))


def filled(y: Tensor) -> Any:
    result: OrderedDict[str, Tensor] = OrderedDict()
    result["out"] = y
    result["aux"] = y + 1
    return result


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "ordered dict": (lambda y: OrderedDict(aux=y + 1, out=y), lambda r: r["out"]),
    "ordered dict, filled": (filled, lambda r: r["out"]),
    "nested": (lambda y: {"all": OrderedDict(left=[y, None], right=(y + 1,))}, lambda r: r["all"]["left"][0]),
    "named tuple": (lambda y: Parts(y), lambda r: r.logits),
    "named tuple by place": (lambda y: Parts(y, (y + 1,)), lambda r: r[0]),
    "dataclass": (lambda y: Output(y), lambda r: r.logits),
    "dataclasses in a list": (lambda y: [Output(y, y + 1), Parts(y)], lambda r: r[0].logits),
}


@pytest.mark.parametrize("form", FORMS)
def test_results_by_name_are_stored(form: str, tmp_path: Path) -> None:
    make, read = FORMS[form]
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    model = pege_fx.convert(pege_fx.prepare(Giving(make), "W4A4", (x,)).eval())
    pege_fx.save_deployed(model, tmp_path / "first")
    loaded = pege_fx.load_deployed(tmp_path / "first")
    pege_fx.save_deployed(loaded, tmp_path / "again")
    for stored in (loaded, pege_fx.load_deployed(tmp_path / "again")):
        assert torch.equal(read(stored(x)), read(model(x)))
        assert len(tree_leaves(stored(x))) >= len(tree_leaves(model(x))) - 1  # what is no class of torch's is one leaf
    if form.startswith("ordered"):
        assert isinstance(loaded(x), OrderedDict)
        assert list(loaded(x)) == list(model(x))
    if form == "dataclass":
        assert loaded(x).loss is None
        with pytest.raises(AttributeError, match="there is no part 'other': logits, loss"):
            _ = loaded(x).other


def test_an_output_of_transformers_is_stored(tmp_path: Path) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    x = torch.randn(2, 4)
    made = Giving(lambda y: outputs.BaseModelOutput(last_hidden_state=y))
    model = pege_fx.convert(pege_fx.prepare(made, "W4A4", (x,)).eval())
    pege_fx.save_deployed(model, tmp_path / "model")
    found, expected = pege_fx.load_deployed(tmp_path / "model")(x), model(x)
    assert list(found) == list(expected)
    assert found.attentions is expected.attentions is None
    for same in (found.last_hidden_state, found["last_hidden_state"], found[0]):
        assert torch.equal(same, expected[0])


def test_a_result_that_computes_when_it_is_made_is_not_stored(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    with pytest.raises(VerifyError, match=r"first node that parts: doubled"):  # a graph makes it of what is doubled already
        pege_fx.prepare(Giving(Doubled), "W4A4", (x,))
    model = pege_fx.convert(pege_fx.prepare(Giving(Doubled), "W4A4", (x,), check=False).eval(), check=False)
    with pytest.raises(ExportError, match=r"calls Doubled.*only torch's own"):
        pege_fx.save_deployed(model, tmp_path / "model")


def test_a_prepared_model_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"give the result of pege_fx\.convert"):
        pege_fx.save_deployed(pege_fx.prepare(nn.Linear(2, 2), "W4A4"), tmp_path / "model")


def test_a_file_that_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"can not write .*: No such file or directory"):
        pege_fx.save_deployed(deployed(), tmp_path / "missing" / "model")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExportError, match="it is a folder"):
        pege_fx.save_deployed(deployed(), tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    pege_fx.save_deployed(deployed(), tmp_path / "model")
    return tmp_path / "model"


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        pege_fx.load_deployed(tmp_path / "none")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_file_cut_short_is_broken(written: Path, keep: int) -> None:
    written.write_bytes(written.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is broken"):
        pege_fx.load_deployed(written)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=max(60, settings.default.max_examples))
def test_a_flipped_bit_is_noticed(written: Path, data: st.DataObject) -> None:
    """Wherever it is, in a tensor or in the graph: a setting of an operation that changes is no other model."""
    whole = written.read_bytes()
    broken = bytearray(whole)
    broken[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    copy = written.with_name("broken")
    copy.write_bytes(broken)
    with pytest.raises(CheckpointError):
        pege_fx.load_deployed(copy)


def test_what_was_changed_is_said(written: Path) -> None:
    data = bytearray(written.read_bytes())
    data[-3] ^= 4
    written.write_bytes(data)
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        pege_fx.load_deployed(written)


def test_other_tensors_are_no_model(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds tensors but no converted graph"):
        pege_fx.load_deployed(tmp_path / "other")


def with_header(path: Path, change: Any) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["pege_fx"])
    change(header)
    text, tensors = json.dumps(header), load_file(path)
    save_file(tensors, path, {"pege_fx": text, "sha256": FILE.checksum(text, tensors)})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["bad", "call_function", "os.system", ["true"], {"dict": []}], "os.system"),
        (["bad", "call_function", "torch.load", ["x"], {"dict": []}], "torch.load"),
        (["bad", "call_method", "__reduce_ex__", [{"node": "input_1"}, 2], {"dict": []}], "not a method"),
        (["bad", "call_module", "0", [], {"dict": []}], "not an operation"),
        (["bad", "get_attr", "__class__", [], {"dict": []}], "__class__"),
        (["bad", "call_function", "builtins.getattr", {"tuple": [{"node": "input_1"}, "__class__"]}, {"dict": []}], "may read"),
        (["bad", "call_function", "torch.relu", {"tuple": [{"node": "nobody"}]}, {"dict": []}], "nobody"),
    ],
)
def test_a_file_can_name_only_what_computes(written: Path, row: list[Any], message: str) -> None:
    with_header(written, lambda header: header["nodes"].insert(1, row))
    with pytest.raises(CheckpointError, match=message):
        pege_fx.load_deployed(written)


@pytest.mark.parametrize(
    "row",
    [
        ["bad", "placeholder", "y=HERE", {"tuple": []}, {"dict": []}],
        ["bad", "placeholder", "y, z=HERE", {"tuple": []}, {"dict": []}],
        ["bad", "placeholder", "class", {"tuple": []}, {"dict": []}],
        ["bad", "placeholder", ["y"], {"tuple": []}, {"dict": []}],
        ["bad", "call_function", "torch.relu", {"tuple": [{"node": "input_1"}]}, {"dict": [["inplace=HERE, out", None]]}],
        ["bad", "call_function", "torch.relu", {"tuple": [{"node": "input_1"}]}, {"dict": [[3, None]]}],
        ["bad HERE", "call_method", "relu", {"tuple": [{"node": "input_1"}]}, {"dict": []}],
    ],
)
def test_a_file_can_not_bring_code_in_a_name(written: Path, row: list[Any], tmp_path: Path) -> None:
    """fx writes names of arguments and attributes into Python code, and compiles it."""
    trace = tmp_path / "code was run"
    row = json.loads(json.dumps(row).replace("HERE", f"open({str(trace)!r}, 'w')"))
    with_header(written, lambda header: header["nodes"].insert(1, row))
    try:
        pege_fx.load_deployed(written)(torch.randn(1, 3, 8, 8), *[torch.randn(1)] * (row[1] == "placeholder"))
    except PegeError:
        pass
    else:
        assert row[0] != "bad"
    assert not trace.exists()


def test_a_tensor_can_not_bring_code_in_its_name(tmp_path: Path) -> None:
    trace, x = tmp_path / "code was run", torch.randn(2, 4)
    pege_fx.save_deployed(pege_fx.convert(pege_fx.prepare(nn.Linear(4, 4), "W4A4", x)), tmp_path / "model")
    tensors = load_file(tmp_path / "model")
    name = f'a"), open({str(trace)!r}, "w'
    tensors[name] = torch.ones(1)
    with safe_open(tmp_path / "model", framework="pt") as file:
        header = json.loads(file.metadata()["pege_fx"])
    header["nodes"].insert(1, ["bad", "get_attr", name, {"tuple": []}, {"dict": []}])
    header["nodes"].insert(2, ["used", "call_method", "relu", {"tuple": [{"node": "bad"}]}, {"dict": []}])
    text = json.dumps(header)
    save_file(tensors, tmp_path / "model", {"pege_fx": text, "sha256": FILE.checksum(text, tensors)})
    with pytest.raises(CheckpointError, match="no name of a tensor"):
        pege_fx.load_deployed(tmp_path / "model")(x)
    assert not trace.exists()


def test_reading_takes_time_in_proportion(written: Path, tmp_path: Path) -> None:
    """Every tensor was looked up in a list of all parameters."""

    class Counted(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    count = 300
    names = [Counted(f"p{i}") for i in range(count)]
    header, _ = storage._read(written)
    with pytest.MonkeyPatch.context() as patch:
        read = header | {
            "parameters": names,
            "packed": {},
            "nodes": [row for row in header["nodes"] if row[1] == "placeholder"],
        }
        patch.setattr(storage, "_read", lambda path: (read, {str(name): torch.zeros(0) for name in names}))
        pege_fx.load_deployed(written)
    assert Counted.compared <= 4 * count


def test_a_newer_version_is_said(written: Path) -> None:
    with_header(written, lambda header: header.update(version=99))
    with pytest.raises(CheckpointError, match="format version 99, this pege_fx reads 2: update"):
        pege_fx.load_deployed(written)
    with_header(written, lambda header: header.update(version=1))
    with pytest.raises(CheckpointError, match=r"format version 1, .*: store the model again"):
        pege_fx.load_deployed(written)


def test_the_vocabulary_reaches_no_files() -> None:
    for name in ("torch.load", "torch.save", "torch.from_file", "operator.attrgetter", "operator.call", "builtins.eval"):
        assert name not in functions()


def test_every_kind_of_argument_comes_back() -> None:
    from pege_fx.serialization.deployed import _decode

    values = (1, 2.5, float("inf"), "x", None, True, [1, (2, 3)], slice(None, 2), ..., torch.float16, torch.device("cpu"))
    assert _decode(json.loads(json.dumps(_encode(values))), {}) == values
    with pytest.raises(ExportError, match="complex"):
        _encode(1j)


def test_inlining_twice_equals_once() -> None:
    model = deployed()
    before = str(model.graph)
    run([model], [inline_modules])
    assert str(model.graph) == before


def test_a_link_is_followed_and_a_device_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    pege_fx.save_deployed(deployed(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert pege_fx.load_deployed(tmp_path / "target")(X).shape == (3, 3)
    with pytest.raises(ExportError, match="can not write /dev/null: it is a device, not a file; nothing was left there"):
        pege_fx.save_deployed(deployed(), "/dev/null")
