"""Mutation testing: which changes to a source file does no test notice?

python benchmarks/mutants.py [--only 'curves*'] [--share 0.2] [--seed 0]
python benchmarks/mutants.py --survivors [--only 'curves*']    # those of the stored results again, with the tests of today

The mutants are Cosmic Ray's. Each is tested in a fork of a process that has imported torch already and pege_fx not yet,
so that one costs a second or two; nothing is written to the source files. What annotations say is left alone. Results:
benchmarks/results/mutants.json; the survivors are judged in docs/mutants.md.
"""

import argparse
import ast
import fnmatch
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import platform
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"

# What is tested, by which tests, the quickest first, and which of those take long for what they see.
TARGETS: dict[str, list[str]] = {
    "training.curves": ["tests/training/test_curves.py"],
    "numerics.functional": [
        "tests/numerics/test_functional.py",
        "tests/kernels/test_inductor.py",
        "tests/numerics/test_recompute.py",
        "tests/modules/test_fake_quant.py",
    ],
    "training.scheduler": ["tests/training/test_scheduler.py"],
    "modules.methods": ["tests/modules/test_methods.py", "tests/test_numbers.py"],
    "_utils.files": ["tests/utils/test_files.py", "tests/test_hostile.py"],
    "serialization.codec": ["tests/serialization/test_codec.py", "tests/serialization/test_tensor_tree.py"],
    "serialization.tensor_tree": ["tests/serialization/test_tensor_tree.py", "tests/serialization/test_checkpoint.py"],
    "serialization.checkpoint": ["tests/serialization/test_checkpoint.py"],
    "policy.rules": ["tests/policy/test_rules.py"],
    "kernels.inductor": ["tests/kernels/test_inductor.py", "tests/kernels/test_kernels_by_hand.py"],
    "kernels.c_kernels": ["tests/kernels/test_kernels_by_hand.py", "tests/kernels/test_c_kernels.py"],
    "kernels.tensor_layout": ["tests/kernels/test_tensor_layout.py"],
    "modules.fake_quant": [
        "tests/modules/test_fake_quant.py",
        "tests/test_joining.py",
        "tests/numerics/test_recompute.py",
        "tests/modules/test_batch_norm.py",
    ],
    "modules.batch_norm": ["tests/modules/test_batch_norm.py"],
    "training.ewgs": ["tests/training/test_ewgs.py"],
    "training.guard": ["tests/training/test_guard.py"],
    "modules.mode": [
        "tests/modules/test_mode.py",
        "tests/passes/capture/test_branches.py",
        "tests/training/test_calibration.py",
    ],
    "passes.fold_bn": ["tests/passes/test_fold_bn.py", "tests/modules/test_batch_norm.py"],
    "passes.norms": ["tests/passes/test_fold_bn.py", "tests/modules/test_batch_norm.py"],
    "passes.sign": ["tests/passes/test_sign.py"],
    "passes.pipeline": ["tests/passes/test_pipeline.py"],
    "passes.plan": ["tests/passes/test_plan.py", "tests/policy/test_rules.py", "tests/test_joining.py"],
    "passes.insert": ["tests/passes/test_insert.py"],
    "passes.normalize": ["tests/passes/test_normalize.py"],
    "passes.effects": ["tests/passes/test_effects.py"],
    "passes.graph.operands": ["tests/passes/test_graph.py", "tests/passes/test_normalize.py", "tests/passes/test_insert.py"],
    "passes.graph.building": ["tests/passes/test_graph.py", "tests/passes/test_normalize.py", "tests/passes/test_insert.py"],
    "passes.graph.effects": ["tests/passes/test_graph.py", "tests/passes/test_normalize.py", "tests/passes/test_insert.py"],
    "passes.operators": ["tests/passes/test_operators.py", "tests/passes/test_costs.py", "tests/passes/test_graph.py"],
    "passes.op_traits": ["tests/passes/test_op_traits.py", "tests/passes/test_effects.py"],
    "passes.op_rules": ["tests/passes/test_sign.py", "tests/passes/test_ranks.py"],
    "passes.graph.traits": ["tests/passes/test_op_traits.py", "tests/passes/test_sign.py", "tests/passes/test_ranks.py"],
    "passes.program": ["tests/passes/test_program.py"],
    "passes.capture.shapes": ["tests/passes/test_ranks.py", "tests/passes/capture/test_tiers.py"],
    "passes.lower": ["tests/passes/test_lower.py", "tests/serialization/test_deployed.py"],
    "passes.ranks": ["tests/passes/test_ranks.py", "tests/passes/capture/test_tiers.py"],
    "passes.capture.tracer": [
        "tests/passes/capture/test_module_state.py",
        "tests/passes/test_einops.py",
        "tests/passes/capture/test_tracer.py",
        "tests/passes/capture/test_tiers.py",
    ],
    "passes.capture.module_state": ["tests/passes/capture/test_module_state.py"],
    "passes.capture.proxies": [
        "tests/passes/capture/test_proxies.py",
        "tests/passes/capture/test_rng_guard.py",
        "tests/passes/capture/test_tiers.py",
    ],
    "passes.capture.model_copy": ["tests/passes/capture/test_model_copy.py"],
    "passes.capture.patched": ["tests/passes/capture/test_patched.py", "tests/passes/capture/test_contexts.py"],
    "passes.capture.rng_guard": ["tests/passes/capture/test_rng_guard.py"],
    "passes.capture.source_location": [
        "tests/passes/capture/test_source_location.py",
        "tests/passes/capture/test_tracer.py",
        "tests/passes/capture/test_tiers.py",
    ],
    "passes.capture.known": ["tests/passes/capture/test_guards.py"],
    "passes.capture.example_values": ["tests/passes/capture/test_tracer.py", "tests/passes/capture/test_tiers.py"],
    "passes.capture.patching_tracer": ["tests/passes/capture/test_patched.py", "tests/passes/capture/test_contexts.py"],
    "passes.capture.graph_modules": ["tests/passes/capture/test_tiers.py"],
    "serialization.compatibility": ["tests/serialization/test_checkpoint.py"],
    "passes.capture.tiers": [
        "tests/test_api.py",
        "tests/passes/capture/test_module_state.py",
        "tests/passes/capture/test_tiers.py",
    ],
    "passes.capture.branches": ["tests/passes/capture/test_branches.py"],
    "passes.values": ["tests/passes/test_values.py", "tests/passes/test_insert.py", "tests/test_joining.py"],
    "passes.inline": ["tests/passes/test_inline.py", "tests/passes/capture/test_tiers.py"],
    "passes.costs": ["tests/passes/test_costs.py"],
    "passes.verify": ["tests/passes/test_verify.py"],
}
SLOW = "networks_keep_their_function or compiled or compiles or kernels_equal or other_layouts or processes_evaluate"
MEMORY = 24 * 2**30

# Of a binary operator only the neighbours: that 1.0 << 2 raises shows nothing about the tests.
NEIGHBOURS = {
    "Add": {"Sub"}, "Sub": {"Add"}, "Mul": {"Div"}, "Div": {"Mul", "FloorDiv"}, "FloorDiv": {"Div"}, "Mod": {"FloorDiv"},
    "Pow": {"Mul"}, "RShift": {"LShift"}, "LShift": {"RShift"}, "BitOr": {"BitAnd"}, "BitAnd": {"BitOr"},
    "BitXor": {"BitOr"},
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change to a file: where, by which operator, and the line before and after."""

    line: int
    operator: str
    before: str
    after: str
    source: str


def file_of(name: str) -> Path:
    """Return the file of a module of pege_fx; passes are at the top of the repository."""
    place = ROOT if name.startswith("passes.") else ROOT / "pege_fx"
    return place / f"{name.replace('.', '/')}.py"


def mutants(path: Path, operators: Collection[str] = ()) -> Iterator[Mutant]:
    """Yield every mutant of a file, or those of some operators, that compiles and is not in an annotation."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    source = path.read_text(encoding="utf-8")
    annotations = list(_annotations(ast.parse(source)))
    for name in sorted(plugins.operator_names()):
        operator_class = plugins.get_operator(name)
        if operator_class.arguments() or not _is_near(name) or (operators and name.removeprefix("core/") not in operators):
            continue
        positions = [start for node in ast_nodes(get_ast(source)) for start, _ in operator_class().mutation_positions(node)]
        for occurrence, position in enumerate(positions):
            if any(start <= position < end for start, end in annotations):
                continue
            try:
                changed = mutate_code(source, operator_class(), occurrence)
            except AttributeError:  # Cosmic Ray replaces no exception whose name has a dot
                continue
            if changed is not None and changed != source and _compiles(changed):
                yield Mutant(position[0], name.removeprefix("core/"), *_lines(source, changed), changed)


def _is_near(operator: str) -> bool:
    """Whether the replacement is one that a person might mistake for the original."""
    kind, _, pair = operator.removeprefix("core/").partition("_")
    before, _, after = pair.partition("_")
    if kind == "ReplaceBinaryOperator":
        return after in NEIGHBOURS[before]
    return kind != "ReplaceComparisonOperator" or before.startswith("Is") == after.startswith("Is")


def _annotations(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield where every annotation starts and ends."""
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if (inner := getattr(node, field, None)) is not None:
                yield (inner.lineno, inner.col_offset), (inner.end_lineno, inner.end_col_offset)


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _lines(source: str, changed: str) -> tuple[str, str]:
    before, after = source.splitlines(), changed.splitlines()
    first = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)) - 1)
    return before[first].strip(), after[first].strip()


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a file's mutant instead of the file."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.mutated = source

    def get_code(self, fullname: str) -> Any:
        return compile(self.mutated, self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    """Finds one module's mutant, and leaves the others to Python."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        file = f"{path[0]}/{fullname.rpartition('.')[2]}.py"  # where Python would find it: passes/ may be a link
        return importlib.util.spec_from_file_location(fullname, file, loader=Loader(fullname, file, self.source))


def survives(name: str, source: str, tests: Sequence[str], timeout: int) -> bool:
    """Run the tests on a mutant, in a fork; tell whether they pass. Running out of time or memory is failing."""
    child = os.fork()
    if child == 0:
        signal.alarm(20 * timeout)  # for what waits forever; a machine that is busy is no reason
        resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        code = 1
        try:
            import pytest

            sys.meta_path.insert(0, Finder(f"pege_fx.{name}", source))
            plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:logging"]
            options = ["-x", "-q", *plugins, "-W", "ignore::pytest.PytestAssertRewriteWarning", "-k", f"not ({SLOW})"]
            code = int(pytest.main([*options, *tests]))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return status == 0


def examine(name: str, drawn: Sequence[Mutant], timeout: int) -> list[dict[str, Any]]:
    """Return the mutants among those drawn of a module that its tests do not notice."""
    tests = [test for test in TARGETS[name] if (ROOT / test).exists()]
    if not survives(name, file_of(name).read_text(encoding="utf-8"), tests, 10 * timeout):
        raise SystemExit(f"{name}: the tests fail without any mutant: {' '.join(tests)}")
    survivors = []
    for number, mutant in enumerate(drawn, 1):
        if survives(name, mutant.source, tests, timeout):
            survivors.append({key: value for key, value in asdict(mutant).items() if key != "source"})
            print(f"  {name}:{mutant.line} {mutant.operator}\n    - {mutant.before}\n    + {mutant.after}", flush=True)
        if sys.stdout.isatty():
            print(f"{name}: {number}/{len(drawn)}, {number - len(survivors)} killed", end="\r", flush=True)
    return survivors


def sampled(name: str, share: float, seed: int, timeout: int) -> dict[str, Any]:
    """Examine a random sample of a module's mutants."""
    found = list(mutants(file_of(name)))
    drawn = sorted(random.Random(seed).sample(found, round(share * len(found))), key=lambda mutant: mutant.line)
    started = time.monotonic()
    survivors = examine(name, drawn, timeout)
    seconds = round(time.monotonic() - started)
    known = {"mutants": len(found), "share": share, "seed": seed, "tried": len(drawn), "seconds": seconds}
    return known | {"killed at first": len(drawn) - len(survivors), "survivors": survivors}


def again(name: str, before: dict[str, Any], timeout: int) -> dict[str, Any]:
    """Examine the survivors of an earlier sample; lines may have moved meanwhile."""

    def kind(mutant: dict[str, Any]) -> tuple[str, ...]:
        return mutant["operator"], mutant["before"], mutant["after"]

    wanted = Counter(map(kind, before["survivors"]))
    drawn = []
    for mutant in mutants(file_of(name), {mutant["operator"] for mutant in before["survivors"]} or {"none"}):
        if wanted[key := kind(asdict(mutant))]:
            wanted[key] -= 1
            drawn.append(mutant)
    return before | {"survivors": examine(name, drawn, timeout)}


def stored() -> dict[str, Any]:
    """Return the results so far, by module."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="modules, as a glob: 'curves', 'passes.*'")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--survivors", action="store_true", help="try the survivors in the stored results again")
    parser.add_argument("--timeout", type=int, default=60, help="processor seconds for the tests of one mutant")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

    # What every fork would import again.
    import graphviz  # noqa: F401
    import hypothesis
    import networkx  # noqa: F401
    import pytest  # noqa: F401
    import rich.table  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # no time to make a counter-example smaller
    hypothesis.settings.register_profile("mutants", phases=phases)
    hypothesis.settings.load_profile("mutants")  # tests/conftest.py starts from it
    for name in TARGETS:
        if not fnmatch.fnmatch(name, options.only):
            continue
        if not options.survivors:
            result = sampled(name, options.share, options.seed, options.timeout)
        elif name in stored():
            result = again(name, stored()[name], options.timeout)
        else:
            continue
        result["killed"] = result["tried"] - len(result["survivors"])
        print(f"{name}: {result['tried']} tried, {result['killed']} killed ({result['killed'] / max(result['tried'], 1):.1%})")
        result |= {"python": platform.python_version(), "torch": torch.__version__}
        RESULTS.write_text(json.dumps(stored() | {name: result}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
