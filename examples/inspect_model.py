"""Read what a policy does to a model, before and after: explain, passes, summary, picture, report, mixed precision.

python examples/inspect_model.py --output runs/inspect [--model torchvision:resnet18] [--input 2x3x64x64] [--policy W4A4]

About a minute for resnet18 on two cores of a shared x86-64 machine. The model has random weights and sees noise: the
numbers show what one gets, not what is true of a trained network.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import pyplot

import pege_fx
from pege_fx.__main__ import load_model, load_policy, parse_input


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision:resnet18")
    parser.add_argument("--policy", default="W4A4")
    parser.add_argument("--input", type=parse_input, default="2x3x64x64")
    parser.add_argument("--passes", default="layer1_0_*", help="draw what happens to these nodes")
    parser.add_argument("--output", type=Path, default=Path("runs/inspect"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, policy, x = load_model(options.model), load_policy(options.policy), options.input

    # 1. Before anything is changed: what would happen to each operation, by which rule?
    explanation = pege_fx.explain(model, policy, (x,))
    print(explanation)
    print("\nIn full, for the first and the last:")
    print(explanation[explanation.operations[0].path])
    print(explanation[explanation.operations[-1].path])

    # 2. What does each pass do to the graph?
    trace = pege_fx.trace_passes(model, policy, (x,))
    for name, changes in trace.steps:
        print(f"\n{name}: {str(changes).splitlines()[0]}")
    gm = pege_fx.prepare(model, policy, (x,))
    traced = torch.fx.symbolic_trace(model)
    pege_fx.diff(traced, gm).draw(options.output / "diff.png", options.passes)

    # 3. What has it become? Tables by module, as text and as data.
    summary = pege_fx.summary(gm, depth=1)
    print(f"\n{summary}")
    (options.output / "summary.json").write_text(summary.to_json())

    # 4. The graph to look at: as a picture, and as a page with histograms that opens offline.
    pege_fx.draw(gm, options.output / ("graph.png" if shutil.which("dot") else "graph.dot"))
    pege_fx.report(gm, options.output / "report.html", batches=[x])

    # 5. Which sites cost most, and what could be spent where?
    found = pege_fx.sensitivity(gm, [x], bits=(2, 3, 4, 8))
    print("\n".join(str(found).splitlines()[:12]))
    found.plot(most=20).figure.savefig(options.output / "sensitivity.png", dpi=80)
    size = sum(edge.elements for operation in summary.operations for edge in operation.weights) * 3.5 / 8
    mixed = found.suggest(size=size)
    mixed.to_toml(options.output / "mixed.toml")
    print(f"\nAt most 3.5 bits a weight, {len(mixed.rules)} rules in {options.output / 'mixed.toml'}:")
    print(pege_fx.summary(pege_fx.prepare(model, mixed, (x,)), depth=1))
    pyplot.close("all")


if __name__ == "__main__":
    main()
