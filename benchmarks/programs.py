"""A differential fuzzer of capture: random Python around layers, prepared all in float, has to compute what the model computes.

    python benchmarks/programs.py --programs 1000           # part of make fuzz
    python benchmarks/programs.py --seed 17                 # one program, as it was

A program is the text of two modules: optional arguments, caches, flags, contexts, hooks, views that are written to, lists,
early returns, loops, branches on the mode, buffers. It is prepared from one call, and called in other ways: other batches,
arguments and flags, in both modes, one after the other. Each call gives what the model gives (outputs, gradients, buffers, what
it leaves in its arguments) or raises a ``PegeError``. A fault is printed as the smallest program that shows it.
"""

import argparse
import copy
import importlib.util
import json
import platform
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import pege_fx
from pege_fx import PegeError, QuantPolicy, Rule
from pege_fx._utils.comparison import UnorderedDraws, leaves, same, tensors

RESULTS = Path(__file__).parent / "results" / "programs.json"
LOADED: list[str] = []  # modules that the programs are, until each is done
FLOAT = QuantPolicy((Rule(weight=None, input=None),))

# Statements of Model.forward(x, mask=None, flag=False, number=1, cache=None, mode="a"): h is (batch, 4). Any may be left out.
STATEMENTS = (
    "h = self.a(h)", "h = torch.relu(self.b(h))", "h = self.part(h)", "h = self.part.other(h)", "h = self.part(h, gain=2.0)",
    "h = self.part(h, mask)", "h = self.layers(h)", "h = self.drop(h)", "h = self.norm(h)", "h = h * self.part.doubled",
    "if mask is not None: h = h + mask", "if mask is None: h = -h", "h = h if mask is None else h * mask",
    "h = torch.clamp(h, min=mask) if mask is not None else h.tanh()",
    "if flag: h = h * 2", "h = h * number", "if number > 1: h = self.a(h)", "if mode == 'a': h = h.sin()",
    "if self.flag: h = h + 1", "h = h * {'a': 1.0, 'b': 3.0}[mode]", "h = h + (2 if self.number == 3 else 1)",
    "if cache is not None: cache.setdefault('seen', []).append(h)",
    "if cache is not None and 'seen' in cache: h = h + cache['seen'][-1].mean()",
    "if cache is not None: h = h + len(cache)", "if cache: h = -h",
    "if self.training: h = h * 3", "h = h * (2 if self.training else 1)", "if not self.training: return h",
    "if self.part.training: h = self.a(h)",
    "if h.shape[0] > 2: h = h * 2", "for i in range(h.shape[0]): h = h + i * self.b(h)", "h = h / h.shape[0]",
    "h = torch.cat([row.unsqueeze(0) * 2 for row in h])", "h = torch.stack([h[i] for i in range(len(h))])",
    "if h.dim() == 3: return h", "if len(h) == 2: h = h.exp() / 4", "h = h * h.size(0) ** 0.5",
    "if isinstance(h, torch.Tensor): h = h + 1", "if torch.is_tensor(mask): h = h - 1", "if type(h) is torch.Tensor: h = h * 2",
    "if h.dtype is torch.float32: h = h * 2", "if h.dtype == torch.float32: h = h + 2", "if h.requires_grad: h = h * 3",
    "if h.is_contiguous(): h = h + 3", "if hasattr(mask, 'shape'): h = h * 5", "if h.device.type == 'cpu': h = h - 2",
    "with torch.no_grad(): h = self.a(h)", "with torch.no_grad(): scale = self.b(h).sigmoid()\n        h = h * scale",
    "with torch.enable_grad(): h = self.b(h)", "with torch.set_grad_enabled(self.training): h = self.a(h)",
    "with torch.autocast('cpu', enabled=False): h = self.a(h.float())",
    "with torch.autocast('cpu', dtype=torch.bfloat16): h = self.a(h)\n        h = h.float()",
    "with torch.inference_mode(): s = self.a(h).mean().item()\n        h = h * 2",
    "h = self.a(h) if torch.is_grad_enabled() else self.b(h)", "h = h * (2 if torch.is_autocast_enabled('cpu') else 1)",
    "h = h.clone()\n        h[0] = 0",
    "h = h.clone()\n        h[:, 1:3] *= 2", "h = h.clone()\n        v = h.t()\n        v.mul_(3)",
    "h = h.clone()\n        first = self.a(h)\n        torch.swapdims(h, 0, 1).add_(1)\n        h = first + h",
    "h = h.clone()\n        v = h.view(-1)\n        v[0] = 5", "h = h.clone()\n        v = h.unbind(1)[0]\n        v += 1",
    "h = h.clone()\n        before = h\n        h.add_(1)\n        h = h + before",
    "h = h + 0\n        w = h.diagonal()\n        w.zero_()",
    "h = h * 1\n        torch.relu_(h[:1])", "h = h.clone()\n        g = h.expand_as(h)\n        h.mul_(2)\n        h = h + g",
    "parts = []\n        parts.append(h)\n        parts.append(self.a(h))\n        h = sum(parts)",
    "d = {}\n        d['x'] = h\n        d['y'] = self.b(h)\n        h = d['x'] - d['y']",
    "outs = [h, h * 2]\n        outs.insert(0, self.a(h))\n        h = outs.pop() + outs[0]",
    "self.seen.add_(h.detach().mean(0))", "self.seen = 0.5 * self.seen + h.detach().mean(0)", "h = h + self.seen",
    "if self.training: self.seen.mul_(0.5).add_(1)", "self.count += 1", "h = h * self.count",
    "self.last = h.detach()", "h = h + self.last if self.last is not None and self.last.shape == h.shape else h",
    "h = h.detach() + h", "h = h + self.a.weight.sum()", "h = torch.nn.functional.dropout(h, 0.5, self.training)",
    "h = torch.nn.functional.linear(h, self.b.weight * 2, self.a.bias)", "h, aux = self.part.pair(h)",
    "h = h.masked_fill(h > 0, 1.0)", "h = h[h.shape[0] // 2 :]", "h = h + torch.arange(h.shape[0]).unsqueeze(1)",
    "h = h + torch.zeros(h.shape[0], 4)", "h = torch.where(h > 0, h, -h)", "h = h.unflatten(1, (2, 2)).flatten(1)",
    "h = self.layers[len(self.layers) - 1](h)", "for layer in self.layers: h = layer(h)", "h = getattr(self, 'a')(h)",
    "h = h * float(len(self.layers))", "try: h = h + mask\n        except TypeError: h = h - 1", "assert h.shape[1] == 4",
    "h = h.requires_grad_() if False else h", "h = h * (mask if isinstance(mask, torch.Tensor) else 2)",
    "h = torch.utils.checkpoint.checkpoint(self.a, h, use_reentrant=False)", "h.retain_grad() if h.requires_grad else None",
    "if h.requires_grad: h.register_hook(lambda g: g * 2)", "h = x + h if x.shape == h.shape else h",
    "x.mul_(2)", "x = x + h if len(x) == len(h) else x",
)  # fmt: skip
RETURNS = (
    "return h",
    "return h",
    "return {'h': h, 'n': number}",
    "return h, mask",
    "return [h, cache]",
    "return (h, None, [h * 2])",
)
HOOKS = (
    "model.register_forward_hook(lambda m, i, o: o)",
    "model.a.register_forward_hook(lambda m, i, o: o * 2)",
    "model.part.register_forward_pre_hook(lambda m, i: (i[0] * 3, *i[1:]))",
    "model.part.register_forward_pre_hook(lambda m, i, k: (i, {**k, 'gain': 4.0}), with_kwargs=True)",
    "model.part.register_forward_hook(lambda m, i, k, o: o + k.get('gain', 1.0), with_kwargs=True)",
    "model.layers.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else g * 2 for g in gi))",
    "model.b.register_full_backward_pre_hook(lambda m, go: tuple(g * 3 for g in go))",
    "model.register_forward_pre_hook(lambda m, i: (i[0] + 1, *i[1:]))",
    "model.part.forward = lambda h, mask=None, gain=1.0: h * 7",
    "model.a.weight.register_hook(lambda g: g * 2)",
)
HEADER = """
import torch
import torch.utils.checkpoint
from torch import nn


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, h, mask=None, gain=1.0):
        if mask is not None:
            h = h * mask
        return self.fc(h) * gain

    def other(self, h):
        return self.fc(h) - 1

    def pair(self, h):
        return self.fc(h), h.mean()

    @property
    def doubled(self):
        return self.fc.bias * 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.part = nn.Linear(4, 4), nn.Linear(4, 4), Part()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(4))
        self.flag, self.number, self.count, self.last = True, 3, 0, None

    def forward(self, x, mask=None, flag=False, number=1, cache=None, mode="a"):
        h = x
"""
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "mask": ("None", "torch.ones(1, 4) * 0.5", "2.0"),
    "flag": ("False", "True"),
    "number": ("1", "2"),
    "cache": ("None", "{}", "{'seen': [torch.ones(4)]}"),
    "mode": ("'a'", "'b'"),
}


@dataclass(frozen=True)
class Call:
    """One call: how many rows, arguments as text, the mode, whether the input needs a gradient, within what."""

    rows: int
    named: tuple[tuple[str, str], ...] = ()
    training: bool = False
    differentiable: bool = False
    within: str = ""

    def arguments(self, seed: int) -> tuple[Tensor, dict[str, Any]]:
        x = torch.randn(self.rows, 4, generator=torch.Generator().manual_seed(seed))
        return x, {name: eval(text, {"torch": torch}) for name, text in self.named}


@dataclass(frozen=True)
class Program:
    """A model as statements, what is done to it, the call that it is prepared from, and those after it."""

    statements: tuple[str, ...]
    hooks: tuple[str, ...]
    example: Call
    calls: tuple[Call, ...]

    @property
    def text(self) -> str:
        body = "".join(f"        {statement}\n" for statement in self.statements)
        hooks = "".join(f"    {hook}\n" for hook in self.hooks)
        return f"{HEADER}{body}\n\ndef make():\n    torch.manual_seed(0)\n    model = Model()\n{hooks}    return model\n"

    def __str__(self) -> str:
        calls = "".join(f"#   {call}\n" for call in self.calls)
        return f"{self.text}\n# prepared from {self.example}\n# called as\n{calls}"


def random_call(choose: random.Random, training: bool | None = None) -> Call:
    named = tuple((name, choose.choice(values)) for name, values in ARGUMENTS.items() if choose.random() < 0.3)
    mode = choose.random() < 0.5 if training is None else training
    within = choose.choice(["", "", "", "", "no_grad", "autocast"])
    return Call(choose.choice([2, 2, 3, 5]), named, mode, choose.random() < 0.3, within)


def random_program(seed: int) -> Program:
    """Return the program of a seed."""
    choose = random.Random(seed)
    statements = [choose.choice(STATEMENTS) for _ in range(choose.randint(1, 5))]
    if choose.random() < 0.15:
        statements.insert(choose.randrange(len(statements)), "if x.shape[0] > 4: return h")
    hooks = [choose.choice(HOOKS)] if choose.random() < 0.25 else []
    example = replace(random_call(choose), rows=2, differentiable=False, within="")
    calls = [example, replace(example, training=not example.training), *(random_call(choose) for _ in range(4)), example]
    return Program((*statements, choose.choice(RETURNS)), tuple(hooks), example, tuple(calls))


class FaultError(AssertionError):
    """A silent difference, or an error that is none of ours."""


def loaded(program: Program, folder: Path) -> nn.Module:
    """Return the model of a program, from a file as a user's code is."""
    path = folder / f"program_{abs(hash(program.text))}.py"
    path.write_text(program.text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        model: nn.Module = module.make()
        return model
    finally:
        LOADED.append(path.stem)


def run(module: nn.Module, call: Call, seed: int) -> dict[str, Any]:
    """Call a module; everything that it leaves, by name."""
    x, named = call.arguments(seed)
    leaf = x.requires_grad_(call.differentiable)
    module.train(call.training)
    torch.manual_seed(0)
    contexts = {"no_grad": torch.no_grad(), "autocast": torch.autocast("cpu", torch.bfloat16), "": torch.enable_grad()}
    with contexts[call.within], UnorderedDraws():
        y = module(leaf + 0, **named)
    left = dict(leaves("output", y)) | dict(leaves("arguments", named))
    results = [t for _, t in tensors("", y) if t.requires_grad]
    if results:
        parameters = list(module.parameters())
        wanted = [*([leaf] if call.differentiable else []), *parameters]
        loss = torch.stack([t.float().cos().sum() for t in results]).sum()
        found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        names = [*(["x"] if call.differentiable else []), *(name for name, _ in module.named_parameters())]
        left |= {f"gradient of {name}": g for name, g in zip(names, found, strict=True)}
    left |= {f"{name} needs a gradient": t.requires_grad for name, t in tensors("output", y)}
    left |= {f"buffer {name}": b.clone() for name, b in module.named_buffers() if name in ("seen", "norm.running_mean")}
    return left


def is_close(a: Any, b: Any) -> bool:
    if same(a, b):
        return True
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype):
        return False
    if not a.is_floating_point():
        return False
    tolerance = 1000 * torch.finfo(a.dtype).eps  # four rows through a dozen layers of four channels; a fault is far above it
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * (1 + float(a.detach().abs().amax())), equal_nan=True)


def attack(program: Program, folder: Path, counts: Counter[str]) -> None:
    """Raise ``FaultError`` if a program's graph does silently what the model does not."""
    model = loaded(program, folder)
    x, named = program.example.arguments(1)
    model.train(program.example.training)
    try:
        run(copy.deepcopy(model), program.example, 1)
    except Exception:
        counts["no program"] += 1
        return
    try:
        gm = pege_fx.prepare(model, FLOAT, (x,), named)
    except PegeError as error:
        counts[f"refused: {type(error).__name__}"] += 1
        return
    except Exception as error:
        raise FaultError(f"prepare raises {type(error).__name__}: {error}") from error
    counts["prepared"] += 1
    for number, call in enumerate(program.calls):
        try:
            expected = run(model, call, number)
        except Exception:
            counts["call fails in the model"] += 1
            return  # what it left half done is nobody's question
        try:
            found = run(gm, call, number)
        except PegeError as error:
            counts[f"call refused: {type(error).__name__}"] += 1
            return
        except Exception as error:
            raise FaultError(f"call {number} raises {type(error).__name__}: {str(error)[:300]}") from error
        for name, value in expected.items():
            if name.startswith("gradient") and name not in found:
                raise FaultError(f"call {number}: {name} is missing")
            if name not in found or not is_close(value, found[name]):
                raise FaultError(f"call {number}: {name} is {found.get(name)!s:.200} instead of {value!s:.200}")
        counts["calls equal"] += 1


def fails(program: Program, folder: Path) -> str:
    """Return what is wrong with a program, "" if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attack(program, folder, Counter())
    except FaultError as error:
        return str(error)
    return ""


def shrunk(program: Program, folder: Path, budget: int = 60) -> Program:
    """Return a smaller program that is wrong too: without statements, hooks, calls and arguments that it needs not."""
    tries = 0
    going = True
    while going and tries < budget:
        going = False
        for smaller in _smaller(program):
            tries += 1
            if tries >= budget:
                break
            if fails(smaller, folder):
                program, going = smaller, True
                break
    return program


def _smaller(program: Program) -> list[Program]:
    def without(values: Sequence[Any]) -> list[tuple[Any, ...]]:
        return [(*values[:i], *values[i + 1 :]) for i in range(len(values))]

    smaller = [replace(program, calls=calls) for calls in without(program.calls) if calls]
    smaller += [replace(program, statements=(*rest, program.statements[-1])) for rest in without(program.statements[:-1])]
    smaller += [replace(program, hooks=hooks) for hooks in without(program.hooks)]
    smaller += [replace(program, example=replace(program.example, named=named)) for named in without(program.example.named)]
    return smaller


def campaign(first: int, count: int, until: float, report: Callable[[int, Program, str], None]) -> Counter[str]:
    """Run programs of consecutive seeds; what became of them."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        for seed in range(first, first + count):
            if time.time() > until:
                break
            program = random_program(seed)
            counts["programs"] += 1
            try:
                attack(program, folder, counts)
            except FaultError:
                counts["faults"] += 1
                smallest = shrunk(program, folder)
                report(seed, smallest, fails(smallest, folder))
            while LOADED:
                sys.modules.pop(LOADED.pop(), None)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="one program, printed, and no campaign")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so many")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faults: dict[int, str] = {}

    def report(seed: int, program: Program, what: str) -> None:
        faults[seed] = what
        print(f"--- seed {seed}: {what}\n{program}", flush=True)

    if args.seed is not None:
        print(random_program(args.seed))
        sys.exit("a fault" if campaign(args.seed, 1, float("inf"), report)["faults"] else 0)
    started = time.time()
    counts = campaign(args.first, args.programs, started + 60 * args.minutes, report)
    result = {"first seed": args.first, **counts, "minutes": round((time.time() - started) / 60, 1), "faults": faults}
    result |= {"torch": torch.__version__, "python": platform.python_version(), "pege_fx": pege_fx.__version__}
    stored = json.loads(args.output.read_text()) if args.output.exists() else []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps([*stored, result], indent=1) + "\n")
    print(json.dumps(result | {"faults": len(faults)}, indent=1))
    sys.exit(f"{len(faults)} programs show a fault" if faults else 0)


if __name__ == "__main__":
    main()
