"""A pass of your own in the pipeline: what it does, seen in a diff; that it keeps the function, shown by a property test.

python examples/custom_pass.py [--output runs/custom_pass]

The pass swaps ReLU and max-pooling: max(relu(a), relu(b)) = relu(max(a, b)), bit for bit, and after a pooling of 2 x 2 a
ReLU has a quarter of the work.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from hypothesis import given, settings
from torch import nn
from torch.fx import GraphModule

import pege_fx
from pege_fx.testing import Case, assert_same_function, networks


def pool_before_relu(gm: GraphModule) -> None:
    """Let max-pooling come before ReLU where nothing else reads the ReLU's result."""
    modules = dict(gm.named_modules())
    for pool in list(gm.graph.nodes):
        if pool.op != "call_module" or not isinstance(modules[str(pool.target)], nn.MaxPool2d):
            continue
        (relu,) = pool.all_input_nodes
        if relu.op != "call_module" or not isinstance(modules[str(relu.target)], nn.ReLU):
            continue
        if len(relu.users) > 1:
            pool.meta["not_swapped"] = f"{relu} has {len(relu.users)} users"
            continue
        (source,) = relu.all_input_nodes
        pool.replace_all_uses_with(relu)
        pool.replace_input_with(relu, source)
        relu.replace_input_with(source, pool)
        pool.append(relu)


@settings(max_examples=30, deadline=None)
@given(networks(dims=(2,), inputs=(1,)))
def test_the_pass_keeps_the_function(case: Case) -> None:
    """A network of ``pege_fx.testing`` with the pattern in front of it; outputs and gradients are those without the pass."""
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), case.network)
    passes = pege_fx.prepare_passes("W8")
    with_pass = pege_fx.passes.Pipeline([pool_before_relu, *passes])
    plain, swapped = (pege_fx.prepare(model, "W8", case.inputs, passes=steps) for steps in (passes, with_pass))
    assert_same_function(plain, swapped, case.inputs)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/custom_pass"))
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3))
    x = torch.randn(2, 3, 12, 12)

    passes = pege_fx.prepare_passes("W4A4")
    passes.insert(0, pool_before_relu)
    print(passes)
    trace = pege_fx.trace_passes(model, "W4A4", (x,), passes=passes)
    print(f"\n{trace['pool_before_relu']}")
    trace["pool_before_relu"].draw(options.output / "custom_pass.png")

    gm = pege_fx.prepare(model, "W4A4", (x,), passes=passes)
    print(f"\n{pege_fx.summary(gm)}")
    test_the_pass_keeps_the_function()
    print("\nthe function is kept, in 30 networks")


if __name__ == "__main__":
    main()
