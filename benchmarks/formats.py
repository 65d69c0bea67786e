"""Quantize and dequantize as torchao does, bit for bit: MXFP8, MXFP4, NVFP4, a whole 8da4w layer; and training steps.

    python benchmarks/formats.py --blocks 10000000        # needs torchao; writes benchmarks/results/formats.json

Blocks are normal numbers times a power of two, every exponent of float32 among them, in float32 and bfloat16. A block counts as
different if one of its elements has another value (NaN equals NaN).
"""

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import QuantPolicy, QuantSpec, Rule
from pege_fx.numerics.functional import fake_quantize
from pege_fx.numerics.layouts import Channels
from pege_fx.numerics.spec import METHODS

RESULTS = Path(__file__).parent / "results" / "formats.json"
CHUNK = 100_000
DTYPES = (torch.float32, torch.bfloat16)


def ours(x: Tensor, spec: QuantSpec) -> Tensor:
    """The values of a weight's codes."""
    resolved = spec.resolve("weight", non_negative=False)
    method = METHODS[str(resolved.method)](resolved, "weight", tuple(x.shape), Channels(x.shape[0]))
    scale, zero_point, inverse = method.grid_of(x)
    y = fake_quantize(method.tiling.tiles(x), scale, resolved, zero_point=zero_point, inverse=inverse)
    return method.tiling.untiled(y, x)


def formats() -> dict[str, tuple[QuantSpec, int, Callable[[Tensor], Tensor]]]:
    """For each format the spec, the size of a block, and torchao's own way."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def mx(element: object) -> Callable[[Tensor], Tensor]:
        return lambda x: MXTensor.to_mx(x, element, 32).dequantize(x.dtype)

    def nvfp4(x: Tensor) -> Tensor:
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=per_tensor_amax_to_scale(x.abs().max())).dequantize(x.dtype)

    return {
        "MXFP8 E4M3": (QuantSpec(format="e4m3", method="mx"), 32, mx(torch.float8_e4m3fn)),
        "MXFP8 E5M2": (QuantSpec(format="e5m2", method="mx"), 32, mx(torch.float8_e5m2)),
        "MXFP4": (QuantSpec(format="e2m1", method="mx"), 32, mx(torch.float4_e2m1fn_x2)),
        "NVFP4": (QuantSpec(format="e2m1", method="nvfp4"), 16, nvfp4),
    }


def blocks(count: int, size: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    exponents = torch.randint(-149, 127, (count, 1), generator=generator).double()
    return (torch.randn(count, size, generator=generator).double() * torch.exp2(exponents)).clamp(-3e38, 3e38).to(dtype)


def different(a: Tensor, b: Tensor) -> int:
    return int((~((a == b) | (a.isnan() & b.isnan()))).any(1).sum())


def compare(count: int) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, (spec, size, theirs) in formats().items():
        for dtype in DTYPES:
            generator, wrong = torch.Generator().manual_seed(0), 0
            for start in range(0, count, CHUNK):
                x = blocks(min(CHUNK, count - start), size, dtype, generator)
                wrong += different(ours(x, spec), theirs(x))
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = {"blocks": count, "different": wrong}
            print(f"{name}, {dtype}: {wrong} of {count:,} blocks differ", flush=True)
    return found


def layer() -> dict[str, dict[str, bool]]:
    """A linear layer in 8da4w, trained and converted by torchao, against ours."""
    from torchao.quantization.qat.linear import Int8DynActInt4WeightQATQuantizer

    found = {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 128, bias=False)).to(dtype)
        x = (torch.randn(2, 200, 256) * torch.exp2(torch.randint(-6, 6, (2, 200, 1)).float())).to(dtype)
        quantizer = Int8DynActInt4WeightQATQuantizer(groupsize=32, precision=dtype, scales_precision=torch.float32)
        theirs = quantizer.convert(quantizer.prepare(copy.deepcopy(model)))
        gm = pege_fx.prepare(model, "8da4w-g32", (x,)).eval()
        with torch.no_grad():
            wanted = theirs(x)
            equal = {"eval": torch.equal(gm(x), wanted), "convert": torch.equal(pege_fx.convert(gm)(x), wanted)}
        found[str(dtype).removeprefix("torch.")] = equal
        print(f"8da4w, {dtype}: {equal}")
    return found


def kept_bytes(model: nn.Module, call: dict[str, Tensor]) -> int:
    """Bytes that autograd keeps for backward, each storage once, parameters left out."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        alive = model(**call).loss
    assert alive is not None
    return sum(kept.values())


def steps(rounds: int) -> dict[str, dict[str, float]]:
    """A training step of a small Llama over float's, medians of interleaved runs: 4 layers of 512, 2 x 256 tokens, one thread.

    What is kept is not counted where quantized operands are recomputed: hooks of its own hide it from ``kept_bytes``.
    """
    from torchao.quantization.qat.linear import Int8DynActInt4WeightQATQuantizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, use_cache=False, **shape, **heads))
    ids = torch.randint(0, 512, (2, 256))
    call = {"input_ids": ids, "labels": ids}
    models: dict[str, nn.Module] = {"float": model}
    for name in ("int4-g32", "8da4w-g32"):
        for recompute in (False, True):
            rules = (*QuantPolicy.parse(name).rules, Rule(function="linear", recompute=recompute))
            gm = pege_fx.prepare(copy.deepcopy(model), QuantPolicy(rules), example_kwargs=call, check=False)
            pege_fx.PEGEScheduler(gm, 1000).step()
            models[name + (", recomputed" if recompute else "")] = gm
    models["8da4w-g32, torchao"] = Int8DynActInt4WeightQATQuantizer(groupsize=32).prepare(copy.deepcopy(model))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 2):
        for name, each in models.items():
            each.zero_grad()
            start = time.perf_counter()
            each(**call).loss.backward()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    bytes_ = {name: kept_bytes(each, call) for name, each in models.items()}
    found = {name: {"step over float": round(medians[name] / medians["float"], 3)} for name in models}
    for name in (name for name in models if "recomputed" not in name):
        found[name]["kept over float"] = round(bytes_[name] / bytes_["float"], 3)
    for name, row in found.items():
        print(name, row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=15, help="of training steps")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    versions = {name: version(name) for name in ("torch", "torchao")}
    result = {"device": platform.machine(), **versions, "blocks": compare(args.blocks), "8da4w": layer()}
    result["small Llama, one thread"] = steps(args.rounds)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
