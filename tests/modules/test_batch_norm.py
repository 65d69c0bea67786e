"""BatchNorm in every form, beside every layer, in every mode: one function, one set of statistics, one deployed graph."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import FoldError, PegeWarning, QuantPolicy, QuantSpec, Rule
from pege_fx.kernels.inductor import eager_kernels
from pege_fx.modules.batch_norm import BatchNorm, Folded, FunctionalBatchNorm
from pege_fx.testing import as_trained
from pege_fx.training.scheduler import plan_of

FLOAT = QuantPolicy((Rule(weight=None, input=None),))
DIMENSIONS = (1, 2, 3)


@pytest.fixture(autouse=True, scope="module")
def eager() -> Iterator[None]:
    """Many small models: nothing is compiled."""
    with eager_kernels():
        yield


class ByFunction(nn.Module):
    """A BatchNorm of one's own: tensors of the module and ``F.batch_norm`` on them."""

    def __init__(self, norm: Any, *, frozen: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.frozen = norm.weight, norm.bias, norm.eps, frozen
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        training = False if self.frozen else self.training
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.2, self.eps)


class ByTorch(ByFunction):
    """The same by ``torch.batch_norm``."""

    def forward(self, x: Tensor) -> Tensor:
        moments = self.running_mean, self.running_var
        return torch.batch_norm(x, self.weight, self.bias, *moments, self.training, 0.2, self.eps, False)


class Drop(nn.Module):
    """Dropout by its function."""

    def __init__(self, p: float, training: bool | None = None) -> None:
        super().__init__()
        self.p, self.fixed = p, training

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training if self.fixed is None else self.fixed)


FORMS: dict[str, Any] = {
    "module": lambda norm: norm,
    "synchronised": nn.SyncBatchNorm.convert_sync_batchnorm,
    "function": ByFunction,
    "torch.batch_norm": ByTorch,
    "frozen function": lambda norm: ByFunction(norm, frozen=True),
}
BETWEEN: dict[str, Any] = {
    "identity": lambda dims: nn.Identity(),
    "dropout of nothing": lambda dims: nn.Dropout(0.0),
    "functional dropout of nothing": lambda dims: Drop(0.0, True),
    "functional dropout in no mode": lambda dims: Drop(0.5, False),
    "dropout": lambda dims: nn.Dropout(0.5),
    "channel dropout": lambda dims: (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[dims - 1](0.5) if dims else nn.Dropout(0.3),
    "functional dropout": lambda dims: Drop(0.5),
}


def batch_norm(dims: int, channels: int, **settings: Any) -> nn.Module:
    return (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](channels, **settings)


def layer_of(dims: int, *, transposed: bool = False, **settings: Any) -> nn.Module:
    """A layer of four channels in and eight out."""
    if dims == 0:
        return nn.Linear(4, 8, bias=settings["bias"])
    plain, other = ((nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d))[dims - 1]
    return (other if transposed else plain)(4, 8, 3, **settings)


@st.composite
def pairs(draw: st.DrawFn, *, leads: bool | None = None) -> tuple[nn.Sequential, Tensor]:
    """A layer and its BatchNorm, in front of it or (``leads``) behind; double precision, so that rounding is small."""
    leads = draw(st.booleans()) if leads is None else leads
    dims, settings = draw(st.sampled_from([1, 0, 2, 3])), {"bias": draw(st.booleans())}
    if dims:
        settings |= {"groups": draw(st.sampled_from([1, 2, 4])), "stride": draw(st.sampled_from([1, 2]))}
        settings |= {"dilation": draw(st.sampled_from([1, 2]))}
        settings |= {} if leads else {"transposed": draw(st.booleans()), "padding": draw(st.sampled_from([0, 1]))}
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    form, momentum = draw(st.sampled_from([*FORMS])), draw(st.sampled_from([0.1, None, 1.0]))
    norm = batch_norm(
        dims, 4 if leads else 8, affine=draw(st.booleans()), momentum=momentum, eps=draw(st.sampled_from([1e-5, 1e-2]))
    )
    norm = FORMS[form](as_trained(norm, seed))
    between = [BETWEEN[name](dims) for name in draw(st.lists(st.sampled_from([*BETWEEN]), max_size=2))]
    parts = [layer_of(dims, **settings), *between, norm]  # type: ignore[arg-type]
    model = nn.Sequential(*(reversed(parts) if leads else parts)).double()
    return model, torch.randn(3, 4, *[6] * dims, dtype=torch.double)


def prepared(model: nn.Module, x: Tensor, policy: Any = FLOAT, **options: Any) -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PegeWarning)  # that nothing is quantized
        return pege_fx.prepare(model, policy, (x,), **options)


def verdicts(gm: GraphModule) -> list[str]:
    return [operation.batch_norm for operation in plan_of(gm).operations]


def run(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    out: Tensor = model(x)
    return out


def drops(model: nn.Sequential) -> bool:
    return any(getattr(module, "p", 0) > 0 and getattr(module, "fixed", None) is not False for module in model)


def is_frozen(model: nn.Sequential) -> bool:
    return any(getattr(module, "frozen", False) for module in model)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --- laws ------------------------------------------------------------------------------------------------------------


@given(pairs())
def test_a_live_fold_is_the_same_function_in_both_modes_and_keeps_the_same_statistics(
    case: tuple[nn.Sequential, Tensor],
) -> None:
    model, x = case
    gm = prepared(model, x)
    assert verdicts(gm)[0].startswith("folded")
    for step in range(2):
        ours, theirs = run(gm, x + step), run(model, x + step)
        assert torch.equal(ours, theirs) or (is_frozen(model) and torch.allclose(ours, theirs, 1e-9, 1e-9))
    for name, value in model.state_dict().items():
        assert torch.equal(gm.state_dict()[name], value)
    with torch.no_grad():
        close(gm.eval()(x), model.eval()(x))
        deployed = pege_fx.convert(gm)
        assert torch.equal(deployed(x), gm(x))
    assert "batch_norm" not in deployed.code
    assert not [module for module in deployed.modules() if isinstance(module, (BatchNorm, Folded))]


@given(pairs())
def test_gradients_of_a_live_fold_are_those_of_the_original_in_either_mode(case: tuple[nn.Sequential, Tensor]) -> None:
    model, x = case
    gm = prepared(model, x)
    for training in (True, False):
        for module in (gm, model):
            module.train(training).zero_grad()
            run(module, x).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in gm.named_parameters()}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            scale = float(parameter.grad.abs().max()) + 1
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-9 * scale)


@given(pairs())
def test_a_norm_frozen_in_the_middle_of_training_uses_running_statistics_while_dropouts_go_on(
    case: tuple[nn.Sequential, Tensor],
) -> None:
    model, x = case
    gm = prepared(model, x)
    for module in gm.modules():
        if isinstance(module, (BatchNorm, FunctionalBatchNorm)):
            module.eval()
    for child in model:
        if hasattr(child, "running_mean"):
            child.eval()
    close(run(gm, x), run(model, x))


@given(pairs())
def test_a_merge_is_exact_in_evaluation_or_refused_where_dropout_lies_between(case: tuple[nn.Sequential, Tensor]) -> None:
    model, x = case
    gm = prepared(model, x, batch_norm="freeze")
    (found,) = verdicts(gm)
    with torch.no_grad():
        if drops(model):
            assert "lies between, and drops in training" in found
        else:
            assert found.startswith("folded")
            assert "batch_norm" not in gm.code
            close(gm(x), model.eval()(x))
        close(gm.eval()(x), model.eval()(x))
        assert torch.equal(pege_fx.convert(gm)(x), gm(x))


def test_the_dropout_that_is_named_is_the_one_beside_the_norm() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout2d(), nn.Dropout(), nn.BatchNorm2d(4))
    (found,) = verdicts(prepared(model, torch.randn(2, 4, 3, 3), batch_norm="freeze"))
    assert found == "3 stays: _2 lies between, and drops in training"


@given(pairs())
def test_keep_changes_nothing(case: tuple[nn.Sequential, Tensor]) -> None:
    model, x = case
    gm = prepared(model, x, batch_norm="keep")
    assert not any(found.startswith("folded") for found in verdicts(gm))
    assert torch.equal(run(gm, x), run(model, x))
    assert torch.equal(gm.eval()(x), model.eval()(x))


@given(pairs(leads=False), st.sampled_from(["channel", "tensor"]), st.sampled_from(["train", "freeze", "keep"]))
def test_a_quantized_layer_deploys_what_evaluation_computes(
    case: tuple[nn.Sequential, Tensor], granularity: Any, mode: Any
) -> None:
    model, x = case
    policy = QuantPolicy((Rule(weight=QuantSpec(bits=4, granularity=granularity), input=4),))
    gm = prepared(model, x, policy, batch_norm=mode)
    run(gm, x).sum().backward()
    with torch.no_grad():
        assert torch.equal(pege_fx.convert(gm.eval())(x), gm(x))
    before = gm.state_dict()
    again = prepared(model, x, policy, batch_norm=mode)
    again.load_state_dict(before)
    assert torch.equal(again.eval()(x), gm(x))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.bn = nn.Bilinear(4, 4, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.mix(x, x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["train", "freeze"])
def test_a_bilinear_layer_takes_the_norm_behind_it(mode: Any) -> None:
    model, x = as_trained(Bilinear(), 0).double().eval(), torch.randn(5, 4).double()
    gm = prepared(model, x, batch_norm=mode)
    assert verdicts(gm) == ["folded bn"]
    close(gm(x), model(x))
    assert torch.equal(pege_fx.convert(gm)(x), gm(x))


@pytest.mark.parametrize("between", [(), (nn.Identity(),), (nn.Dropout(0.5),)], ids=["nothing", "identity", "dropout"])
@pytest.mark.parametrize("form", ["module", "function"])
def test_the_output_of_a_layer_is_that_of_the_norm_folded_into_it(form: str, between: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), *between, FORMS[form](as_trained(nn.BatchNorm2d(8), 0)), nn.ReLU()).eval()
    policy = QuantPolicy((Rule(weight=None, input=None, output="8"),))
    live, frozen = (prepared(model, IMAGE, policy, batch_norm=mode) for mode in ("train", "freeze"))
    (site,) = pege_fx.fake_quants(live).values()
    (node,) = [node for node in live.graph.nodes if node.name.endswith("_fq")]
    assert isinstance(live.get_submodule(str(node.all_input_nodes[0].target)), Folded)
    assert torch.equal(pege_fx.convert(live)(IMAGE), live(IMAGE))
    if len(between) == 0 or isinstance(between[0], nn.Identity):
        step = float(site.method.grid_of()[0].detach())
        torch.testing.assert_close(live(IMAGE), frozen(IMAGE), rtol=0, atol=step * 1.01)
    pege_fx.PEGEScheduler(
        live, 1, *[pege_fx.Constant(0.0)] * 3
    )  # in training, where nothing is replaced yet, it is the original's
    assert torch.equal(run(live.train(), IMAGE), run(model.train(), IMAGE))


# --- in front of a layer -----------------------------------------------------------------------------------------------


def leading(**settings: Any) -> nn.Sequential:
    norm = as_trained(nn.BatchNorm2d(4), 0)
    return nn.Sequential(norm, nn.Conv2d(4, 8, 3, **settings))


IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("W4A4", "_1 is quantized, W8A8"),
        (QuantPolicy((Rule(weight="4", input=None),)), "_1 is quantized, W4A32"),
        (QuantPolicy((Rule(weight=None, input="4"),)), "_1 is quantized, W32A4"),
    ],
)
def test_a_quantized_layer_keeps_the_norm_in_front_of_it(policy: Any, reason: str) -> None:
    model = leading().eval()
    gm = prepared(model, IMAGE, policy)
    assert reason in pege_fx.explain(model, policy, (IMAGE,))["0"].reason
    assert reason in pege_fx.summary(gm)["0"].reason
    deployed = pege_fx.convert(gm)
    assert "batch_norm" in deployed.code
    assert torch.equal(deployed(IMAGE), gm(IMAGE))


def test_freeze_quantizes_the_input_in_front_of_the_norm() -> None:
    model = leading().eval()
    gm = prepared(model, IMAGE, "W4A4", batch_norm="freeze")
    assert verdicts(gm) == ["folded 0"]
    assert plan_of(gm).operations[0].edge("input").source == "input_1"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"padding": 1}, "_1 pads its input with zeros"),
        ({"padding": "same"}, "_1 pads its input with zeros"),
        ({"padding": (0, 1)}, "_1 pads its input with zeros"),
        ({"padding": 1, "padding_mode": "reflect"}, "its input input_1 is not a convolution"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "freeze"])
def test_padding_behind_a_norm_is_refused(settings: dict[str, Any], reason: str, mode: Any) -> None:
    model = leading(**settings).eval()
    gm = prepared(model, IMAGE, batch_norm=mode)
    assert reason in pege_fx.summary(gm)["0"].reason
    assert torch.equal(gm(IMAGE), model(IMAGE))


@pytest.mark.parametrize("settings", [{"padding": "valid"}, {"kernel_size": 1, "padding": "same"}, {"padding": (0, 0)}])
def test_padding_of_nothing_is_no_padding(settings: dict[str, Any]) -> None:
    model = nn.Sequential(as_trained(nn.BatchNorm2d(4), 0), nn.Conv2d(4, 8, **{"kernel_size": 3} | settings)).double().eval()
    x = IMAGE.double()
    for mode in ("train", "freeze"):
        gm = prepared(model, x, batch_norm=mode)
        assert verdicts(gm) == ["folded 0"]
        close(gm(x), model(x))


def test_a_transposed_layer_reads_less_at_its_borders() -> None:
    model = nn.Sequential(as_trained(nn.BatchNorm2d(4), 0), nn.ConvTranspose2d(4, 8, 3)).eval()
    gm = prepared(model, IMAGE)
    assert "_1 is transposed" in pege_fx.summary(gm)["0"].reason
    assert torch.equal(gm(IMAGE), model(IMAGE))


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        out: Tensor = self.conv(y) + y
        return out


class AsWeight(ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.bn(x))


class CalledTwice(ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(self.conv(self.bn(x))))  # type: ignore[no-any-return]


class ChangedBetween(ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn(x)
        x.add_(1)
        return self.conv(y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("cls", [ReadTwice, AsWeight, CalledTwice, ChangedBetween])
@pytest.mark.parametrize("mode", ["train", "freeze"])
def test_what_is_read_elsewhere_keeps_the_norm_in_front_of_it(cls: Any, mode: Any) -> None:
    model, x = as_trained(cls(), 0).eval(), torch.randn(4, 4, 3, 3)
    gm = prepared(model, x, batch_norm=mode)
    assert not any(found.startswith("folded") for found in verdicts(gm))
    assert torch.equal(gm(x), model(x))


def test_a_layer_between_two_norms_merges_both_and_folds_the_one_behind() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8))
    model, x = as_trained(model, 0).double().eval(), IMAGE.double()
    frozen, live = prepared(model, x, batch_norm="freeze"), prepared(model, x)
    assert verdicts(frozen) == ["folded 0; folded 2"]
    assert verdicts(live) == ["folded 2"]
    assert "the weight of _1 is computed" in pege_fx.summary(live)["0"].reason
    for gm in (frozen, live):
        close(gm(x), model(x))
        assert torch.equal(pege_fx.convert(gm)(x), gm(x))


@pytest.mark.parametrize("mode", ["train", "freeze"])
def test_the_size_of_what_convert_will_make_is_known(mode: Any) -> None:
    norm = ByFunction(nn.BatchNorm2d(8))
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), norm, nn.Conv2d(8, 4, 1))
    policy = QuantPolicy((Rule(weight="4", input="4"), Rule(role="first", weight=None, input=None)))
    gm = prepared(model, IMAGE, policy, batch_norm=mode)
    assert verdicts(gm) == ["folded 0", "folded 4.batch_norm", ""]
    assert pege_fx.size_report(gm) == pege_fx.size_report(pege_fx.convert(gm))


# --- functions that say too little -----------------------------------------------------------------------------------------


class Own(nn.Module):
    """A convolution and ``F.batch_norm`` on the model's own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.gain, self.shift = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.rand(4))
        self.register_buffer("mean", torch.rand(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gain, self.shift, self.training)


class AlwaysByBatch(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gain, self.shift, True)


class WithoutStatistics(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), None, None, self.gain, self.shift, True)


class ComputedGain(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gain.exp(), self.shift, self.training)


class ComputedGainAndShift(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gain.exp(), self.shift.exp(), self.training)


class StatisticsReadElsewhere(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gain, self.shift, self.training) + self.mean.sum()


OWN = [
    (AlwaysByBatch, "it uses batch statistics in evaluation too"),
    (WithoutStatistics, "it uses batch statistics in evaluation too"),
    (ComputedGain, "its weight is computed, or read elsewhere"),
    (ComputedGainAndShift, "its weight is computed, or read elsewhere"),
    (StatisticsReadElsewhere, "its running_mean is computed, or read elsewhere"),
]


@pytest.mark.parametrize(("cls", "reason"), OWN)
@pytest.mark.parametrize("mode", ["train", "freeze"])
def test_a_function_that_is_no_batch_norm_to_fold_stays_and_says_why(cls: Any, reason: str, mode: Any) -> None:
    model = cls()
    gm = prepared(copy.deepcopy(model), IMAGE, batch_norm=mode)
    assert reason in pege_fx.summary(gm)["conv"].batch_norm
    assert reason in pege_fx.summary(gm)["batch_norm"].reason
    assert torch.equal(gm(IMAGE), model(IMAGE))
    assert torch.equal(gm.eval()(IMAGE), model.eval()(IMAGE))


@pytest.mark.parametrize("mode", ["train", "freeze"])
def test_the_model_s_own_tensors_are_folded_and_keep_their_names(mode: Any) -> None:
    model = Own().double()
    x = IMAGE.double()
    gm = prepared(model, x, "W4A4", batch_norm=mode)
    assert verdicts(gm) == ["folded batch_norm"]
    kept = {"conv.weight", "conv.bias"} | ({"mean", "var", "gain", "shift"} if mode == "train" else set())
    assert {name for name in gm.state_dict() if "_fq" not in name} == kept
    gm.load_state_dict(model.state_dict(), strict=False)
    reference = copy.deepcopy(gm)
    for moved in (copy.deepcopy(gm), gm.float(), pickled(gm)):
        assert torch.equal(moved.eval()(x.to(moved.conv.weight.dtype)), pege_fx.convert(moved)(x.to(moved.conv.weight.dtype)))
    close(reference.eval()(x).float().double(), copy.deepcopy(reference).eval()(x).float().double())


class AllInOne(nn.Module):
    """One module with the weight of its convolution and the bias of its BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.rand(4, 4, 1, 1)), nn.Parameter(torch.rand(4))
        self.bias = nn.Parameter(torch.rand(4))
        self.register_buffer("mean", torch.rand(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(F.conv2d(x, self.weight), self.mean, self.var, self.gain, self.bias, self.training)


@pytest.mark.parametrize("nested", [False, True])
def test_a_merged_bias_takes_nobodys_place(nested: bool) -> None:
    model = AllInOne() if not nested else nn.Sequential(AllInOne())
    x = IMAGE.double()
    gm = prepared(model.double().eval(), x, batch_norm="freeze")
    assert verdicts(gm)[0].startswith("folded")
    close(gm(x), model(x))
    assert {name.rpartition(".")[2] for name, _ in gm.named_parameters()} == {"weight", "conv2d_bias"}
    assert torch.equal(pege_fx.convert(gm)(x), gm(x))


def test_other_tensors_for_one_call_are_folded_and_leave_no_trace() -> None:
    model = Own().double().eval()
    gm, x = prepared(model, IMAGE.double()), IMAGE.double()
    before = gm(x)
    doubled = {name: value * 2 for name, value in model.named_parameters()}
    close(torch.func.functional_call(gm, doubled, (x,)), torch.func.functional_call(model, doubled, (x,)))
    assert torch.equal(copy.deepcopy(gm)(x), before)
    assert torch.equal(pege_fx.convert(gm)(x), before)
    assert torch.equal(gm(x), before)


def pickled(gm: GraphModule) -> GraphModule:
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    loaded: GraphModule = torch.load(buffer, weights_only=False)
    return loaded


# --- what others put in its place ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "copied"),
    [("W4A4", pickled), ("W4A4", copy.deepcopy), (FLOAT, copy.deepcopy), (FLOAT, lambda gm: gm)],
    ids=["quantized, pickled", "quantized, copied", "float, copied", "float"],
)
def test_torchs_conversion_to_synchronised_norms_goes_on_as_before(policy: Any, copied: Any) -> None:
    model = as_trained(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Linear(4, 4)), 0)
    gm = prepared(model, IMAGE, policy)
    converted = copied(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(gm)))
    assert isinstance(converted.get_submodule("1"), nn.SyncBatchNorm)
    assert list(converted.state_dict()) == list(gm.state_dict())
    assert torch.equal(pege_fx.convert(converted)(IMAGE), pege_fx.convert(gm)(IMAGE))  # before any forward
    for _ in range(2):
        assert torch.equal(converted.train()(IMAGE), gm.train()(IMAGE))
        assert torch.equal(converted.eval()(IMAGE), gm.eval()(IMAGE))
    for name, value in gm.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value)
    assert torch.equal(pege_fx.convert(converted)(IMAGE), gm(IMAGE))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_processes_evaluate_synchronised_norms_on_the_cpu_where_torch_trains_none(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    processes = [start("sync_norm", rank, 2, tmp_path) for rank in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for found in (first, second):
        assert "SyncBatchNorm expected input tensor to be on GPU" in found["error"]
        assert torch.equal(found["deployed"], found["evaluated"])
        assert torch.equal(found["evaluated"], first["evaluated"])
        assert found["gradients"].keys() >= {"0.weight", "1.weight", "1.bias"}
        assert all(torch.equal(value, first["gradients"][name]) for name, value in found["gradients"].items())


def test_a_function_trains_unless_it_is_frozen() -> None:
    tensors = (torch.zeros(4), torch.ones(4), None, None)
    plain, frozen = (FunctionalBatchNorm(tensors, 0.1, 1e-5, frozen=frozen) for frozen in (False, True))
    assert plain.training
    assert not frozen.training
    assert plain.eval().train().training
    assert not frozen.train().training


def test_a_norm_put_in_its_place_later_is_folded_and_something_else_is_refused() -> None:
    model = as_trained(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)), 0)
    gm = prepared(model, IMAGE)
    other = as_trained(nn.BatchNorm2d(8), 1).eval()
    gm.set_submodule("1", copy.deepcopy(other))
    torch.testing.assert_close(gm.eval()(IMAGE), other(model[0](IMAGE)), rtol=1e-4, atol=1e-5)
    gm.set_submodule("1", nn.GroupNorm(2, 8))
    with pytest.raises(FoldError, match="has become GroupNorm"):
        gm(IMAGE)
    with pytest.raises(FoldError, match="has become GroupNorm"):
        pege_fx.convert(gm)


# --- statistics ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"momentum": None}, {"momentum": 0.0}, {"track_running_stats": False}, {"affine": False}], ids=str
)
def test_statistics_go_on_as_in_the_float_model(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, **settings)).double()
    gm = prepared(copy.deepcopy(model), IMAGE.double())
    for step in range(5):
        if step == 3:  # frozen for one batch
            model[1].eval()
            gm.get_submodule("1").eval()
        if step == 4:
            model.train()
            gm.train()
        close(gm(IMAGE.double() * (step + 1)), model(IMAGE.double() * (step + 1)))
    for name, value in model.state_dict().items():
        close(gm.state_dict()[name], value)
    close(gm.eval()(IMAGE.double()), model.eval()(IMAGE.double()))
    if settings == {"track_running_stats": False}:
        assert "it keeps no running statistics" in pege_fx.summary(gm)["0"].batch_norm


class Unread(nn.Module):
    """A norm that is called for its statistics alone: behind a convolution whose output goes on, or that nothing else reads."""

    def __init__(self, norm: nn.Module, *, in_training: bool, alone: bool) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3), norm
        self.in_training, self.alone = in_training, alone

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        if self.training or not self.in_training:
            self.norm(self.second(x) if self.alone else y)
        return y


UNREAD: dict[str, Any] = FORMS | {"by instance": lambda norm: nn.InstanceNorm2d(8, track_running_stats=True)}
PLACES = st.fixed_dictionaries({"in_training": st.booleans(), "alone": st.booleans()})


@given(st.sampled_from(sorted(UNREAD)), PLACES, st.booleans(), st.sampled_from(["train", "freeze", "keep"]))
def test_statistics_of_a_norm_that_nobody_reads_go_on(form: str, place: dict[str, bool], block: bool, mode: Any) -> None:
    """They did not: the call was dead code to the graph, though training moves its statistics."""
    model = Unread(UNREAD[form](nn.BatchNorm2d(8)), **place).double().eval()
    x, blocks = IMAGE.double(), ("norm",) if block else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PegeWarning)
        gm = pege_fx.prepare(copy.deepcopy(model), FLOAT, (x,), batch_norm=mode, blocks=blocks)
    for training in (True, False, True, True, False):
        close(gm.train(training)(x), model.train(training)(x))
        for name, value in model.state_dict().items():
            close(gm.state_dict()[name], value)
    deployed = pege_fx.convert(gm)
    assert torch.equal(deployed(x), gm(x))
    if not block and all(capture.rung != "python" for capture in plan_of(gm).captures):
        assert [name for name in deployed.state_dict() if "norm" in name or "second" in name] == []


class MovedStatistics(ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        self.bn.running_mean.add_(1)
        return self.bn(self.conv(x))  # type: ignore[no-any-return]


class SharedStatistics(ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.bn.running_mean, self.bn.running_var)
        return self.bn(self.conv(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("cls", [MovedStatistics, SharedStatistics])
@pytest.mark.parametrize("mode", ["train", "freeze"])
def test_statistics_with_other_readers_stay_where_they_are(cls: Any, mode: Any) -> None:
    model = as_trained(cls(), 0)
    gm = prepared(copy.deepcopy(model), IMAGE, batch_norm=mode)
    assert "its running_mean is read elsewhere" in verdicts(gm)[0]
    for module in (model, gm):
        module.load_state_dict(model.state_dict())
    for training in (True, False):
        assert torch.equal(gm.train(training)(IMAGE), model.train(training)(IMAGE))


def test_a_norm_called_by_keyword_is_folded_and_deployed() -> None:
    class ByKeyword(ReadTwice):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(input=self.conv(x))  # type: ignore[no-any-return]

    model = as_trained(ByKeyword(), 0).eval()
    for mode, found in (("train", "folded bn"), ("freeze", "folded bn"), ("keep", 'bn stays: batch_norm="keep"')):
        gm = prepared(model, IMAGE, batch_norm=mode)
        assert verdicts(gm) == [found]
        torch.testing.assert_close(gm(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-5)
        assert torch.equal(pege_fx.convert(gm)(IMAGE), gm(IMAGE))


@pytest.mark.parametrize("where", ["norm", "layer between"])
def test_hooks_are_heard_and_stop_a_fold(where: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Identity(), as_trained(nn.BatchNorm2d(8), 0)).eval()
    model[2 if where == "norm" else 1].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    gm = prepared(model, IMAGE)
    assert ("it has hooks" if where == "norm" else "its input _1 is not a convolution") in pege_fx.summary(gm)["2"].reason
    assert torch.equal(gm(IMAGE), model(IMAGE))
