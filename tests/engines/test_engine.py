"""Engines by name: policies, files and verdicts of one that a user brings, and what is said of one that is not there."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import ExportError, PolicyError, QuantPolicy, Rule, engines
from pege_fx.engines import engine
from pege_fx.engines.engine import Profile, Refusal
from pege_fx.policy import engine_policies
from pege_fx.policy.plan import Plan

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Agreement:
    """The verdict of a file: equal answers or not."""

    def __init__(self, is_equal: bool) -> None:
        self.ok, self.verdict = is_equal, "exact" if is_equal else "different"


class Stored:
    """An engine of a user's own: it runs what ``save_deployed`` writes, and takes linear layers in 4 bits alone."""

    name = "stored"

    def policy(self, bits: str, **options: Any) -> QuantPolicy:
        return QuantPolicy((*QuantPolicy.parse(bits, **options).rules, Rule(function="linear", weight="4")))

    def refuses(self, plan: Plan) -> list[Refusal]:
        return [
            Refusal(operation.path, operation.function, "it has linear layers alone")
            for operation in plan.operations
            if operation.function != "linear"
        ]

    def export(self, deployed: GraphModule, path: str | os.PathLike[str], example_inputs: Any = (), **options: Any) -> int:
        return pege_fx.save_deployed(deployed, path, **options)

    def verify(self, deployed: GraphModule, path: str | os.PathLike[str], batches: Iterable[Any]) -> Agreement:
        loaded = pege_fx.load_deployed(path)
        return Agreement(all(torch.equal(loaded(batch), deployed(batch)) for batch in batches))

    def profile(self, path: str | os.PathLike[str], example_inputs: Any) -> Profile:
        return Profile({"linear": 2}, 0, 2)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Stored:
    monkeypatch.setattr(engine, "_ENGINES", dict(engine._ENGINES))
    monkeypatch.setattr(engine_policies, "_POLICIES", dict(engine_policies._POLICIES))
    engines.register(made := Stored())
    return made


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def test_an_engine_of_ones_own_is_known_by_its_name(stored: Stored, tmp_path: Path) -> None:
    assert engines.names() == ("onnxruntime", "stored")
    policy = QuantPolicy.parse("W8A8", engine="stored")
    deployed = pege_fx.convert(pege_fx.prepare(network(), policy, X))
    size = engines.export(deployed, tmp_path / "model", engine="stored")
    assert size == (tmp_path / "model").stat().st_size
    assert pege_fx.verify(deployed, tmp_path / "model", [X], engine="stored").verdict == "exact"
    assert (
        pege_fx.verify(pege_fx.convert(pege_fx.prepare(network(), "W2A2", X)), tmp_path / "model", [X], engine=stored).ok
        is False
    )
    assert stored.profile(tmp_path / "model", X).share == 0


def test_the_dry_run_says_what_an_engine_will_do(stored: Stored) -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2)).eval()
    told = pege_fx.explain(model, "W8A8", (X.unsqueeze(-1),), engine="stored")
    assert told["0"].engine == "stored: in float, it has linear layers alone"
    assert told["2"].engine == "stored: in integers"
    assert "  stored: in integers" in str(told["2"])
    assert [operation["engine"] for operation in told.to_dict()["operations"]] == [told["0"].engine, told["2"].engine]
    assert {operation.engine for operation in pege_fx.explain(model, "W8A8").operations} == {""}


def test_the_folder_of_writers_can_be_called(tmp_path: Path) -> None:
    """``pege_fx.export`` is both: a function of that name would hide the folder."""
    import pege_fx.export as folder

    assert callable(folder)
    assert folder.export_onnx is pege_fx.export_onnx
    with pytest.raises(ExportError, match="there is no engine 'tpu': known are onnxruntime"):
        folder(pege_fx.convert(pege_fx.prepare(network(), "W8A8", X)), tmp_path / "model", engine="tpu")


def test_an_engine_that_is_not_there() -> None:
    with pytest.raises(PolicyError, match="there is no engine 'tpu': known are onnxruntime"):
        QuantPolicy.parse("W8A8", engine="tpu")
    with pytest.raises(ExportError, match="there is no engine 'tpu'"):
        pege_fx.explain(network(), "W8A8", engine="tpu")


def test_a_name_belongs_to_one_engine(stored: Stored) -> None:
    engines.register(stored)
    with pytest.raises(ExportError, match="there is an engine 'stored' already"):
        engines.register(Stored())


def test_rules_that_may_decide_for_nothing() -> None:
    policy = QuantPolicy((Rule(weight="8", input="8"), Rule(function="cat", input="8", optional=True)))
    assert QuantPolicy.from_json(policy.to_json()) == policy
    assert repr(policy.rules[1]) == "Rule(function='cat', input='8', optional=True)"
    pege_fx.prepare(network(), policy, X)
    with pytest.raises(PolicyError, match="decides for none"):
        pege_fx.prepare(network(), QuantPolicy((*policy.rules, Rule(function="cat", input="8"))), X)
    with pytest.raises(PolicyError, match="optional='yes': give True or False"):
        Rule(weight="8", optional="yes")  # type: ignore[arg-type]
