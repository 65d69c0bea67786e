"""What low bits buy on this CPU: bytes and latency of float, int8, W4 and W2 in ONNX Runtime and in torch.

    python benchmarks/deploy.py            # two models, one thread, a batch of one; results/deploy.json

Every row is one file by the same exporter, so that they differ in nothing but the number formats. Medians of the
processor time of interleaved runs in one process, as ratios to ONNX Runtime in float.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torchvision
from torch import Tensor

import pege_fx
from pege_fx import QuantPolicy, Rule

RESULTS = Path(__file__).parent / "results" / "deploy.json"
FLOAT = QuantPolicy((Rule(weight=None, input=None),))
# name, policy, integer bias (what ONNX Runtime's integer kernels ask for)
FORMATS: list[tuple[str, Any, bool]] = [
    ("float", FLOAT, False),
    ("W8A8", "W8A8", False),
    ("W8A8, integer bias", "W8A8", True),
    ("W4A8", "W4A8", False),
    ("W4A4", "W4A4", False),
    ("W2A2", "W2A2", False),
]


def timed(call: Callable[[], Any]) -> float:
    start = time.process_time()  # of the processor: others share the machine
    call()
    return time.process_time() - start


def session(path: Path) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def measure(name: str, size: int, repeats: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, size, size)
    calls: dict[tuple[str, str], Callable[[], Any]] = {("float", "torch"): lambda: model(x)}
    rows: dict[str, dict[str, Any]] = {}
    for label, policy, integer_bias in FORMATS:
        deployed = pege_fx.convert(pege_fx.prepare(model, policy, (x,)).eval(), integer_bias=integer_bias)
        path = folder / f"{label}.onnx"
        rows[label] = {
            "onnx_bytes": pege_fx.export_onnx(deployed, path, (x,)),
            "stored_bytes": pege_fx.save_deployed(deployed, folder / "model.safetensors"),
        }
        calls[label, "onnxruntime"] = _bound(session(path), x)
        if label != "float":
            calls[label, "torch"] = lambda deployed=deployed: deployed(x)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    with torch.no_grad():
        for call in calls.values():
            call()
        for _ in range(repeats):
            for key, call in calls.items():
                times[key].append(timed(call))
    base = statistics.median(times["float", "onnxruntime"])
    for (label, runtime), values in times.items():
        rows[label][f"{runtime}_ms"] = round(1e3 * statistics.median(values), 2)
        rows[label][f"{runtime}_ratio"] = round(statistics.median(values) / base, 2)
    return {"input": size, "rows": rows}


def _bound(run: onnxruntime.InferenceSession, x: Tensor) -> Callable[[], Any]:
    feed = {run.get_inputs()[0].name: x.numpy()}
    return lambda: run.run(None, feed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "machine": f"one thread of a shared {platform.machine()} machine, processor time",
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "models": {},
    }
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            results["models"][name] = measure(name, options.size, options.repeats, Path(folder))
        print(name, f"{options.size}x{options.size}, batch 1")
        print(f"{'':20}{'ONNX MB':>9}{'ORT':>7}{'torch':>7}   over ONNX Runtime in float")
        for label, row in results["models"][name]["rows"].items():
            print(f"{label:20}{row['onnx_bytes'] / 1e6:>9.2f}{row['onnxruntime_ratio']:>7}{row['torch_ratio']:>7}")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
