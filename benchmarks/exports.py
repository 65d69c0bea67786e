"""Every torchvision classifier and segmenter: converted, written as ONNX, and verified in ONNX Runtime.

    python benchmarks/exports.py                      # all but the giants; results/exports.json
    python benchmarks/exports.py resnet18 swin_t      # these, added to the file

Random weights with BatchNorm statistics of the example inputs, W4A4 with 8 bits at both ends. A row says whether `convert`
equals `gm.eval()` to the last bit, the verdict of `verify_export`, how many codes differ and how far from a tie the worst is.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import pege_fx

RESULTS = Path(__file__).parent / "results" / "exports.json"
SEGMENTERS = torchvision.models.list_models(module=torchvision.models.segmentation)
CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
GIANTS = {"regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32"}
SIZES = {"vit_h": 112, "vit": 224, "maxvit": 224, "swin_v2": 256, "swin_": 224, "inception": 299}


def model_and_inputs(name: str) -> tuple[nn.Module, Tensor]:
    """A model that its activations fit: BatchNorm statistics are those of the inputs, no head is all zeros."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights_backbone": None} if name in SEGMENTERS else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name == "vit_h_14":
        options["image_size"] = SIZES["vit_h"]  # a quarter of the tokens: 632 million parameters take long enough
    model = torchvision.models.get_model(name, weights=None, **options)
    x = torch.randn(4, 3, *[next((size for prefix, size in SIZES.items() if name.startswith(prefix)), 64)] * 2)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for norm in norms:
        norm.momentum = None
    if norms:
        with torch.no_grad():
            model.train()(x)
    if hasattr(model, "heads"):
        nn.init.normal_(model.heads.head.weight, std=0.03)
    return model.eval(), x


def tensors(result: Any) -> list[Tensor]:
    return list(result.values()) if isinstance(result, dict) else [result]


def check(name: str, style: Any, policy: str = "W4A4") -> dict[str, Any]:
    model, x = model_and_inputs(name)
    with torch.no_grad():
        gm = pege_fx.prepare(model, policy, (x,)).eval()
        deployed = pege_fx.convert(gm)
        converts = all(torch.equal(a, b) for a, b in zip(tensors(deployed(x)), tensors(gm(x)), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        start = time.perf_counter()
        size = pege_fx.export_onnx(deployed, path, (x[:1],), style=style)
        seconds = time.perf_counter() - start
        report = pege_fx.verify_export(deployed, path, [x[:3]])
    checks = report.checks.values()
    return {
        "converts": converts,
        "verdict": report.verdict,
        "steps": len(report.checks),
        "codes": sum(step.count for step in checks),
        "differing": sum(step.differing for step in checks),
        "excess": max((step.excess for step in checks), default=0.0),
        "first": report.plain.first,
        "top1": report.plain.top1,
        "top1_optimized": report.optimized.top1,
        "output_steps": report.output_steps,
        "bytes": size,
        "export_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--style", default="qdq")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = json.loads(RESULTS.read_text()) if options.models and RESULTS.exists() else {}
    for name in options.models or [name for name in CLASSIFIERS + SEGMENTERS if name not in GIANTS]:
        try:
            rows[name] = {"style": options.style, **check(name, options.style)}
        except Exception as error:
            rows[name] = {"style": options.style, "error": f"{type(error).__name__}: {error}"[:300]}
        print(name, rows[name], flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    verified = sum(row.get("verdict") in ("exact", "ties") for row in rows.values())
    print(f"{verified} of {len(rows)} verified")


if __name__ == "__main__":
    main()
