"""The front door: what goes wrong is said with what, where and the fix; the model is left alone."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import InputError, ModelError, PegeWarning, PolicyError, VerifyError
from pege_fx.testing import Case, networks


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_a_prepared_model_is_not_prepared_again() -> None:
    with pytest.raises(ModelError, match=r"prepared already \(0\.weight_fq is a fake-quant\): prepare the float model"):
        pege_fx.prepare(pege_fx.prepare(net(), "W4A4"), "W4A4")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = net()
    model[3].weight.data[0, 0] = value
    with pytest.raises(ModelError, match=r"3\.weight has 1 of 8 values that are not finite"):
        pege_fx.prepare(model, "W4A4")


def test_inputs_that_do_not_fit_the_signature_show_it() -> None:
    with pytest.raises(
        InputError, match=r"do not fit Sequential\.forward\(input\).*too many[\s\S]*given: 2 positional"
    ) as caught:
        pege_fx.prepare(net(), "W4A4", (X, X))
    assert "tuple of positional arguments" in str(caught.value)
    with pytest.raises(InputError, match=r"keywords \['y'\]"):
        pege_fx.prepare(net(), "W4A4", example_kwargs={"y": X})


def test_inputs_of_a_wrong_shape_show_it() -> None:
    with pytest.raises(InputError, match=re.escape("fails on the example inputs [(2, 5, 6, 6)]")):
        pege_fx.prepare(net(), "W4A4", (X[:, :1].expand(2, 5, 6, 6),))


def test_keywords_and_a_bare_tensor_are_examples_too() -> None:
    by_keyword = pege_fx.prepare(net(), "W4A4", example_kwargs={"input": X})
    bare = pege_fx.prepare(net(), "W4A4", X)  # type: ignore[arg-type]
    assert torch.equal(by_keyword(X), bare(X))
    assert all(fq.is_calibrated for fq in pege_fx.fake_quants(by_keyword).values())


def test_a_model_without_anything_to_quantize_warns_node_by_node() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Embedding(3, 3, max_norm=1.0))
    with pytest.warns(PegeWarning, match=r"nothing is quantized:\n  1: 1 changes its weight in place"):
        gm = pege_fx.prepare(model, pege_fx.QuantPolicy((pege_fx.Rule(weight="4"),)))
    assert isinstance(gm, GraphModule)
    with pytest.warns(PegeWarning, match="nothing is quantized"):
        pege_fx.prepare(net(), pege_fx.QuantPolicy((pege_fx.Rule(weight=None, input=None),)))


def test_a_rule_that_decides_nothing_names_the_closest_path() -> None:
    policy = pege_fx.QuantPolicy((pege_fx.Rule(weight="4"), pege_fx.Rule(match="33", weight="2")))
    with pytest.raises(PolicyError, match=r"match='33'.*decides for none of 2 operations[\s\S]*closest paths: 3"):
        pege_fx.prepare(net(), policy)


@pytest.mark.parametrize("bad", [None, 4, ["W4A4"]])
def test_what_is_no_policy_is_refused(bad: object) -> None:
    with pytest.raises(PolicyError, match='a short form as "W4A4"'):
        pege_fx.prepare(net(), bad)  # type: ignore[arg-type]


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ModelError, match=r"function is not an nn\.Module"):
        pege_fx.prepare(lambda x: x, "W4A4")  # type: ignore[arg-type]


def test_the_pipeline_is_a_list_and_a_failing_pass_is_named() -> None:
    passes = pege_fx.prepare_passes("W4A4")
    seen: list[int] = []

    def count_nodes(gm: GraphModule) -> None:
        """Count."""
        seen.append(len(gm.graph.nodes))

    passes.insert(1, count_nodes)
    pege_fx.prepare(net(), "W4A4", passes=passes)
    assert seen
    assert "2. count_nodes: Count." in str(passes)

    def fail(gm: GraphModule) -> None:
        raise VerifyError("no")

    with pytest.raises(VerifyError) as caught:
        pege_fx.prepare(net(), "W4A4", passes=[*passes, fail])
    assert caught.value.__notes__ == ["in pass fail"]


def test_the_model_is_left_alone() -> None:
    model = net().eval()
    model[0].train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    classes = [type(m) for m in model.modules()]
    gm = pege_fx.prepare(model, "W2A2", (X,))
    gm.train()(X).sum().backward()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert [m.training for m in model.modules()] == modes
    assert [type(m) for m in model.modules()] == classes
    assert all(p.grad is None for p in model.parameters())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in gm.parameters()}


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(networks(), st.sampled_from(["train", "freeze", "keep"]))
@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_shared_parameters_compute_what_copies_do(case: Case, batch_norm: Any) -> None:
    model, own = case.network, case.network.state_dict(keep_vars=True)
    classes, before = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    copied = pege_fx.prepare(model, "W4A4", case.inputs, batch_norm=batch_norm)
    shared = pege_fx.prepare(model, "W4A4", case.inputs, batch_norm=batch_norm, share_parameters=True)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(value, before[name]) for name, value in own.items())
    if batch_norm != "freeze":  # which makes other parameters
        state = shared.state_dict(keep_vars=True)
        assert all(state[name] is value for name, value in own.items())
    for gm in (copied, shared):
        torch.manual_seed(0)
        gm.train()(*case.inputs).square().mean().backward()
    for (name, one), other in zip(copied.named_parameters(), shared.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


class Counts(nn.Module):
    """Leaves traces of every call: in buffers by Python's hand and by torch's, in attributes, in a module that stays Python."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("largest", torch.zeros(()))
            self.fc, self.calls = nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if x.max() > self.largest:
                self.largest = x.max()
            return self.fc(x)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fc = self.Inner(), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(nn.functional.batch_norm(self.inner(x), self.mean, self.var, training=True))


@pytest.mark.parametrize("share_parameters", [False, True])
@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_the_example_leaves_no_trace(share_parameters: bool) -> None:
    model = Counts()
    before = copy.deepcopy(model.state_dict())
    gm = pege_fx.prepare(model, "W4A4", torch.randn(3, 4) + 2, share_parameters=share_parameters)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close({key: gm.state_dict()[key] for key in before}, before, rtol=0, atol=0)
    assert model.inner.calls == gm.inner.calls == 0
    gm(torch.randn(3, 4) + 2)
    assert gm.calls == gm.inner.calls == 1
    assert gm.inner.largest > 0


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11_bn", "efficientnet_b0"])
def test_torchvision_models_train_and_deploy_what_they_evaluate(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10)
    if name == "vgg11_bn":
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    x = torch.randn(4, 3, 32, 32)
    gm = pege_fx.prepare(model, "W4A4", (x,))
    scheduler = pege_fx.PEGEScheduler(gm, total_steps=3)
    optimizer = torch.optim.SGD(pege_fx.parameter_groups(gm, lr=1e-3), momentum=0.9)
    for _ in range(3):
        loss = gm(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        assert torch.isfinite(loss)
    assert set(model.state_dict()) <= set(gm.state_dict())
    gm.eval()
    with torch.no_grad():
        assert torch.equal(pege_fx.convert(gm)(x), gm(x))


def test_dropout_by_mode_stays_live() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = nn.functional.dropout(self.fc(x), 0.5, self.training)
            return out

    gm = pege_fx.prepare(Dropping(), "W4A4", (torch.randn(2, 8),))
    x = torch.randn(64, 8)
    assert (gm(x) == 0).float().mean() > 0.3
    assert torch.equal(gm.eval()(x), gm(x))


def test_explain_changes_nothing_and_answers_for_one_operation() -> None:
    model = net()
    explanation = pege_fx.explain(model, "W4A4")
    edge = explanation["3"].edge("weight")
    assert edge is not None
    assert "role='last'" in edge.rule
    with pytest.raises(ModelError, match="closest: 3"):
        explanation["33"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "dry run" in str(explanation)
