"""From a trained model to files that other tools run, each held against the model it came from.

    python examples/deploy.py --output runs/deploy

Trains a small network on scikit-learn's digits in W2A4 for a few seconds, converts it, and then: stores it packed and reads
it back; writes ONNX in three styles and verifies each in ONNX Runtime; runs the reference engine, in integers; exports a
PyTorch program. Prints one table of bytes and accuracy. Needs the extras `examples` and `export`.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pege_fx
from pege_fx import QuantPolicy


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and labels: 1257 to train on, 540 to test on."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1257], y[:1257], x[1257:], y[1257:]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def train(gm: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    scheduler = pege_fx.PEGEScheduler(gm, total_steps=epochs)
    optimizer = torch.optim.Adam(pege_fx.parameter_groups(gm, lr=2e-3, quantizer_lr=1e-3))
    gm.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(gm(x[batch]), y[batch]).backward()
            optimizer.step()
        scheduler.step()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/deploy"))
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()

    gm = pege_fx.prepare(network(), QuantPolicy.parse("W2A4"), (x[:64],))
    train(gm, x, y, options.epochs)
    gm.eval()

    deployed = pege_fx.convert(gm)
    rows: list[tuple[str, int, Tensor]] = []
    with torch.no_grad():
        rows.append(("trained, evaluated", 0, gm(test_x)))
        rows.append(("converted", pege_fx.size_report(deployed).quantized_bytes, deployed(test_x)))

        path = options.output / "model.safetensors"
        size = pege_fx.save_deployed(deployed, path)
        rows.append(("stored and read back", size, pege_fx.load_deployed(path)(test_x)))

        engine = pege_fx.integer_engine(deployed)
        rows.append(("reference engine", 0, engine(test_x)))

        program = pege_fx.to_program(deployed, (test_x[:2],))
        rows.append(("torch.export", 0, program.module()(test_x)))

    print(f"{'':22}{'bytes':>10}{'accuracy':>10}  largest difference")
    for name, size, logits in rows:
        accuracy = float((logits.argmax(1) == test_y).float().mean())
        print(f"{name:22}{size or '':>10}{accuracy:>10.2%}  {float((logits - rows[0][2]).abs().max()):.1e}")
    print(f"reference engine: {pege_fx.integer_coverage(engine)}\n")

    for style in ("qdq", "qcdq", "qonnx"):
        path = options.output / f"model-{style}.onnx"
        size = pege_fx.export_onnx(deployed, path, (test_x[:1],), style=style)
        report = pege_fx.verify_export(deployed, path, test_x.split(128))
        print(f"{path.name}, {size:,} bytes\n{report}\n")


if __name__ == "__main__":
    main()
