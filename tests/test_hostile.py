"""Files of a broken disk, or of somebody who means ill: a ``PegeError`` or success, and nothing of them is run."""

import ast
import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pege_fx
from pege_fx import PegeError, PolicyError, QuantPolicy, Rule
from pege_fx.serialization import deployed, tensor_tree

QUICK = settings(
    max_examples=max(60, settings.default.max_examples), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
X = torch.randn(2, 4)
POLICY = QuantPolicy((Rule(weight="4", input="4", schedule="slow"), Rule(match="re:0", weight="8", recompute=True)))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


PREPARED = pege_fx.prepare(network(), POLICY, (X,))


def prepared() -> Any:
    return copy.deepcopy(PREPARED)


def write_checkpoint(path: Path) -> None:
    gm = prepared()
    scheduler, optimizer = pege_fx.PEGEScheduler(gm, 4), torch.optim.Adam(gm.parameters())
    gm(X).sum().backward()
    optimizer.step()
    pege_fx.save(gm, path, scheduler=scheduler, optimizer=optimizer, extra={"epoch": 3})


def read_checkpoint(path: Path) -> None:
    gm = prepared()
    pege_fx.checkpoint_info(path)
    pege_fx.load(path, gm, scheduler=pege_fx.PEGEScheduler(gm, 4), optimizer=torch.optim.Adam(gm.parameters()))


def read_json(data: bytes) -> QuantPolicy:
    return QuantPolicy.from_json(data.decode(errors="replace"))


FILES: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "checkpoint": (write_checkpoint, read_checkpoint),
    "deployed": (lambda path: pege_fx.save_deployed(pege_fx.convert(prepared().eval()), path), pege_fx.load_deployed),
    "policy.toml": (POLICY.to_toml, QuantPolicy.from_toml),
    "policy.json": (lambda path: path.write_text(POLICY.to_json()), lambda path: read_json(path.read_bytes())),
}


@pytest.fixture(scope="module", params=FILES)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Callable[[Path], Any]]:
    write, read = FILES[request.param]
    path = tmp_path_factory.mktemp("hostile") / request.param
    write(path)
    read(path)
    return path, path.read_bytes(), read


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Bits flipped, a range cut out, zeroed, doubled or replaced, the end torn off; places as parts of the length."""
    places = st.floats(0, 1, exclude_max=True)
    what = draw(st.sampled_from(["flip", "tear", "cut", "zero", "double", "replace"]))
    first, last, noise = draw(places), draw(places), draw(st.binary(min_size=1, max_size=12))

    def damage(data: bytes) -> bytes:
        a, b = sorted((int(first * len(data)), int(last * len(data))))
        b = a + min(b - a, 64)
        if what == "flip":
            return data[:a] + bytes([data[a] ^ (noise[0] or 1)]) + data[a + 1 :]
        middle = {"tear": None, "cut": b"", "zero": bytes(b - a), "double": 2 * data[a:b], "replace": noise}[what]
        return data[:a] if middle is None else data[:a] + middle + data[b:]

    return damage


@given(damages())
@QUICK
def test_bytes_are_damaged(kind: tuple[Path, bytes, Callable[[Path], Any]], damage: Callable[[bytes], bytes]) -> None:
    path, whole, read = kind
    path.write_bytes(damage(whole))
    try:
        read(path)
    except PegeError:
        return


# --- structure ---------------------------------------------------------------------------------------------------

ODD = [
    None,
    True,
    -1,
    2**63,
    1e308,
    float("nan"),
    "",
    "../../etc/passwd",
    "a.b.c",
    "__class__",
    "\ud800",
    [],
    {},
    [[]],
    {"dict": 3},
]
ODD += [
    {"node": "input_1"},
    {"float": "x"},
    {"tensor": "none"},
    {"tuple": [1]},
    {"slice": [1]},
    {"dtype": "load"},
    {"a": 1, "b": 2},
]
ODD += ["x" * 5000, list(range(50))]


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every part of a tree."""
    yield path
    if isinstance(tree, (dict, list)):
        for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(child, (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    key, *rest = path
    changed = replaced(tree[key], tuple(rest), value)
    return tree | {key: changed} if isinstance(tree, dict) else [*tree[:key], changed, *tree[key + 1 :]]


def altered(data: st.DataObject, tree: Any) -> Any:
    """One part of a tree replaced by something odd, or by another part, or left out."""
    ways = list(places(tree))
    way = data.draw(st.sampled_from(ways))
    if way and data.draw(st.booleans()):
        parent = tree
        for key in way[:-1]:
            parent = parent[key]
        left = {k: v for k, v in parent.items() if k != way[-1]} if isinstance(parent, dict) else parent[: way[-1]]
        return replaced(tree, way[:-1], left)
    other = tree
    for key in data.draw(st.sampled_from(ways)):
        other = other[key]
    return replaced(tree, way, data.draw(st.sampled_from([*ODD, other])))


def raw(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@given(st.data())
@QUICK
def test_the_graph_of_a_converted_file_is_altered_and_signed_again(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "deployed"
    if not path.exists():
        pege_fx.save_deployed(pege_fx.convert(prepared().eval()), path)
    header = altered(data, json.loads(raw(path)["pege_fx"]))
    other = tmp_path / "altered"
    text, tensors = json.dumps(header), load_file(path)
    save_file(tensors, other, {"pege_fx": text, "sha256": deployed.FILE.checksum(text, tensors)})
    try:
        pege_fx.load_deployed(other)
    except PegeError:
        return


@given(st.data())
@QUICK
def test_the_tree_of_a_checkpoint_is_altered_and_signed_again(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "checkpoint"
    if not path.exists():
        write_checkpoint(path)
    found, tensors = raw(path), load_file(path)
    text = json.dumps(altered(data, json.loads(found["tree"])))
    try:
        digest = tensor_tree.FILE.checksum(text, tensors)
    except UnicodeEncodeError:
        return
    save_file(tensors, tmp_path / "altered", found | {"tree": text, "sha256": digest})
    try:
        read_checkpoint(tmp_path / "altered")
    except PegeError:
        return


@given(st.data())
@QUICK
def test_a_policy_is_altered(data: st.DataObject) -> None:
    changed = altered(data, POLICY.to_dict())
    try:
        QuantPolicy.from_json(json.dumps(changed))
        QuantPolicy.from_dict(changed)
    except PegeError:
        return


@pytest.mark.parametrize("nested", ['{"a":' * 100_000, "[" * 100_000, '{"rules": ' + "[" * 100_000 + "]" * 100_000 + "}"])
def test_a_file_nested_without_end_is_refused(nested: str, tmp_path: Path) -> None:
    with pytest.raises(PegeError):
        QuantPolicy.from_json(nested)
    (tmp_path / "policy.toml").write_text(f"rules = {nested}")
    with pytest.raises(PegeError):
        QuantPolicy.from_toml(tmp_path / "policy.toml")
    save_file({"w": X}, tmp_path / "deployed", {"pege_fx": nested, "sha256": deployed.FILE.checksum(nested, {"w": X})})
    with pytest.raises(PegeError):
        pege_fx.load_deployed(tmp_path / "deployed")


@pytest.mark.parametrize("size", [2**40, 2**63 - 1, 2**64 - 1])
def test_sizes_that_a_header_claims_are_not_believed(size: int, tmp_path: Path) -> None:
    for name, read in (("checkpoint", read_checkpoint), ("deployed", pege_fx.load_deployed)):
        true = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
        (tmp_path / name).write_bytes(size.to_bytes(8, "little") + true + bytes(16))
        with pytest.raises(PegeError):
            read(tmp_path / name)
        header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
        with pytest.raises(PegeError):
            read(tmp_path / name)


LONG = "1" * 5000  # more digits than Python reads
UNREADABLE = {
    "an integer of 5000 digits": f'{{"rules": [{{"weight": {LONG}}}]}}',
    "not a number": '{"rules": [{"weight": NaN}]}',
    "infinite": '{"rules": [{"weight": {"bits": Infinity}}]}',
    "the rules twice": '{"rules": [], "rules": [{"weight": "4"}]}',
    "a field twice": '{"rules": [{"weight": "4", "weight": "8"}]}',
    "a field of a format twice": '{"rules": [{"weight": {"bits": 4, "bits": 8}}]}',
    "a repetition too often": '{"rules": [{"match": "re:x{99999999999}", "weight": "4"}]}',
    "groups without end": '{"rules": [{"match": "re:%s", "weight": "4"}]}' % ("(" * 5000 + ")" * 5000),
    "another mark": '\ufeff{"rules": []}',
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_policies_in_json_that_nobody_could_mean_are_refused(text: str) -> None:
    with pytest.raises(PolicyError):
        QuantPolicy.from_json(text)


TOML = {
    "empty": b"",
    "utf-16": "rules = []".encode("utf-16"),
    "a zero": b"rules = []\0",
    "an integer of 5000 digits": f"rules = [{{weight = {LONG}}}]".encode(),
    "a hexadecimal integer": b"rules = [{weight = 0x" + b"f" * 100_000 + b"}]",
    "not a number": b"[[rules]]\nweight = nan",
    "a date": b"[[rules]]\nweight = 1979-05-27",
    "the rules twice": b"rules = []\nrules = []",
    "a key without end": b"a." * 200_000 + b"b = 1",
    "a table without end": b"[" + b'"a" . ' * 200_000 + b"b]",
}


@pytest.mark.parametrize("data", TOML.values(), ids=TOML.keys())
def test_policies_in_toml_that_nobody_could_mean_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(data)
    with pytest.raises(PolicyError):
        QuantPolicy.from_toml(path)


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")  # which nobody writes to
    for path in (tmp_path, tmp_path / "loop", tmp_path / "loop" / "file", Path("a\0b"), Path("x" * 5000)):
        for read in (QuantPolicy.from_toml, read_checkpoint, pege_fx.load_deployed):
            with pytest.raises(PegeError):
                read(path)  # type: ignore[operator]
        with pytest.raises(PegeError):
            POLICY.to_toml(path)
    for path in (tmp_path / "pipe", Path("/dev/zero")):  # reading them would not end
        for read in (QuantPolicy.from_toml, read_checkpoint, pege_fx.load_deployed):
            with pytest.raises(PegeError, match="give a file"):
                read(path)  # type: ignore[operator]
    assert pege_fx.newest("x" * 5000) is None


ENTRY = '"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
HEADERS = {
    "one name twice": f"{{{ENTRY},{ENTRY}}}",
    "tensors on each other": f'{{{ENTRY},"v":{{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}}}',
    "a gap": f"{{{ENTRY.replace('[0,16]', '[8,24]')}}}",
    "a negative size": f"{{{ENTRY.replace('[4]', '[-4]')}}}",
    "a negative place": f"{{{ENTRY.replace('[0,16]', '[-16,0]')}}}",
    "the end first": f"{{{ENTRY.replace('[0,16]', '[16,0]')}}}",
    "a product that overflows": f"{{{ENTRY.replace('[4]', '[4294967296, 4294967296, 4]')}}}",
    "nothing, of a size that overflows": f"{{{ENTRY.replace('[4]', '[0, 18446744073709551615]').replace('[0,16]', '[0,0]')}}}",
    "no dtype of this world": f"{{{ENTRY.replace('F32', 'F33')}}}",
    "a dtype in small letters": f"{{{ENTRY.replace('F32', 'f32')}}}",
    "metadata of numbers": f'{{"__metadata__":{{"kind":1}},{ENTRY}}}',
    "metadata that is a list": f'{{"__metadata__":[1],{ENTRY}}}',
    "no object": "[" * 10_000,
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
def test_headers_that_do_not_fit_their_file_are_refused(header: str, tmp_path: Path) -> None:
    for encoded in (header.encode(), header.encode("utf-16")):
        for data in (b"", bytes(16)):
            (tmp_path / "file").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
            for read in (read_checkpoint, pege_fx.load_deployed):
                with pytest.raises(PegeError):
                    read(tmp_path / "file")


@pytest.mark.parametrize("size", range(9))
def test_a_file_that_ends_before_its_header_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    for read in (read_checkpoint, pege_fx.load_deployed):
        with pytest.raises(PegeError):
            read(tmp_path / "file")


CODES = [[bits, True, [4, 4]] for bits in (0, -1, 9, 64, 10**9, 2**70, 4.0, "4", None)]
CODES += [[4, True, shape] for shape in ([2**40], [-1, -1], [2**32, 2**32], [4] * 3000, "44", 4, [2.0, 2.0])]


@pytest.mark.parametrize("claimed", CODES, ids=lambda claimed: str(claimed)[:20])
def test_codes_of_other_bits_or_shapes_than_are_stored_are_refused(claimed: list[Any], tmp_path: Path) -> None:
    """And at once: of 10^9 bits, a single code would take minutes and gigabytes."""
    pege_fx.save_deployed(pege_fx.convert(prepared().eval()), tmp_path / "whole")
    header, tensors = json.loads(raw(tmp_path / "whole")["pege_fx"]), load_file(tmp_path / "whole")
    text = json.dumps(header | {"packed": dict.fromkeys(header["packed"], claimed)})
    save_file(tensors, tmp_path / "altered", {"pege_fx": text, "sha256": deployed.FILE.checksum(text, tensors)})
    with pytest.raises(PegeError, match="is broken"):
        pege_fx.load_deployed(tmp_path / "altered")


@pytest.mark.parametrize("name", ["a." * 2000 + "a", "", "a..b", "forward", "graph", "_parameters", "training", "__class__"])
def test_names_of_tensors_that_a_module_can_not_have_are_refused(name: str, tmp_path: Path) -> None:
    pege_fx.save_deployed(pege_fx.convert(prepared().eval()), tmp_path / "whole")
    text, tensors = raw(tmp_path / "whole")["pege_fx"], load_file(tmp_path / "whole") | {name: X}
    save_file(tensors, tmp_path / "altered", {"pege_fx": text, "sha256": deployed.FILE.checksum(text, tensors)})
    with pytest.raises(PegeError, match="is broken"):
        pege_fx.load_deployed(tmp_path / "altered")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_a_checkpoint_with_another_kind_of_number_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "whole")
    found, tensors = raw(tmp_path / "whole"), load_file(tmp_path / "whole")
    for name in ("model.0.weight", "model.0.weight_fq.method.scale", "model.1.num_batches_tracked"):
        altered = tensors | {name: tensors[name].to(dtype)}
        if tensors[name].dtype is dtype:
            continue
        digest = tensor_tree.FILE.checksum(found["tree"], altered)
        save_file(altered, tmp_path / "altered", found | {"sha256": digest})
        with pytest.raises(PegeError, match=name.removeprefix("model.")):
            read_checkpoint(tmp_path / "altered")


def test_nothing_that_reads_files_can_run_what_is_in_them() -> None:
    """No pickle, eval, exec, marshal or yaml anywhere in the package, and no ``torch.load``."""
    package = Path(pege_fx.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name == "testing":  # pickles what it made itself
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "pickle.load", "pickle.loads"), f"{path}: {called}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"marshal", "shelve", "dill", "cloudpickle"}, path
