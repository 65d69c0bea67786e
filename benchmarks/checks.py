"""One model through everything that a row of the coverage table claims."""

import copy
import io
import math
import pickle
import re
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from benchmarks.products import Product, products_of, tensors_in
from benchmarks.zoo import Case
from benchmarks.zoo.example import Call, Example
from pege_fx import QuantPolicy, Rule
from pege_fx.kernels.inductor import eager_kernels
from pege_fx.training.scheduler import plan_of

POLICY = "W4A4"
ALL_FLOAT = QuantPolicy((Rule(weight=None, input=None),))
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
CLOSE = 5e-3  # of the largest output: float32 in another order moves boxes of untrained detectors by 1e-3
# Every claim, in the order in which it is checked.
CLAIMS = {
    "prepare": "`prepare` returns a GraphModule",
    "keys": "every key of the model's `state_dict` is kept",
    "train": "forward and backward are finite, and every parameter that had a gradient has one",
    "eval": "outputs in evaluation are finite",
    "deepcopy": "a deep copy, run after that, has equal outputs",
    "pickle": "an unpickled pickle's outputs are equal",
    "convert": "the converted model's outputs equal those of `eval()` bit for bit",
    "function": "prepared all in float, it computes what the model computes, on inputs that are not the examples",
}


class ClaimError(Exception):
    """A model does not do what its row claims."""


def require(condition: bool, message: str) -> None:
    """Raise ``ClaimError`` unless a condition holds."""
    if not condition:
        raise ClaimError(message)


def check(case: Case, stop: bool = False) -> dict[str, Any]:
    """Run every check and return the row; ``stop`` raises the first failure instead of noting it."""
    row: dict[str, Any] = {"family": case.family, "passed": [], "problems": {}}
    began = time.perf_counter()
    with warnings.catch_warnings(), eager_kernels():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        example = case.make()
        row["parameters"] = sum(p.numel() for p in example.model.parameters())
        row |= {"note": example.note} if example.note else {}
        checks = _Checks(example, row)
        for claim in CLAIMS:
            try:
                getattr(checks, claim)()
                row["passed"].append(claim)
            except Exception as error:
                if stop:
                    raise
                row["problems"][claim] = _words(error)
                if claim == "prepare":
                    break
    row["seconds"] = round(time.perf_counter() - began, 1)
    return row


class _Checks:
    """The claims as methods, each of which raises if it does not hold."""

    def __init__(self, example: Example, row: dict[str, Any]) -> None:
        self.example, self.model, self.row = example, example.model, row
        self.gm: GraphModule
        self.reference: list[Tensor] = []

    def prepare(self) -> None:
        self.gm = _prepare(self.model, POLICY, self.example)
        self.row |= describe(self.gm)

    def keys(self) -> None:
        missing = sorted(self.model.state_dict().keys() - self.gm.state_dict().keys())
        require(not missing, f"{len(missing)} keys are missing: {missing[:4]}")

    def train(self) -> None:
        expected = gradients(copy.deepcopy(self.model), self.example)
        found = gradients(copy.deepcopy(self.gm), self.example)
        lost = sorted(expected.keys() - found.keys())
        bad = [name for name, grad in found.items() if not bool(grad.isfinite().all())]
        require(not lost, f"{len(lost)} of {len(expected)} parameters lose their gradient: {lost[:4]}")
        require(not bad, f"{len(bad)} gradients are not finite: {bad[:4]}")

    def eval(self) -> None:
        products, result = products_of(self.gm.eval(), *self.example.call(training=False))
        self.row |= work_of(products)
        self.reference = [x.clone() for x in tensors_in(result)]
        require(_are_finite(self.reference), "an output is not finite")

    def deepcopy(self) -> None:
        self._same_as(copy.deepcopy(self.gm))

    def pickle(self) -> None:
        try:
            pickle.dump(self.model, io.BytesIO())
        except Exception as error:
            self.row["not pickled"] = f"the float model has no pickle either: {type(error).__name__}"
            return
        file = io.BytesIO()
        pickle.dump(self.gm, file)
        file.seek(0)
        self._same_as(pickle.load(file))

    def convert(self) -> None:
        self._same_as(pege_fx.convert(self.gm))

    def function(self) -> None:
        gm = _prepare(self.model, ALL_FLOAT, self.example).eval()
        call = self.example.other_call()
        require_alike(evaluate(copy.deepcopy(self.model).eval(), call), evaluate(gm, call), CLOSE)

    def _same_as(self, other: nn.Module) -> None:
        require_alike(self.reference, evaluate(other, self.example.call(training=False)), 0.0)


def _prepare(model: nn.Module, policy: QuantPolicy | str, example: Example) -> GraphModule:
    args, kwargs = example.call(training=True)
    return pege_fx.prepare(model.train(), policy, args, kwargs or None)


def gradients(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """One forward and backward in training mode; return the gradients by parameter, under each of its names."""
    torch.manual_seed(0)
    args, kwargs = example.call(training=True)
    result = model.train()(*args, **kwargs)
    require(_are_finite(tensors_in(result)), "an output in training is not finite")
    loss_of(result).backward()
    return {name: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}


def loss_of(value: Any) -> Tensor:
    """The sum over all outputs of their means, weighted so that normalized outputs have a gradient too."""
    terms = []
    for x in tensors_in(value):
        if x.requires_grad and x.numel():
            weight = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).cos().reshape(x.shape)
            terms.append((x * weight).mean().float())
    require(bool(terms), "no output has a gradient")
    return torch.stack(terms).sum()


@torch.no_grad()
def evaluate(model: nn.Module, call: Call) -> list[Tensor]:
    """Return the tensors of the output, in order."""
    torch.manual_seed(0)
    args, kwargs = copy.deepcopy(call)
    return [x.clone() for x in tensors_in(model(*args, **kwargs))]


def _are_finite(tensors: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors if x.is_floating_point())


def require_alike(expected: list[Tensor], found: list[Tensor], tolerance: float) -> None:
    """Compare outputs; the tolerance is a share of the largest value of each, 0 means bit for bit."""
    require(len(expected) == len(found), f"{len(expected)} output tensors became {len(found)}")
    for x, y in zip(expected, found, strict=True):
        require(x.shape == y.shape, f"shape {tuple(x.shape)} became {tuple(y.shape)}")
        if not torch.equal(x, y):
            worst = float((x.double() - y.double()).abs().max() / x.double().abs().max().clamp(min=1e-6))
            require(math.isfinite(worst) and worst < tolerance, f"outputs differ by {worst:.1e} of the largest")


def describe(gm: GraphModule) -> dict[str, Any]:
    """The rungs that the parts of the model took, what made them so, and what the plan leaves in float, and why."""
    plan = plan_of(gm)
    edges = [(op, edge) for op in plan.operations for edge in op.edges]
    in_float = [f"{op.path} {edge.operand}: {edge.reason}" for op, edge in edges if edge.spec is None]
    in_float += [f"{op.path}: {op.reason}" for op in plan.operations if op.reason]
    never_called = [op for op in plan.operations if op.edges and op.macs is None and op.function not in RECURRENT]
    python = [f"{c.path or 'the model'}: {c.reason} ({c.place})" for c in plan.captures if c.rung == "python"]
    return {
        "rungs": dict(Counter(c.rung for c in plan.captures)),
        "root rung": plan.captures[0].rung,
        "python": [_without_paths(text) for text in python[:12]],
        "edges": len(edges),
        "float edges": [_without_paths(text) for text in in_float[:12]],
        "never called": [op.path for op in never_called][:12],
        "recurrent": any(op.function in RECURRENT for op in plan.operations),
    }


def _without_paths(text: str) -> str:
    """Leave file names, without the folders that this machine has them in."""
    return re.sub(r"(?<![\w.])/[\w.+/-]*/", "", text)


def work_of(products: list[Product]) -> dict[str, Any]:
    """Multiply-accumulates by kind: all, quantized, those with one operand on a grid; and the largest that are not."""
    work: dict[str, dict[str, int]] = {}
    missed: Counter[str] = Counter()
    for product in products:
        kind = work.setdefault(product.kind, {"macs": 0, "quantized": 0, "four bits": 0, "one operand": 0})
        kind["macs"] += product.macs
        if product.quantized:
            kind["quantized"] += product.macs
            kind["four bits"] += product.macs * (max(bits or 0 for bits in product.bits) <= 4)
        else:
            kind["one operand"] += product.macs * any(bits is not None for bits in product.bits)
            missed[f"{product.kind}: {product.where} {product.bits}"] += product.macs
    return {"work": work, "missed": dict(missed.most_common(5))}


def _words(error: Exception) -> str:
    text = _without_paths(str(error).strip().split("\n\nIn pass")[0].split("\n\nWhile executing")[0])[:600]
    if isinstance(error, ClaimError):
        return text
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    return f"{type(error).__name__}: {text} [{' > '.join(f'{Path(f.filename).name}:{f.lineno}' for f in frames[-4:])}]"


def share(row: dict[str, Any], *kinds: str, what: str = "quantized") -> float | None:
    """Return the share of a row's multiply-accumulates of some kinds that are quantized, or None if it has none."""
    parts = [row.get("work", {}).get(kind) for kind in kinds]
    total = sum(part["macs"] for part in parts if part)
    return sum(part[what] for part in parts if part) / total if total else None


def passes(row: dict[str, Any]) -> bool:
    """Tell whether everything that a row claims holds."""
    return not row["problems"]
