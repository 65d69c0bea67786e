"""Mutation testing: which changes to a source file does no test notice?

python benchmarks/mutants.py [--only 'curves*'] [--share 0.2] [--seed 0]

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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"

# What is tested, by which tests, and which of those take long for what they see.
TARGETS: dict[str, list[str]] = {
    "curves": ["tests/test_curves.py"],
    "functional": ["tests/test_functional.py", "tests/test_numbers.py"],
    "scheduler": ["tests/test_scheduler.py"],
    "quantizers": ["tests/test_quantizers.py", "tests/test_numbers.py"],
    "passes.fold_bn": ["tests/passes/test_fold_bn.py"],
    "passes.sign": ["tests/passes/test_sign.py"],
    "passes.pipeline": ["tests/passes/test_pipeline.py"],
    "passes.insert": ["tests/passes/test_insert.py"],
    "passes.normalize": ["tests/passes/test_normalize.py"],
}
SLOW = "compiled or compiles"
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


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file that compiles and is not in an annotation."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    source = path.read_text(encoding="utf-8")
    annotated = set(_annotations(ast.parse(source)))
    for name in sorted(plugins.operator_names()):
        operator_class = plugins.get_operator(name)
        if operator_class.arguments() or not _is_near(name):
            continue
        positions = [start for node in ast_nodes(get_ast(source)) for start, _ in operator_class().mutation_positions(node)]
        for occurrence, (line, column) in enumerate(positions):
            if (line, column) in annotated:
                continue
            changed = mutate_code(source, operator_class(), occurrence)
            if changed is not None and changed != source and _compiles(changed):
                yield Mutant(line, name.removeprefix("core/"), *_lines(source, changed), changed)


def _is_near(operator: str) -> bool:
    """Whether the replacement is one that a person might mistake for the original."""
    kind, _, pair = operator.removeprefix("core/").partition("_")
    before, _, after = pair.partition("_")
    if kind == "ReplaceBinaryOperator":
        return after in NEIGHBOURS[before]
    return kind != "ReplaceComparisonOperator" or before.startswith("Is") == after.startswith("Is")


def _annotations(tree: ast.AST) -> Iterator[tuple[int, int]]:
    """Yield every position inside an annotation."""
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if (inner := getattr(node, field, None)) is not None and inner.lineno == inner.end_lineno:
                yield from ((inner.lineno, column) for column in range(inner.col_offset, inner.end_col_offset))


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

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.name, self.path, self.source = name, str(path), source

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=Loader(fullname, self.path, self.source))


def survives(name: str, source: str, tests: Sequence[str], timeout: int) -> bool:
    """Run the tests on a mutant, in a fork; tell whether they pass. Running out of time or memory is failing."""
    child = os.fork()
    if child == 0:
        signal.alarm(timeout)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        code = 1
        try:
            import pytest

            sys.meta_path.insert(0, Finder(f"pege_fx.{name}", file_of(name), source))
            plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:logging"]
            options = ["-x", "-q", *plugins, "-W", "ignore::pytest.PytestAssertRewriteWarning", "-k", f"not ({SLOW})"]
            code = int(pytest.main([*options, *tests]))
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return status == 0


def examine(name: str, share: float, seed: int, timeout: int) -> dict[str, Any]:
    """Return how many mutants of a module were made and killed, and those that survived."""
    tests = [test for test in TARGETS[name] if (ROOT / test).exists()]
    if not survives(name, file_of(name).read_text(encoding="utf-8"), tests, 10 * timeout):
        raise SystemExit(f"{name}: the tests fail without any mutant: {' '.join(tests)}")
    found = list(mutants(file_of(name)))
    drawn = random.Random(seed).sample(found, round(share * len(found)))
    drawn.sort(key=lambda mutant: mutant.line)
    survivors, started = [], time.monotonic()
    for number, mutant in enumerate(drawn, 1):
        if survives(name, mutant.source, tests, timeout):
            survivors.append({key: value for key, value in asdict(mutant).items() if key != "source"})
            print(f"  {name}:{mutant.line} {mutant.operator}\n    - {mutant.before}\n    + {mutant.after}", flush=True)
        if sys.stdout.isatty():
            print(f"{name}: {number}/{len(drawn)}, {number - len(survivors)} killed", end="\r", flush=True)
    killed = len(drawn) - len(survivors)
    print(f"{name}: {len(found)} mutants, {len(drawn)} tried, {killed} killed ({100 * killed / max(len(drawn), 1):.1f} %)")
    seconds = round(time.monotonic() - started)
    return {"mutants": len(found), "tried": len(drawn), "killed": killed, "seconds": seconds, "survivors": survivors}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="modules, as a glob: 'curves', 'passes.*'")
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=60, help="seconds for the tests of one mutant")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"

    # What every fork would import again.
    import hypothesis  # noqa: F401
    import networkx  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in TARGETS:
        if fnmatch.fnmatch(name, options.only):
            results[name] = examine(name, options.share, options.seed, options.timeout)
            results[name] |= {"share": options.share, "seed": options.seed}
            results[name] |= {"python": platform.python_version(), "torch": torch.__version__}
            RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
