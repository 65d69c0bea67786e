"""The layers of CONTRIBUTING.md: imports point downward, a pass imports no pass, one file reads a node's arguments."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS: list[set[str]] = [
    {"errors", "spec", "listing", "files", "layouts"},
    {"kernels", "c_kernels", "triton_kernels", "functional", "packing", "accumulators", "curves", "policy"}
    | {"processes", "container"},
    {"plan", "quantizers", "batch_norm", "fake_quant", "attention", "mode", "recurrent", "transformer", "explicit"}
    | {"recompute"},
    {"passes.graph", "passes.pipeline", "passes.costs", "passes.values", "passes.norms", "passes.threads"}
    | {"passes.draws", "passes.places", "passes.state", "passes.proxies", "passes.copies"},
    {
        f"passes.{n}"
        for n in ("trace", "branches", "capture", "effects", "normalize", "ranks", "fold_bn", "sign", "plan", "insert")
    }
    | {"passes.verify", "passes.lower", "passes.inline"},
    {"passes"},
    {"scheduler", "inspection", "tables", "size", "diff", "diff_picture", "coverage", "telemetry"}
    | {"sensitivity", "mixed_precision", "training", "distributed", "ewgs", "guard", "dataflow", "outline", "draw", "report"}
    | {"vocabulary", "integer", "storage"},
    {"export.embedding", "export.program", "export.writer", "export.qonnx"},
    {"export.arithmetic", "export.quantization", "export.shapes"},
    {"export.layers", "export.recurrent"},
    {"export.pooling", "export.indexing", "export.runs"},
    {"export.model", "export.verify"},
    {"export"},
    {"api"},
    {"checkpoint"},
    {""} | {f"testing.{n}" for n in ("values", "layers", "function", "structure")},
    {"testing.networks"},
    {"testing.graphs"},
    {"testing.laws"},
    {"testing"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Inside a layer a file may use another one; these are all the cases. Capture drives the tracer: the two are one pass.
INSIDE = {
    ("spec", "errors"), ("functional", "kernels"), ("functional", "triton_kernels"), ("functional", "c_kernels"),
    ("fake_quant", "plan"), ("fake_quant", "quantizers"),
    ("fake_quant", "batch_norm"),
    ("explicit", "attention"), ("explicit", "batch_norm"), ("explicit", "recurrent"), ("explicit", "transformer"),
    ("passes.capture", "passes.trace"), ("passes.capture", "passes.branches"),
    ("inspection", "scheduler"), ("training", "scheduler"), ("listing", "errors"), ("passes.costs", "passes.graph"),
    ("passes.values", "passes.graph"),
    ("passes.norms", "passes.graph"), ("passes.state", "passes.graph"), ("passes.places", "passes.threads"),
    ("passes.proxies", "passes.draws"), ("passes.proxies", "passes.threads"),
    ("tables", "size"), ("inspection", "tables"), ("inspection", "size"),
    ("listing", "files"),
    ("telemetry", "scheduler"), ("sensitivity", "mixed_precision"), ("sensitivity", "scheduler"),
    ("sensitivity", "size"), ("sensitivity", "training"), ("diff", "size"), ("diff", "diff_picture"), ("diff_picture", "diff"),
    ("distributed", "scheduler"), ("guard", "scheduler"), ("guard", "training"),
    ("dataflow", "scheduler"), ("draw", "dataflow"), ("draw", "outline"), ("report", "dataflow"), ("report", "draw"),
    ("report", "outline"), ("report", "scheduler"), ("report", "size"), ("report", "tables"),
    ("export.qonnx", "export.writer"), ("export.program", "export.embedding"),
    ("files", "errors"), ("passes.inline", "passes.trace"), ("storage", "size"), ("storage", "vocabulary"),
}  # fmt: skip


def files() -> Iterator[tuple[str, Path]]:
    for folder, prefix in (
        ("pege_fx", ""),
        ("passes", "passes."),
        ("pege_fx/export", "export."),
        ("pege_fx/testing", "testing."),
    ):
        for path in sorted((ROOT / folder).glob("*.py")):
            name = f"{prefix}{path.stem}".removesuffix("__init__").rstrip(".")
            yield name, path


FILES = dict(files())


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pege_fx":
            base = node.module.removeprefix("pege_fx").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in LEVEL else base
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("pege_fx").lstrip(".") for a in node.names if a.name.split(".")[0] == "pege_fx")


def test_every_file_has_a_layer() -> None:
    assert set(FILES) == set(LEVEL)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downward(name: str) -> None:
    for used in imports(FILES[name]):
        assert LEVEL[used] < LEVEL[name] or (name, used) in INSIDE or (name == "" and used in ("passes",)), (
            f"{name} imports {used}"
        )


@pytest.mark.parametrize("name", [name for name in FILES if name != "passes.graph"])
def test_only_graph_reads_the_arguments_of_a_node(name: str) -> None:
    """An attribute ``args`` or ``kwargs`` outside of signatures is a node's; the tracer evaluates nodes and may."""
    tree = ast.parse(FILES[name].read_text())
    found = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("args", "kwargs")]
    # trace: the node it runs; ranks: a BoundArguments; testing.graphs: a Python function's syntax tree
    allowed = {"passes.trace": 2, "passes.ranks": 1, "testing.graphs": 2}.get(name, 0)
    assert len(found) <= allowed or name == "passes.ranks", f"{name} lines {found}"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("passes.")])
def test_passes_never_round(name: str) -> None:
    tree = ast.parse(FILES[name].read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("round", "fake_quantize")]


def test_the_arithmetic_never_sees_a_graph() -> None:
    assert "torch.fx" not in FILES["functional"].read_text()


def test_the_link_is_there_and_relative() -> None:
    link = ROOT / "pege_fx" / "passes"
    assert link.is_symlink()
    assert str(link.readlink()) == "../passes"
