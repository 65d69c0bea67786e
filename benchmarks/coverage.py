"""Which models pege_fx takes, and how much of their work it quantizes: make coverage, or python benchmarks/coverage.py

Every row runs in a process of its own with a time limit. Rows that are in the results already are kept (--rerun: made
anew); the table in docs/ is written from the results. --only takes patterns: --only 'timm/*,*detr*'.
"""

import argparse
import fnmatch
import json
import multiprocessing
import platform
import queue
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # not this folder: another package is called coverage

from benchmarks import zoo  # noqa: E402
from benchmarks.checks import CLAIMS, POLICY, check, passes, share  # noqa: E402
from benchmarks.zoo import vision  # noqa: E402

LIBRARIES = ("torch", "torchvision", "timm", "transformers", "pege_fx")
LAYERS = ("convolution", "linear")
ENOUGH = 0.99
EXPORTED, DEPLOYED, VERIFIED = ("classification", "segmentation"), ("converts", "exports", "verified"), ("exact", "ties")
PRELOADED = ["torch", "torchvision", "timm", "transformers", "benchmarks.zoo", "benchmarks.checks"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="patterns of names, with commas between")
    parser.add_argument("--rerun", action="store_true", help="make rows anew that are there")
    parser.add_argument("--failed", action="store_true", help="make rows anew that failed, or have less than 99 %%")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for a row")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/coverage.json")
    parser.add_argument("--table", type=Path, default=ROOT / "docs/coverage.md")
    parser.add_argument(
        "--exports", type=Path, default=ROOT / "benchmarks/results/exports.json", help="of benchmarks/exports.py"
    )
    args = parser.parse_args()
    known = json.loads(args.output.read_text())["rows"] if args.output.exists() else {}
    rows: dict[str, Any] = {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for name in zoo.cases():
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in args.only.split(","))
        stale = name not in known or args.rerun or (args.failed and not is_good(known[name]))
        if wanted and stale:
            known[name] = in_process(context, name, args.timeout) | {"commit": commit}
            print(line(name, known[name]), flush=True)
            args.output.write_text(json.dumps({**machine(), "rows": known}, indent=1) + "\n")
        if name in known:
            rows[name] = known[name]
    exports = json.loads(args.exports.read_text())
    result = {**machine(), "rows": rows}  # in the order of the zoo, and no row of a model that is gone
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.table.write_text(document(result, exports))


def in_process(context: Any, name: str, timeout: float) -> dict[str, Any]:
    """Make a row in a process of its own; a crash or a timeout is a row too."""
    results = context.Queue()
    process = context.Process(target=_send, args=(name, results), daemon=True)
    process.start()
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            try:
                row: dict[str, Any] = results.get(timeout=1.0)
                return row
            except queue.Empty:
                if not process.is_alive():
                    return _failed(name, f"its process ended with {process.exitcode}")
        return _failed(name, f"not done after {timeout:.0f} seconds")
    finally:
        process.kill()
        process.join()


def _send(name: str, results: Any) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        results.put(check(zoo.cases()[name]))
    except Exception as error:
        results.put(_failed(name, f"{type(error).__name__}: {error}"))


def _failed(name: str, what: str) -> dict[str, Any]:
    return {"family": zoo.cases()[name].family, "passed": [], "problems": {"run": what}}


def is_good(row: dict[str, Any]) -> bool:
    """Tell whether a row passes and has 99 % of its convolution and linear work quantized."""
    return passes(row) and (share(row, *LAYERS) or 0.0) >= ENOUGH


def percent(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.4g}" if value < 1.0 else "100"


def line(name: str, row: dict[str, Any]) -> str:
    shares = f"{percent(share(row, *LAYERS)):>6} {percent(share(row, 'product')):>6}"
    problems = "; ".join(f"{claim}: {what}" for claim, what in row["problems"].items())
    return f"{'ok ' if is_good(row) else 'BAD'} {name:45} {shares} {row.get('seconds', 0):6.1f} s {row.get('rungs')} {problems}"


def machine() -> dict[str, Any]:
    """Where and with what the rows were made."""
    return {
        "device": f"one thread of {platform.machine()}",
        "python": platform.python_version(),
        "policy": POLICY,
        "versions": {name: metadata.version(name) for name in LIBRARIES if util.find_spec(name) is not None},
    }


FAMILIES = ("classification", "segmentation", "detection", "video", "optical flow", "timm", "transformers", "own")

PAGE = """# Which models it takes

Made by `make coverage` (`benchmarks/coverage.py`) from
[benchmarks/results/coverage.json](../benchmarks/results/coverage.json), which has the commit and the reasons of every row; do
not edit. On {device}: Python {python}, {versions}.

Every model is untrained and small where its builder allows, is prepared with `"{policy}"` (first and last layer: 8 bits) in
training mode, and has to keep these promises:

{claims}

**Share quantized** is measured from outside: a dispatch mode below autograd looks at both operands of every convolution and
matrix product that runs in evaluation, in graphs and in code that stays Python, and counts its multiply-accumulates if all
values of both lie on a uniform grid of at most 8 bits (a weight may have one for each channel). *Layers* are convolutions and
products with a parameter; *products* are those of two activations, as in attention. Grids are found by search, not asked for.
Two things stay in float by what they are: probabilities inside of torch's fused `scaled_dot_product_attention` (half of its
work), and hidden states inside of `torch.lstm` and `torch.gru`, whose weights are quantized.

**Rung**: how the model was captured: `symbolic`; `specialised` on the example inputs; `python`: the model's own code runs, with
graphs inside. "+ n python" are modules inside that stay Python.

**Converts, exports, verified**: torchvision's classifiers and segmenters by `benchmarks/exports.py`, from
[benchmarks/results/exports.json](../benchmarks/results/exports.json). `convert` equals `gm.eval()` bit for bit;
`export_onnx` writes it; the verdict of `verify_export` in ONNX Runtime: *exact*, every code is equal; *ties*, those that
differ lie on the border between two codes, where float rounding decides. {exported}

{totals}
{tables}
## Not in the table

{skipped}
"""
SKIPPED = """- {giants} of torchvision, above 190 M parameters: their smaller siblings are the same code.
- torchvision's `quantized_*` builders: the networks above with torch.ao's stubs.
"""


def document(result: dict[str, Any], exports: dict[str, dict[str, Any]]) -> str:
    """Return the page for people: from the rows of this file, and from those of ``benchmarks/exports.py`` by model."""
    rows: dict[str, dict[str, Any]] = result["rows"]
    families = {f: {n: row for n, row in rows.items() if row["family"] == f} for f in FAMILIES}
    head = "| family | models | all promises kept | ≥ 99 % of layers | no part stays Python |"
    totals = [head, "|---|---|---|---|---|"]
    for family, members in [*families.items(), ("all", rows)]:
        counts = (
            len(members),
            sum(map(passes, members.values())),
            sum((share(row, *LAYERS) or 0.0) >= ENOUGH for row in members.values()),
            sum("rungs" in row and "python" not in row["rungs"] for row in members.values()),
        )
        totals.append(f"| {family} | {' | '.join(map(str, counts))} |")
    tables = [_table(family, members, exports if family in EXPORTED else {}) for family, members in families.items() if members]
    return PAGE.format(
        **{key: result[key] for key in ("device", "python", "policy")},
        versions=", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        claims="\n".join(f"- *{name}*: {words}" for name, words in CLAIMS.items()),
        exported=_exported(exports),
        totals="\n".join(totals) + "\n",
        tables="\n".join(tables),
        skipped=SKIPPED.format(giants=", ".join(f"`{name}`" for name in sorted(vision.GIANTS))).strip(),
    )


def _table(family: str, rows: dict[str, dict[str, Any]], exports: dict[str, dict[str, Any]]) -> str:
    columns = ["model", "rung", "layers, %", "products, %", "promises", *(DEPLOYED if exports else ()), "remarks"]
    lines = [f"## {family}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, row in rows.items():
        model = name.partition("/")[2]
        cells = [
            model,
            _rung(row),
            percent(share(row, *LAYERS)),
            percent(share(row, "product")),
            f"{len(row['passed'])}/{len(CLAIMS)}",
            *(_deployed(exports.get(model)) if exports else ()),
            _remarks(row).replace("|", "\\|").replace("\n", " "),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _deployed(row: dict[str, Any] | None) -> tuple[str, str, str]:
    """The cells of ``DEPLOYED``; a dash for what was not tried, or not reached."""
    if row is None or "error" in row:
        return "–", "–" if row is None else "**no**", "–"
    verdict = row["verdict"]
    return "yes" if row["converts"] else "**no**", "yes", f"**{verdict}**" if verdict not in VERIFIED else verdict


def _exported(exports: dict[str, dict[str, Any]]) -> str:
    verified = [name for name, row in exports.items() if row.get("verdict") in VERIFIED]
    giants = [f"`{name}`" for name in sorted(vision.GIANTS & set(verified))]
    beyond = f"; with {', '.join(giants)}, which have no row below" if giants else ""
    return f"{len(verified)} of the {len(exports)} that were tried are verified{beyond}."


def _rung(row: dict[str, Any]) -> str:
    root = row.get("root rung", "–")
    inside = row.get("rungs", {}).get("python", 0) - (root == "python")
    return f"{root} + {inside} python" if inside > 0 else root


def _remarks(row: dict[str, Any]) -> str:
    """What failed; where not enough is quantized, why, and the largest that is not."""
    words = [f"**{claim}**: {what[:240]}" for claim, what in row["problems"].items()]
    words += [row[key] for key in ("note", "not pickled") if key in row]
    if (share(row, *LAYERS) or 1.0) < ENOUGH:
        alone = share(row, *LAYERS, what="one operand") or 0.0
        words += (
            [f"hidden states inside of a recurrent layer are the float operand of {percent(alone)} %"]
            if row["recurrent"]
            else []
        )
        if row["never called"]:
            words.append(f"Python reads the weights of modules that it does not call: {', '.join(row['never called'])}")
        words.append(f"largest in float: {next(iter(row['missed']))}")
    return "; ".join(words)


if __name__ == "__main__":
    main()
