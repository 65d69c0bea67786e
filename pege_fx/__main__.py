"""What the commands do: python -m pege_fx explain torchvision:resnet18 --policy W4A4 --input 1x3x224x224"""

import argparse
import contextlib
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import pege_fx
from pege_fx._utils.files import atomic_write, path_of
from pege_fx._utils.listing import write_listing
from pege_fx.errors import ModelError, OutputError, PegeError, closest
from pege_fx.inspection.coverage import Coverage
from pege_fx.policy.rules import QuantPolicy
from pege_fx_cli import main

__all__ = ["COMMANDS", "load_model", "load_policy", "main", "parse_input", "run"]

FAILURE, INTERRUPTED = 1, 130


# --- what the arguments mean -----------------------------------------------------------------------------------------


def load_model(text: str) -> nn.Module:
    """Return the model that a string names, with random weights: nothing is downloaded.

    >>> type(load_model("torch.nn:Identity")).__name__
    'Identity'
    """
    source, _, name = text.partition(":")
    if not source or not name:
        raise ModelError(f"{text!r} names no model: write torchvision:NAME, timm:NAME or package.module:function.")
    loaders: dict[str, Callable[[str], Any]] = {"torchvision": _from_torchvision, "timm": _from_timm}
    made = loaders[source](name) if source in loaders else _from_module(source, name)
    if not isinstance(made, nn.Module):
        raise ModelError(f"{text} is a {type(made).__name__}, not an nn.Module.")
    return made


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = getattr(error, "name", None) or module
        hint = f": pip install {missing}" if missing in ("torchvision", "timm") else ""
        raise ModelError(f"can not import {module}: {error}{hint}.") from error
    except Exception as error:  # the module's own code
        raise ModelError(f"can not import {module}: {type(error).__name__}: {error}") from error


def _from_torchvision(name: str) -> Any:
    models = _imported("torchvision").models
    if name not in (known := models.list_models()):
        raise ModelError(f"torchvision has no model {name!r}; closest: {closest(name, known)}.")
    takes = inspect.signature(models.get_model_builder(name)).parameters
    offline = {"weights_backbone": None} if "weights_backbone" in takes else {}
    return models.get_model(name, weights=None, **offline)


def _from_timm(name: str) -> Any:
    timm = _imported("timm")
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}; closest: {closest(name, timm.list_models())}.")
    return timm.create_model(name, pretrained=False)


def _from_module(source: str, name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    value = _imported(source)
    for part in name.split("."):
        if not hasattr(value, part):
            names = [known for known in dir(value) if not known.startswith("_")]
            raise ModelError(f"{source} has no {name!r}; closest: {closest(part, names)}.")
        value = getattr(value, part)
    if isinstance(value, nn.Module) or not callable(value):
        return value
    try:
        return value()
    except Exception as error:
        raise ModelError(f"{source}:{name}() fails: {type(error).__name__}: {error}") from error


def load_policy(text: str) -> QuantPolicy:
    """Return the policy of a short form, or of a TOML or JSON file."""
    if text.endswith(".toml"):
        return QuantPolicy.from_toml(text)
    if not text.endswith(".json"):
        return QuantPolicy.parse(text)
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise pege_fx.PolicyError(f"can not read the policy {text}: {getattr(error, 'strerror', error)}.") from error
    return QuantPolicy.from_json(content)


_SHAPE = re.compile(r"(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


def parse_input(text: str) -> Any:
    """Return random values of a shape, ``1x3x224x224`` or ``1x16:int64``; a list of them for ``[3x32x32,3x48x48]``.

    >>> parse_input("2x3:int64").shape, [x.shape for x in parse_input("[4,5x6]")]
    (torch.Size([2, 3]), [torch.Size([4]), torch.Size([5, 6])])
    """
    if text.startswith("[") and text.endswith("]"):
        return [parse_input(part) for part in text[1:-1].split(",")]
    found = _SHAPE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape: write 1x3x224x224, 1x16:int64 or [3x320x320]")
    shape = [int(size) for size in found["shape"].split("x")]
    dtype = getattr(torch, found["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r}: torch has no dtype {found['dtype']!r}")
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def example_inputs(model: nn.Module, options: argparse.Namespace) -> tuple[Any, ...] | None:
    """Return what ``--input`` says; without it, the input that the model's library documents for it, if it does."""
    if options.input:
        return tuple(options.input)
    source, _, name = options.model.partition(":")
    if source == "timm":
        return (torch.randn(1, *model.default_cfg["input_size"]),)  # type: ignore[index]
    if source == "torchvision" and inspect.getmodule(type(model)).__name__.count(".") == 2:  # type: ignore[union-attr]
        size = 299 if name == "inception_v3" else 224  # a classifier of images: torchvision.models.<file>
        return (torch.randn(1, 3, size, size),)
    return None


# --- the commands ----------------------------------------------------------------------------------------------------


def _explanation(options: argparse.Namespace) -> Any:
    model = load_model(options.model)
    return pege_fx.explain(model, load_policy(options.policy), example_inputs(model, options), batch_norm=options.batch_norm)


def _prepared(options: argparse.Namespace) -> Any:
    model = load_model(options.model)
    return pege_fx.prepare(model, load_policy(options.policy), example_inputs(model, options), batch_norm=options.batch_norm)


def _show(shown: Any, output: str | None) -> None:
    if output is not None:
        write_listing(shown, output)
    elif sys.stdout.isatty():
        Console().print(shown)
    else:
        print(shown)


def _explain(options: argparse.Namespace) -> None:
    explanation = _explanation(options)
    if not options.match:
        _show(explanation, options.output)
        return
    text = "\n".join(str(found) for match in options.match for found in _selected(explanation, match))
    if options.output is None:
        print(text)
    else:
        _write(text, options.output)


def _selected(explanation: Any, match: str) -> list[Any]:
    """Operations by pattern; for a plain name also what is no operation."""
    if match.startswith("re:") or set(match) & set("*?["):
        return list(pege_fx.Explanation(explanation.plan, explanation.title, match=match).operations)
    return [explanation[match]]


def _write(text: str, output: str) -> None:
    with atomic_write(output, OutputError) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _summary(options: argparse.Namespace) -> None:
    _show(pege_fx.summary(_prepared(options), options.match, depth=options.depth), options.output)


def _coverage(options: argparse.Namespace) -> None:
    _show(Coverage(_explanation(options).plan), options.output)


def _draw(options: argparse.Namespace) -> None:
    pege_fx.draw(_prepared(options), options.output, depth=options.depth)


def _report(options: argparse.Namespace) -> None:
    pege_fx.report(_prepared(options), options.output, history=options.history)


def _export(options: argparse.Namespace) -> None:
    """The file is written, then verified on the inputs; one that computes something else stays for a look, and fails."""
    deployed = pege_fx.load_deployed(options.file)
    inputs, path = tuple(options.input), path_of(options.output or Path(options.file).with_suffix(".onnx"), OutputError)
    if path.resolve() == Path(options.file).resolve():
        raise OutputError(f"{path} is the model itself: give another file with --output.")
    given = {name: value for name in ("style", "opset") if (value := getattr(options, name)) is not None}
    if options.engine is None:
        size = pege_fx.export_onnx(deployed, path, inputs, **given)
    else:
        size = pege_fx.engines.export(deployed, path, inputs, engine=options.engine, **given)
    print(f"{path}: {size:,} bytes, {options.engine or options.style or 'qdq'}")
    if options.verify:
        report = pege_fx.verify(deployed, path, [inputs], engine=options.engine or "onnxruntime")
        print(report)
        if not report.ok:
            raise pege_fx.ExportError(f"{path} does not compute what {options.file} does: see the verdict.")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "explain": _explain,
    "summary": _summary,
    "coverage": _coverage,
    "draw": _draw,
    "report": _report,
    "export": _export,
}


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _warn(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"pege-fx: warning: {_one_line(message)}", file=sys.stderr)


def run(options: argparse.Namespace) -> int:
    """Run the command that was parsed; returns the exit code: 0, 1 for what went wrong, 130 if interrupted."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            warnings.simplefilter("always", pege_fx.PegeWarning)
            COMMANDS[options.command](options)
            sys.stdout.flush()
    except PegeError as error:
        print(f"pege-fx: error: {_one_line(error)}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
