"""CI and the commit hooks call the targets of the Makefile, on every version that the package says it supports."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def jobs() -> list[dict[str, str]]:
    """Target and Python of every job."""
    matrix = read(".github/workflows/ci.yml")["jobs"]["make"]["strategy"]["matrix"]
    return [{"target": target, "python": python} for target in matrix["target"] for python in matrix["python"]] + matrix[
        "include"
    ]


def test_every_job_is_a_target_of_the_makefile(jobs: list[dict[str, str]]) -> None:
    steps = read(".github/workflows/ci.yml")["jobs"]["make"]["steps"]
    assert steps[-1]["run"] == "make ${{ matrix.target }}"
    assert {job["target"] for job in jobs} <= TARGETS
    assert {"lint", "test", "test-oldest", "docs"} <= {job["target"] for job in jobs}


def test_every_night_calls_a_target_of_the_makefile() -> None:
    (job,) = read(".github/workflows/nightly.yml")["jobs"].values()
    assert job["steps"][-1]["run"].removeprefix("make ") in TARGETS


def test_tests_run_on_every_supported_python(jobs: list[dict[str, str]]) -> None:
    classified = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    tested = [job["python"] for job in jobs if job["target"] == "test"]
    assert sorted(tested) == sorted(classified)
    assert PROJECT["project"]["requires-python"] == f">={tested[0]}"
    assert tested[0] in [job["python"] for job in jobs if job["target"] == "test-oldest"]


def test_the_oldest_torch_is_the_oldest_that_the_package_takes() -> None:
    (bound,) = (entry.removeprefix("torch>=") for entry in PROJECT["project"]["dependencies"] if entry.startswith("torch>="))
    assert f"'torch=={bound}.*'" in (ROOT / "Makefile").read_text()


def test_hooks_call_targets() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    commands = [hook["entry"] for hook in repository["hooks"]]
    assert repository["repo"] == "local"
    assert {command.removeprefix("make ") for command in commands} <= TARGETS


def test_one_machine_runs_what_ci_runs(jobs: list[dict[str, str]]) -> None:
    called = set(re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.M))
    assert called == {job["target"] for job in jobs} - {"demo"}
