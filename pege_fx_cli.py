"""The arguments of ``pege-fx``, and where the command begins: help and wrong usage are answered without importing torch.

It lies beside the package, not in it: whatever is imported from ``pege_fx`` imports torch first, which takes seconds.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

EXAMPLES = """\
models:   torchvision:resnet18   timm:vit_tiny_patch16_224   package.module:function (or :instance)
inputs:   --input 1x3x224x224   --input 1x16:int64   --input [3x320x320,3x400x300] (a list); one for each argument
policies: --policy W4A4   --policy policy.toml   --policy policy.json

  pege-fx explain torchvision:resnet18 --policy W4A4 --match 'layer1.0.*'
  pege-fx draw torchvision:resnet18 --policy W4A4 --output resnet18.svg
  pege-fx coverage torchvision:fasterrcnn_resnet50_fpn --input '[3x320x320]'
  pege-fx export model.safetensors --input 1x3x224x224 --style qcdq -o model.onnx
"""


def _input(text: str) -> Any:
    from pege_fx.__main__ import parse_input  # a tensor has to be made: this wants torch

    return parse_input(text)


class _Version(argparse.Action):
    """Prints versions when they are asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        try:
            print(f"pege_fx {version('pege_fx')}, torch {version('torch')}")
        except PackageNotFoundError as error:
            parser.exit(1, f"pege-fx: error: {error.name} is not installed\n")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="pege-fx",
        description="See what a quantization policy does to a model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    explained = _command(commands, "explain", "what prepare would do: bits, rule or reason for every operation")
    explained.add_argument(
        "--match", action="append", metavar="PATH", help="only this module or node, or pattern, in full; repeatable"
    )
    summed = _command(commands, "summary", "what the prepared model has become, with its size")
    summed.add_argument("--match", metavar="PATTERN", help="only these operations: a glob, or re:REGEX")
    summed.add_argument("--depth", type=int, help="one row for each module of that many path components")
    _command(commands, "coverage", "what share is quantized, how each module was traced, what stays float")
    drawn = _command(commands, "draw", "the graph as a picture", "graph.svg")
    drawn.add_argument("--depth", type=int, help="collapse modules below that many path components")
    reported = _command(commands, "report", "the graph as a page to explore offline", "report.html")
    reported.add_argument("--history", metavar="CSV", help="a run's telemetry, as CSVWriter leaves it")
    _add_export(commands)
    return made


def _command(commands: Any, name: str, about: str, output: str | None = None) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    added.add_argument("model", metavar="MODEL", help="torchvision:NAME, timm:NAME or package.module:function")
    added.add_argument("--policy", default="W4A4", help='"W4A4", or a .toml or .json file (default: %(default)s)')
    added.add_argument("--input", action="append", type=_input, metavar="SHAPE", help="1x3x224x224; repeat for each argument")
    added.add_argument("--batch-norm", choices=("train", "freeze", "keep"), default="train")
    endings = "a .txt, .md, .json or .html file (default: print)" if output is None else "the file (default: %(default)s)"
    added.add_argument("-o", "--output", default=output, metavar="FILE", help=endings)
    return added


def _add_export(commands: Any) -> None:
    about = "a converted model, stored by save_deployed, as ONNX, verified in ONNX Runtime"
    added = commands.add_parser("export", help=about, description=about)
    added.add_argument("file", metavar="FILE", help="what save_deployed wrote")
    shapes = "1x3x224x224; repeat for each argument; its values are random"
    added.add_argument("--input", action="append", type=_input, required=True, metavar="SHAPE", help=shapes)
    added.add_argument("--style", metavar="STYLE", help="qdq, qcdq or qonnx (default: the engine's, or qdq)")
    added.add_argument("--engine", metavar="NAME", help="written and verified for this engine, as onnxruntime")
    added.add_argument("--opset", type=int, help="version of the operators (default: what the style and the bits need)")
    added.add_argument("--no-verify", dest="verify", action="store_false", help="only write the file")
    added.add_argument("-o", "--output", metavar="ONNX", help="default: FILE with the ending .onnx")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for what went wrong, 2 for wrong usage, 130 if interrupted."""
    options = parser().parse_args(arguments)
    from pege_fx.__main__ import run

    return run(options)


if __name__ == "__main__":
    sys.exit(main())
