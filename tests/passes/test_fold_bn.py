"""BatchNorm folding: the function is kept, the graph is as expected, every refusal is named."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pege_fx
from pege_fx import FoldError, QuantPolicy, Rule
from pege_fx.modules.batch_norm import FoldedBatchNorm2d
from pege_fx.passes import CaptureModel, Program

FLOAT = QuantPolicy((Rule(weight=None, input=None),))
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Statistics and affine parameters as after training, with negative and zero gammas among them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.1, 3, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.normal_(generator=generator)
                    module.weight[0] = 0.0
                    module.bias.normal_(generator=generator)
    return model


@st.composite
def layers_with_norms(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution (plain, grouped, depthwise, transposed) of any dimension, or a linear layer, and its BatchNorm."""
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    affine, bias = draw(st.booleans()), draw(st.booleans())
    if draw(st.booleans()):
        dims, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
        cls = draw(st.sampled_from([CONVS[dims], TRANSPOSED[dims]]))
        layer = cls(4, 8, 3, padding=1, groups=groups, bias=bias, stride=draw(st.sampled_from([1, 2])))
        norm, x = NORMS[dims](8, affine=affine), torch.randn(3, 4, *[5] * dims)
    else:
        layer, norm, x = nn.Linear(4, 8, bias=bias), nn.BatchNorm1d(8, affine=affine), torch.randn(5, 4)
    return randomise(nn.Sequential(layer, norm, nn.ReLU()), seed), x


def verdict(gm: torch.fx.GraphModule) -> str:
    return str(gm.meta["plan"].operations[-1].batch_norm)


@given(layers_with_norms(), st.sampled_from(["channel", "tensor"]), st.sampled_from([2, 4, 8]))
def test_a_quantized_fold_deploys_what_evaluation_computes(case: tuple[nn.Module, Tensor], granularity: Any, bits: int) -> None:
    model, x = case
    policy = QuantPolicy((Rule(weight=pege_fx.QuantSpec(bits=bits, granularity=granularity), input=bits),))
    gm = pege_fx.prepare(model, policy, (x,)).eval()
    deployed = pege_fx.convert(gm)
    with torch.no_grad():
        assert torch.equal(deployed(x), gm(x))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in deployed.modules())
    codes, scale = deployed.get_buffer("0.weight_codes"), deployed.get_buffer("0.weight_scale")
    assert -(2 ** (bits - 1)) <= int(codes.min()) <= int(codes.max()) < 2 ** (bits - 1)
    assert bool((scale > 0).all())


class Twice(nn.Module):
    """One convolution called twice, one call followed by BatchNorm: torch's own fusion changes the other call too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y + self.conv(y)


class WeightReadElsewhere(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y * self.conv.weight.mean()


class OutputReadElsewhere(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        out: Tensor = self.bn(y) + y
        return out


class SharedNorm(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x)) + self.bn(self.other(x))
        return out


class NormFirst(Twice):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(self.bn(x), (0, 1)))
        return out


class ComputedWeight(Twice):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(F.conv2d(x, self.conv.weight * 2))
        return out


class OwnNorm(nn.BatchNorm2d):
    pass


class ThreeDimensional(nn.Module):
    """BatchNorm1d behind a linear layer normalises dimension 1, which is not the features'."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.fc(x))
        return out


def without_statistics() -> nn.Module:
    model = Twice()
    model.bn = nn.BatchNorm2d(3, track_running_stats=False)
    return nn.Sequential(model.conv, model.bn)


IMAGE = (2, 3, 4, 4)
UNSAFE: list[tuple[Any, tuple[int, ...], str]] = [
    (Twice, IMAGE, "conv.weight is read at 2 places"),
    (WeightReadElsewhere, IMAGE, "conv.weight is read at 2 places"),
    (OutputReadElsewhere, IMAGE, "the output of conv has 2 users"),
    (SharedNorm, IMAGE, "it is called 2 times"),
    (NormFirst, IMAGE, "its input x is not a convolution or linear layer"),
    (ComputedWeight, IMAGE, "the weight of conv2d is computed, not a parameter"),
    (without_statistics, IMAGE, "it keeps no running statistics"),
    (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), OwnNorm(3)), IMAGE, "OwnNorm may compute something else"),
    (ThreeDimensional, (2, 4, 4), "its input has 3 dimensions"),
]


@pytest.mark.parametrize(("make", "shape", "reason"), UNSAFE, ids=[reason for *_, reason in UNSAFE])
@pytest.mark.parametrize("mode", ["train", "freeze"])
def test_what_is_not_safe_is_refused_with_its_reason(make: Any, shape: tuple[int, ...], reason: str, mode: Any) -> None:
    model, x = randomise(make(), 0).eval(), torch.randn(shape)
    program = Program(model=model, example=((x,), {}))
    root = pege_fx.passes.run(program, [CaptureModel(), *pege_fx.prepare_passes("W4A4", batch_norm=mode)[:4]]).root
    (norm, *_) = [n for n in root.graph.nodes if "batch_norm" in n.meta and n.op == "call_module"]
    assert reason in norm.meta["batch_norm"]
    with torch.no_grad():
        assert torch.equal(root(x), model(x))


def test_without_examples_the_rank_behind_a_linear_layer_is_not_known_and_the_fix_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert "give example_inputs" in verdict(pege_fx.prepare(model, "W4A4"))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert verdict(pege_fx.prepare(flat, "W4A4")) == "folded 2"


class Steered(nn.Module):
    """Stays Python, because values steer it."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.inside = nn.Conv2d(3, 3, 1)
        self.inside.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inside(x) if x.sum() > -1e9 else x
        return out


class WeightReadInPython(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.steered = Steered(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.steered(self.bn(self.conv(x)))
        return out


@pytest.mark.filterwarnings("ignore::pege_fx.PegeWarning")
def test_a_weight_that_another_graph_reads_is_not_merged_into() -> None:
    model, x = randomise(WeightReadInPython(), 0).eval(), torch.randn(IMAGE)
    gm = pege_fx.prepare(model, FLOAT, (x,), batch_norm="freeze")
    (norm,) = [node for node in gm.graph.nodes if node.op == "call_module" and node.target == "bn"]
    assert "conv.weight is read at 2 places" in norm.meta["batch_norm"]
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize("cls", [Twice, WeightReadElsewhere])
def test_torchs_own_fusion_is_silently_wrong_where_ours_refuses(cls: type[nn.Module]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.fx.experimental.optimization import fuse

        model, x = randomise(cls(), 0).eval(), torch.randn(IMAGE)
        theirs = fuse(copy.deepcopy(model))
        ours = pege_fx.prepare(model, FLOAT, (x,), batch_norm="freeze")
    with torch.no_grad():
        assert (theirs(x) - model(x)).abs().max() > 0.01
        assert torch.equal(ours(x), model(x))


def test_keep_leaves_it_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    gm = pege_fx.prepare(model, "W4A4", batch_norm="keep")
    assert type(gm.get_submodule("1")) is nn.BatchNorm2d
    assert 'batch_norm="keep"' in verdict(gm)


def test_the_graph_keeps_one_convolution_and_freeze_drops_the_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    live, frozen = (pege_fx.prepare(model, "W4A4", batch_norm=mode) for mode in ("train", "freeze"))
    for gm, norms in ((live, 1), (frozen, 0)):
        assert len(gm.graph.find_nodes(op="call_function", target=F.conv2d)) == 1
        assert len([m for m in gm.modules() if isinstance(m, nn.BatchNorm2d)]) == norms
    assert type(live.get_submodule("1")) is FoldedBatchNorm2d
    assert "1.running_mean" not in frozen.state_dict()


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_merging_changes_nothing_of_what_trains(learns: bool, bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    model[0].requires_grad_(learns)
    gm = pege_fx.prepare(model, "W4A4", batch_norm="freeze")
    assert gm.get_parameter("0.weight").requires_grad is learns
    assert gm.get_parameter("0.bias").requires_grad is learns
    assert gm.get_parameter("3.weight").requires_grad


def test_a_norm_frozen_in_the_middle_of_training_uses_its_running_statistics() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 3)
    gm, x = pege_fx.prepare(model, FLOAT.__class__((Rule(weight="8", input=None),)), (torch.randn(IMAGE),)), torch.randn(IMAGE)
    zero = pege_fx.Constant(0.0)
    pege_fx.PEGEScheduler(gm, 1, zero, zero, zero)
    gm.get_submodule("1").eval()
    model[1].eval()
    torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_unknown_mode_is_refused_when_it_is_given() -> None:
    with pytest.raises(FoldError, match='"train", "freeze" or "keep"'):
        pege_fx.prepare(nn.Linear(2, 2), "W4A4", batch_norm="fold")  # type: ignore[arg-type]
