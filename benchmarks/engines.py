"""What engines make of eight bits: time over float in the same engine, and the layers that run in integers.

    python benchmarks/engines.py    # two models, one thread, batch 1; results/engines.json and the table of docs/deploy.md

Ours is trained with the engine's policy and exported for it; the other is what the engine's own quantizer makes of the float
file. Medians of the processor time of interleaved runs in one process.
"""

import argparse
import json
import platform
import re
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torchvision
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from torch import Tensor

import pege_fx
from pege_fx import QuantPolicy, Rule, testing
from pege_fx.engines import engine_of, export, verify

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "engines.json", ROOT / "docs" / "deploy.md"
FLOAT = QuantPolicy((Rule(weight=None, input=None),))
TABLE = re.compile(r"(?<=<!-- engines.json -->\n).*?(?=<!-- end -->)", re.DOTALL)
NAMES = {"ours": 'ours, `engine="onnxruntime"`', "plain": "ours, `W8A8`", "own": "its `quantize_static`"}


class OneBatch(CalibrationDataReader):
    """The example as calibration data."""

    def __init__(self, name: str, x: Tensor) -> None:
        self.left = [{name: x.numpy()}]

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


def files(name: str, x: Tensor, folder: Path) -> tuple[dict[str, Path], str]:
    """Write a model in float and in eight bits, by us and by the engine's quantizer; return the paths and our verdict."""
    torch.manual_seed(0)
    model = testing.as_trained(torchvision.models.get_model(name, weights=None).eval(), 0)
    paths = {label: folder / f"{label}.onnx" for label in ("float", *NAMES)}
    verdict = ""
    for label, policy in (("float", FLOAT), ("plain", "W8A8"), ("ours", QuantPolicy.parse("W8A8", engine="onnxruntime"))):
        gm = pege_fx.prepare(model, policy, (x,)).eval()
        deployed = pege_fx.convert(gm, integer_bias=label == "ours")
        if label == "ours":
            export(deployed, paths[label], (x,))
            verdict = verify(deployed, paths[label], [x]).verdict
        else:
            pege_fx.export_onnx(deployed, paths[label], (x,))
    (given,) = session(paths["float"]).get_inputs()
    quantize_static(
        paths["float"], paths["own"], OneBatch(given.name, x), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return paths, verdict


def session(path: Path) -> onnxruntime.InferenceSession:
    """The file in one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure(name: str, size: int, repeats: int) -> dict[str, Any]:
    """Return time over float and profile of each file of a model."""
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        paths, verdict = files(name, x, Path(folder))
        runs = {label: session(path) for label, path in paths.items()}
        feed = {runs["float"].get_inputs()[0].name: x.numpy()}
        times: dict[str, list[float]] = {label: [] for label in runs}
        for _ in range(repeats):
            for label, run in runs.items():
                start = time.process_time()  # of the processor: others share the machine
                run.run(None, feed)
                times[label].append(time.process_time() - start)
        base = statistics.median(times["float"])
        rows = {}
        for label in NAMES:
            profile = engine_of("onnxruntime").profile(paths[label], x)
            ratio = round(statistics.median(times[label]) / base, 3)
            rows[label] = {"over_float": ratio, "integer": profile.integer, "floating": profile.floating}
    return {"input": size, "float_ms": round(1e3 * base, 2), "verdict": verdict, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    models = results["models"]
    lines = [f"| over float in ONNX Runtime | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    for label, name in NAMES.items():
        cells = []
        for found in models.values():
            row = found["rows"][label]
            cells.append(f"{row['over_float']:.2f} ({row['integer']} of {row['integer'] + row['floating']} layers in integers)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| our verdict | {' | '.join(found['verdict'] for found in models.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    features = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = ", ".join(word for word in ("avx512_vnni", "amx_int8") if word in features) or "no VNNI"
    results: dict[str, Any] = {
        "machine": f"one thread of a shared {platform.machine()} machine ({found}), processor time",
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "models": {name: measure(name, options.size, options.repeats) for name in options.models},
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(TABLE.sub(lambda _: table(results), PAGE.read_text()))
    print(table(results))


if __name__ == "__main__":
    main()
