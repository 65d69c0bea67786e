"""Sixty public models, prepared all in float from one call and called in others: each gives what the model gives, or raises.

    python benchmarks/corpus.py                             # make corpus
    python benchmarks/corpus.py --only 'timm/*'             # some of them

They are models of torchvision, timm and transformers with random weights and small settings, as in the coverage table. Each is
called in evaluation and in training, with other batches, other lengths or image sizes, and with other optional arguments. A
silent difference is a fault. Models that are in the results are kept (--rerun: made anew).
"""

import argparse
import copy
import fnmatch
import json
import platform
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)

import pege_fx  # noqa: E402
from benchmarks import zoo  # noqa: E402
from pege_fx import PegeError, QuantPolicy, Rule  # noqa: E402
from pege_fx._utils.comparison import UnorderedDraws, leaves, same  # noqa: E402

FLOAT = QuantPolicy((Rule(weight=None, input=None),))
TORCHVISION = """
    alexnet vgg11_bn resnet18 squeezenet1_1 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5 efficientnet_b0
    regnet_y_400mf convnext_tiny vit_b_32 swin_t googlenet fcn_resnet50
"""
TIMM = """
    vit_tiny_patch16_224 deit_tiny_distilled_patch16_224 xcit_nano_12_p16_224 swin_tiny_patch4_window7_224 pvt_v2_b0
    convit_tiny mixer_s32_224 resmlp_12_224 convnext_atto convnextv2_atto mobileone_s0 repvit_m0_9 mobilenetv3_small_100
    efficientvit_b0 mobilevit_xxs edgenext_xx_small resnet18 regnety_002 starnet_s1 ghostnetv2_100
"""
TRANSFORMERS = """
    bert bert-eager roberta distilbert albert electra deberta modernbert funnel fnet xlnet gpt2 gpt-neox gptj opt bloom
    llama llama-eager mistral qwen2 gemma phi t5 bart vit
"""
FAMILIES = (("torchvision", TORCHVISION), ("timm", TIMM), ("transformers", TRANSFORMERS))
NAMES = tuple(f"{family}/{name}" for family, names in FAMILIES for name in names.split())
ROWS, LENGTH = 2, 16  # of the examples
# Optional arguments that a call adds, where the model takes them.
MORE: tuple[dict[str, Any], ...] = (
    {"output_hidden_states": True},
    {"return_dict": False},
    {"use_cache": False},
    {"labels": torch.zeros(ROWS, dtype=torch.long)},
)
Call = tuple[tuple[Any, ...], dict[str, Any]]


class LateError(BaseException):
    """A model takes longer than its time."""


def resized(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)


def shapes(value: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def rows(count: int) -> Callable[[Tensor], Tensor]:
    """So many rows, those that are there and more of them."""
    return lambda x: x[torch.arange(count) % ROWS] if x.shape[:1] == (ROWS,) else x


def shorter(x: Tensor) -> Tensor:
    return x[:, :11] if x.shape[1:2] == (LENGTH,) else x


def smaller(x: Tensor) -> Tensor:
    return x[..., :-16, :-16] if x.ndim == 4 else x


def calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Call]]:
    """Yield the calls to try after the example's, by name."""
    given = args, kwargs
    yield "as in the example", given
    changes = {f"{count} rows": rows(count) for count in (1, 3, 5)} | {"shorter": shorter, "smaller images": smaller}
    for what, change in changes.items():
        changed = resized(given, change)
        if shapes(changed) != shapes(given):
            yield what, changed
    for name in kwargs:
        yield f"without {name}", (args, {key: value for key, value in kwargs.items() if key != name})
    if kwargs:
        yield from ((f"with {', '.join(more)}", (args, kwargs | more)) for more in MORE)
    yield "as in the example again", given


def answer(module: nn.Module, call: Call, training: bool) -> dict[str, Any]:
    """Call a module; what comes back and what is in its buffers, by name."""
    args, kwargs = copy.deepcopy(call)
    module.train(training)
    torch.manual_seed(0)
    with torch.no_grad(), UnorderedDraws():
        result = module(*args, **kwargs)
    buffers = {f"buffer {name}": value.clone() for name, value in module.named_buffers() if "running" in name}
    return dict(leaves("output", result)) | buffers


def is_close(a: Any, b: Any) -> bool:
    """Tell whether two answers are equal but for the rounding of sums in another order, through some dozen layers."""
    if same(a, b):
        return True
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype):
        return False
    if not a.is_floating_point():
        return False
    bound = 2**11 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=bound, atol=bound * float(a.abs().nan_to_num(0).amax()), equal_nan=True)


def attempt(name: str) -> dict[str, Any]:
    """Return what became of a model: how it was prepared, and of each of its calls."""
    torch.manual_seed(0)
    example = zoo.cases()[name].make()
    model = example.model.eval()
    args, kwargs = example.call(training=False)
    try:
        gm = pege_fx.prepare(model, FLOAT, args, kwargs)
    except PegeError as error:
        return {"prepared": f"{type(error).__name__}: {str(error).splitlines()[0]}", "calls": {}}
    rungs = Counter(capture.rung for capture in gm.meta["plan"].captures)
    found: dict[str, str] = {}
    for training in (False, True):
        for what, call in calls(model, args, kwargs):
            found[f"{'training' if training else 'evaluation'}, {what}"] = verdict(model, gm, call, training)
    return {"prepared": dict(rungs), "calls": found}


def verdict(model: nn.Module, gm: nn.Module, call: Call, training: bool) -> str:
    """Return "equal", by whom a call is refused, or what differs."""
    reference, tried = copy.deepcopy(model), copy.deepcopy(gm)
    try:
        expected = answer(reference, call, training)
    except Exception:
        return "fails in the model"
    try:
        got = answer(tried, call, training)
    except PegeError as error:
        return f"refused: {type(error).__name__}"
    except Exception as error:
        return f"FAULT: raises {type(error).__name__}: {str(error)[:200]}"
    parted = [key for key, value in expected.items() if key not in got or not is_close(value, got[key])]
    return f"FAULT: {', '.join(parted[:3])}" if parted else "equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="patterns of names, with commas between")
    parser.add_argument("--rerun", action="store_true", help="make models anew that are there")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for a model")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/corpus.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models: dict[str, Any] = json.loads(args.output.read_text())["models"] if args.output.exists() else {}

    def late(*_: Any) -> None:
        raise LateError

    signal.signal(signal.SIGALRM, late)
    for name in NAMES:
        if not any(fnmatch.fnmatch(name, pattern) for pattern in args.only.split(",")) or (name in models and not args.rerun):
            continue
        started = time.time()
        signal.alarm(args.timeout)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                models[name] = attempt(name)
        except LateError:
            models[name] = {"prepared": f"takes more than {args.timeout} s", "calls": {}}
        finally:
            signal.alarm(0)
        counts = Counter(result.partition(":")[0] for result in models[name]["calls"].values())
        print(f"{name}: {models[name]['prepared']} {dict(counts)} ({time.time() - started:.0f} s)", flush=True)
        args.output.write_text(json.dumps(summary(models), indent=1) + "\n")
    faults = {name: call for name, model in models.items() for call, what in model["calls"].items() if what.startswith("FAULT")}
    print(json.dumps(summary(models)["counts"], indent=1))
    sys.exit(f"silent differences: {faults}" if faults else 0)


def summary(models: dict[str, Any]) -> dict[str, Any]:
    counts = Counter(result.partition(":")[0] for model in models.values() for result in model["calls"].values())
    prepared = sum(bool(model["calls"]) for model in models.values())
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "timm", "transformers")}
    machine = {"python": platform.python_version(), "pege_fx": pege_fx.__version__, **versions}
    return {**machine, "counts": {"models": len(models), "prepared": prepared, **counts}, "models": models}


if __name__ == "__main__":
    main()
