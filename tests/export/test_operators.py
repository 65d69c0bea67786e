"""Every operator of the table, in ONNX Runtime, against the converted graph."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pege_fx
from pege_fx import ExportError

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

Function = Callable[[Tensor], Any]


class After(nn.Module):
    """Functions of a quantized convolution's output, (2, 4, 6, 6) in two dimensions."""

    def __init__(self, functions: dict[str, Function], dims: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 4, 3, padding=1)
        self.functions = functions
        self.layers = nn.ModuleDict({name: value for name, value in functions.items() if isinstance(value, nn.Module)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        return {name: function(y) for name, function in (self.functions | dict(self.layers.items())).items()}


ELEMENTWISE: dict[str, Function] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "abs": torch.abs,
    "neg": torch.neg,
    "log": lambda x: torch.log(x.abs() + 1),
    "sqrt": lambda x: (x * x).sqrt(),
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "erf": torch.erf,
    "sin": torch.sin,
    "floor": lambda x: (4 * x).floor(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
    "relu6": F.relu6,
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus beta": lambda x: F.softplus(x, 2.0),
    "log sigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp min": lambda x: x.clamp(min=0.1),
    "clamp max": lambda x: torch.clamp_max(x, 0.1),
    "square": torch.square,
    "pow": lambda x: x**3,
    "reciprocal": lambda x: (x.abs() + 1).reciprocal(),
    "sign": torch.sign,
    "add": lambda x: torch.add(x, x, alpha=2) + 1,
    "sub": lambda x: 1 - x - torch.sub(x, 2, alpha=0.5),
    "mul": lambda x: x * 0.5 * x,
    "div": lambda x: x / (x.abs() + 1),
    "floor div": lambda x: torch.div(8 * x, 3, rounding_mode="floor"),
    "trunc div": lambda x: torch.div(8 * x, 3, rounding_mode="trunc"),
    "remainder": lambda x: torch.remainder(x, 0.3),
    "maximum": lambda x: torch.maximum(x, -x),
    "minimum": lambda x: torch.minimum(x, x * x),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "compare": lambda x: (x >= 0).float() + (x != 0).float() + (x < 0.5).float(),
    "logic": lambda x: torch.logical_and(x > -0.5, x < 0.5).float(),
    "not": lambda x: torch.logical_not(x > 0).to(x.dtype),
    "masked fill": lambda x: x.masked_fill(x < 0, 7.0),
    "in place": lambda x: x.mul_(2).add_(1).relu_(),
}
REDUCTIONS: dict[str, Function] = {
    "softmax": lambda x: F.softmax(x, dim=1),
    "log softmax": lambda x: F.log_softmax(x, dim=-1),
    "mean": lambda x: x.mean((2, 3)),
    "mean all": lambda x: x.mean() + x,
    "sum": lambda x: x.sum(1, keepdim=True),
    "amax": lambda x: x.amax(3),
    "amin": lambda x: x.amin(1),
    "max": lambda x: x.max(1).values,
    "norm": lambda x: F.normalize(x, dim=1),
    "norm 1": lambda x: torch.linalg.vector_norm(x, 1, 1),
    "var": lambda x: x.var((2, 3)),
    "std": lambda x: x.std(1, correction=0),
    "logsumexp": lambda x: x.logsumexp(1),
    "cumsum": lambda x: x.cumsum(2),
    "prod": lambda x: (x + 1).prod(1),
}
SHAPES: dict[str, Function] = {
    "view": lambda x: x.view(x.size(0), 2, 2, 36),
    "reshape": lambda x: x.reshape(-1, 36),
    "flatten": lambda x: x.flatten(1),
    "flatten all": lambda x: torch.flatten(x, 0, 1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, -1),
    "swapaxes": lambda x: torch.swapaxes(x, 1, 2),
    "movedim": lambda x: x.movedim(1, -1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "expand": lambda x: x.mean(1, True).expand(-1, 4, -1, -1),
    "expand as": lambda x: x.mean(1, True).expand_as(x),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "cat": lambda x: torch.cat([x, x + 1], 1),
    "stack": lambda x: torch.stack([x, -x], 2),
    "chunk": lambda x: torch.chunk(x, 2, 1)[1],
    "split": lambda x: torch.split(x, [1, 3], 1)[1],
    "split even": lambda x: x.split(3, 2)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "select": lambda x: x[:, -1] + x.select(1, 3),
    "slice": lambda x: x[:, 1:3, ::2, -2:],
    "index": lambda x: x[:, torch.tensor([2, 0])],
    "index select": lambda x: x.index_select(1, torch.tensor([3, 1])),
    "roll": lambda x: torch.roll(x, (1, -2), (2, 3)),
    "flip": lambda x: x.flip(1, 3),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "reflect": lambda x: F.pad(x, (2, 1, 1, 1), mode="reflect"),
    "replicate": lambda x: F.pad(x, (2, 1, 1, 1), mode="replicate"),
    "circular": lambda x: F.pad(x, (2, 1, 1, 1), mode="circular"),
    "zeros": lambda x: x + torch.zeros_like(x) + torch.ones_like(x),
    "new zeros": lambda x: x + x.new_zeros(x.shape),
    "full": lambda x: x + torch.full_like(x, 2.0),
    "arange": lambda x: x + torch.arange(6.0),
    "by size": lambda x: x.reshape(x.shape[0] * 2, x.shape[1] // 2, -1) + x.shape[1],
    "contiguous": lambda x: x.permute(0, 2, 1, 3).contiguous().clone(),
    "masked by triangle": lambda x: x + torch.full((6, 6), -1.0).triu(1),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
}


class Assigned(nn.Module):
    """Assignment to a slice, as Python writes it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 1:3, 2:] = x[:, 0:2, 2:] * 2
        y[:, 0, -1] = 0.5
        y[:, [0, 1], :, [2, 0]] = x[0, 0, 0] + torch.ones(6)
        y[:, [3, 2], [1, 1]] += 1.0
        y[:, 0::3] = x[:, ::3].sigmoid()  # how a pose head writes its coordinates
        y[..., -4::2] -= x[..., 1:3]
        y[1, :, 1:-1:2] = 7
        return y


POOLS: dict[str, Function] = {
    "max pool": nn.MaxPool2d(2),
    "max pool padded": nn.MaxPool2d(3, 2, 1),
    "max pool ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max pool ceil padded": nn.MaxPool2d(4, 3, 1, ceil_mode=True),
    "max pool dilated": nn.MaxPool2d(2, 1, dilation=2),
    "mean pool": nn.AvgPool2d(2),
    "mean pool padded": nn.AvgPool2d(3, 2, 1),
    "mean pool without": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "mean pool ceil": nn.AvgPool2d(4, 3, ceil_mode=True),
    "mean pool divisor": nn.AvgPool2d(2, divisor_override=3),
    "adaptive 1": nn.AdaptiveAvgPool2d(1),
    "adaptive 3": nn.AdaptiveAvgPool2d(3),
    "adaptive 4": nn.AdaptiveAvgPool2d((4, 5)),
    "adaptive 7": nn.AdaptiveAvgPool2d(7),
    "adaptive max": nn.AdaptiveMaxPool2d(1),
    "adaptive max 2": nn.AdaptiveMaxPool2d((2, 3)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "nearest size": lambda x: F.interpolate(x, (9, 4)),
    "nearest exact": lambda x: F.interpolate(x, (9, 4), mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, (11, 5), mode="bilinear"),
    "bilinear scale": lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "bilinear corners": lambda x: F.interpolate(x, (11, 5), mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, (11, 5), mode="bicubic"),
    "upsample": nn.Upsample(scale_factor=2, mode="bilinear"),
    "assigned": Assigned(),
}


INDEXING: dict[str, Function] = {
    "neighbours": lambda x: x[:, [0, 1], [2, -1]],
    "apart": lambda x: x[:, [0, 1], :, [2, 3]],
    "broadcast": lambda x: x[:, torch.tensor([[0], [1]]), torch.tensor([[2, 3, 4]])],
    "by what is computed": lambda x: x[torch.arange(x.size(0)), x.mean((2, 3)).argmax(1)],
    "gather": lambda x: x.gather(1, x.mean((2, 3), True).argmax(1, True)),
    "put": lambda x: x.index_put((torch.tensor([0, 1]), torch.tensor([2, 0])), x[0, :2] * 2),
    "put a number": lambda x: x.index_fill(1, torch.tensor([0, 2]), 3.0),
    "put by a mask": lambda x: x.index_put((x < 0,), torch.tensor(0.5)),
    "index add": lambda x: x.index_add(1, torch.tensor([0, 2, 0]), x[:, 1:]),
    "scatter": lambda x: torch.zeros_like(x).scatter(1, x.mean((2, 3), True).argmax(1, True), 2.0),
    "scatter add": lambda x: x.scatter_add(1, x.sign().long() + 1, x * 2),
    "one hot": lambda x: F.one_hot(x.mean((2, 3)).argmax(1), 4),
    "windows": lambda x: x.unfold(2, 3, 2),
    "patches": lambda x: F.unfold(x, 3, padding=1, stride=2),
    "patches back": lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2),
    "top": lambda x: x.flatten(1).topk(5, 1).values,
    "sorted": lambda x: x.mean((2, 3)).sort(1, descending=True).values,
    "diagonal": lambda x: x.diagonal(1, 2, 3) + x.diagonal(-1, -2, -1),
    "unpooled": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "sampled": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False),
    "sampled to the border": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), "nearest", "border", align_corners=True),
}
# In parts: torch knows how to write these in operations that have an entry.
PARTS: dict[str, Function] = {
    "glu": lambda x: F.glu(x, 1),
    "hard shrink": F.hardshrink,
    "soft shrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 2.0),
    "rrelu": F.rrelu,
    "log": lambda x: torch.log1p(x.abs()) + torch.log2(x.abs() + 1) + torch.expm1(x) + torch.exp2(x) + torch.erfc(x),
    "lerp": lambda x: torch.lerp(x, -x, 0.3) + torch.addcmul(x, x, x, value=0.5),
    "trunc": lambda x: (4 * x).trunc() + torch.frac(x) + torch.fmod(x, 0.3),
    "logaddexp": lambda x: torch.logaddexp(x, -x),
    "finite": lambda x: torch.isfinite(x) & ~torch.isinf(x) ^ torch.isnan(x),
    "nan to num": torch.nan_to_num,
    "any": lambda x: (x > 0).any(1).float() + (x > -9).all(),
    "norm 3": lambda x: torch.linalg.vector_norm(x, 3, 1) + torch.linalg.vector_norm(x, float("inf"), 1),
    "var mean": lambda x: torch.var_mean(x, 1)[0] + torch.var_mean(x, 1)[1] + torch.std_mean(x, 1)[0],
    "cosine": lambda x: F.cosine_similarity(x, x + 1, dim=1),
    "mv": lambda x: torch.mv(x[0, 0], x[0, 0, 1]) + torch.dot(x[0, 0, 0], x[0, 0, 1]),
    "tile": lambda x: torch.tile(x, (1, 2)),
    "repeat interleave": lambda x: x.repeat_interleave(2, 1),
    "meshgrid": lambda x: x + torch.meshgrid(torch.arange(x.shape[2]), torch.arange(6), indexing="ij")[0],
    "triangle": lambda x: x.tril() + x.triu(1),
    "affine": lambda x: F.affine_grid(x[:, :2, :2, :3].mean(1), [2, 4, 3, 3], align_corners=False),
    "grouped heads": lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, 1:3], enable_gqa=True),
    "empty": lambda x: torch.empty_like(x).fill_(2.0) + x,
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return make().eval()


LAYERS: dict[str, Function] = {
    "layer norm": seeded(lambda: nn.LayerNorm([6, 6])),
    "layer norm without": nn.LayerNorm(6, elementwise_affine=False),
    "group norm": seeded(lambda: nn.GroupNorm(2, 4)),
    "instance norm": nn.InstanceNorm2d(4, affine=True),
    "batch norm": nn.Sequential(nn.ReLU(), seeded(lambda: nn.BatchNorm2d(4))),
    "rms norm": seeded(lambda: nn.RMSNorm(6)),
    "batch norm without statistics": nn.Sequential(
        seeded(lambda: nn.BatchNorm2d(4, track_running_stats=False)), nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    ),
    "prelu": nn.PReLU(4),
    "conv same": seeded(lambda: nn.Conv2d(4, 3, 3, padding="same", dilation=2)),
    "conv asymmetric": seeded(lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (0, 1), (1, 2), groups=2)),
    "conv reflect": seeded(lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")),
    "transposed": seeded(lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1)),
    "transposed grouped": seeded(lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2)),
    "linear": nn.Sequential(nn.Flatten(), seeded(lambda: nn.Linear(144, 3))),
    "linear wide": seeded(lambda: nn.Linear(6, 5)),
    "linear without bias": seeded(lambda: nn.Linear(6, 5, bias=False)),
    "matmul": lambda x: x @ x.transpose(-1, -2),
    "bmm": lambda x: torch.bmm(x.flatten(0, 1), x.flatten(0, 1)),
    "einsum": lambda x: torch.einsum("n c h w, n d h w -> n c d", x, x),
    "baddbmm": lambda x: torch.baddbmm(x[:, 0], x[:, 1], x[:, 2], beta=0.5, alpha=2.0),
    "attention": lambda x: F.scaled_dot_product_attention(x, x + 1, x),
    "causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention mask": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(6, 6).tril().bool()),
    "multihead": nn.Sequential(nn.Flatten(2), seeded(lambda: nn.TransformerEncoderLayer(36, 4, 24, batch_first=True))),
}


def check(functions: dict[str, Function], folder: Path, dims: int = 2, size: int = 6, **options: Any) -> None:
    """Export all functions at once; each of their results is what the converted graph gives."""
    x = torch.randn(2, 4, *[size] * dims, generator=torch.Generator().manual_seed(2))
    deployed = pege_fx.convert(pege_fx.prepare(After(functions, dims).eval(), "W4A4", (x,)))
    pege_fx.export_onnx(deployed, folder / "model.onnx", (x,), **options)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    computed = dict(zip((value.name for value in session.get_outputs()), session.run(None, {"x": x.numpy()}), strict=True))
    for name, expected in deployed(x).items():
        torch.testing.assert_close(
            torch.from_numpy(computed[name]), expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    report = pege_fx.verify_export(deployed, folder / "model.onnx", [x])
    assert report.ok, report


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:the batch size", "ignore:the model. fixed")
@pytest.mark.parametrize("group", ["ELEMENTWISE", "REDUCTIONS", "SHAPES", "INDEXING", "PARTS", "POOLS", "LAYERS"])
def test_operators_are_written(group: str, tmp_path: Path) -> None:
    check(globals()[group], tmp_path)


@pytest.mark.parametrize("opset", [17, 18, 20])
def test_operators_that_moved_between_versions(opset: int, tmp_path: Path) -> None:
    names = (
        "gelu",
        "gelu tanh",
        "mean",
        "mean all",
        "sum",
        "amax",
        "norm",
        "layer norm",
        "group norm",
        "bilinear",
        "split",
        "attention",
        "pad",
    )
    functions = {
        name: function for name, function in (ELEMENTWISE | REDUCTIONS | SHAPES | POOLS | LAYERS).items() if name in names
    }
    check(functions, tmp_path, style="qcdq", opset=opset)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_dimensions(dims: int, tmp_path: Path) -> None:
    functions: dict[str, Function] = {
        "max": (nn.MaxPool1d if dims == 1 else nn.MaxPool3d)(2),
        "mean": (nn.AvgPool1d if dims == 1 else nn.AvgPool3d)(2),
        "adaptive": (nn.AdaptiveAvgPool1d if dims == 1 else nn.AdaptiveAvgPool3d)(3),
        "norm": nn.Sequential(nn.ReLU(), (nn.BatchNorm1d if dims == 1 else nn.BatchNorm3d)(4)),
        "transposed": (nn.ConvTranspose1d if dims == 1 else nn.ConvTranspose3d)(4, 2, 2, 2),
        "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
        "smooth": lambda x: F.interpolate(x, scale_factor=2.0, mode="linear" if dims == 1 else "trilinear"),
    }
    check(functions, tmp_path, dims, size=4)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: torch.fft.rfft(x).real, r"rfft: the operator aten.\w*fft\w*.default is not among those"),
        (lambda x: x[x > 0], "torch.export can not follow|indexing by a mask"),
        (lambda x: torch.lgamma(x), "the operator aten.lgamma.default is not among those"),
        (lambda x: F.adaptive_max_pool2d(x, 4), "adaptive_max_pool2d.default can not be written: an adaptive max pool whose"),
        (lambda x: x.kthvalue(2, 1).values, "aten.kthvalue"),
    ],
)
def test_an_operator_without_a_mapping_is_named(function: Function, message: str, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 6, 6)
    deployed = pege_fx.convert(pege_fx.prepare(After({"it": function}).eval(), "W4A4", (x,)))
    with pytest.raises(ExportError, match=message) as caught:
        pege_fx.export_onnx(deployed, tmp_path / "model.onnx", (x,))
    assert f" ({__file__}:{function.__code__.co_firstlineno})" in str(caught.value)
    assert not list(tmp_path.iterdir())
