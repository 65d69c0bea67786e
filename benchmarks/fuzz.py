r"""A fuzz campaign: random networks, policies and modes through everything that a user does with them.

    python benchmarks/fuzz.py --minutes 30 --workers 2      # or make fuzz MINUTES=30
    python benchmarks/fuzz.py --seed 17                     # one batch again, as it was

A network is prepared, explained, trained for some steps, saved, loaded into another one that goes on from there, converted,
stored, exported and verified. At every stage it works, or raises a ``PegeError`` that says why; whatever else happens is a
fault. Hypothesis shrinks it, and it is printed as code that makes it again. A batch of networks has one seed and is the same
in every run with the same versions.
"""

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import pege_fx
from pege_fx import PegeError, PEGEScheduler, QuantPolicy
from pege_fx.testing import graph_modules, networks, policies

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
BATCH = 50
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


class FaultError(AssertionError):
    """What a network showed that it must not."""


@dataclass(frozen=True)
class Plan:
    """What is done with a network."""

    policy: QuantPolicy
    batch_norm: str = "train"
    with_examples: bool = True
    steps: int = 2
    style: str | None = None
    packed: bool = False
    seed: int = 0


PLANS = st.builds(
    Plan,
    policies(),
    st.sampled_from(["train", "freeze", "keep"]),
    st.booleans(),
    st.sampled_from([2, 1, 3, 0]),
    st.sampled_from([None, None, None, "qdq", "qcdq", "qonnx"]),
    st.booleans(),
    st.integers(0, 2**16),
)


@dataclass
class Attack:
    """One network, and how far it came."""

    plan: Plan
    inputs: tuple[Tensor, ...]
    folder: Path
    reached: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say which stage another error than ours came from."""
        try:
            yield
        except (PegeError, FaultError):
            raise
        except Exception as error:
            raise FaultError(f"{name}: {type(error).__name__}: {error}") from error
        self.reached.append(name)

    def prepared(self, model: nn.Module) -> GraphModule:
        examples = self.inputs if self.plan.with_examples else None
        gm = pege_fx.prepare(model, self.plan.policy, examples, batch_norm=self.plan.batch_norm, seed=self.plan.seed)
        if not self.plan.with_examples:
            pege_fx.calibrate(gm, [self.inputs])
        return gm

    def explained(self, model: nn.Module) -> None:
        """Every layer is quantized, or the reason why not is there."""
        examples = self.inputs if self.plan.with_examples else None
        found = pege_fx.explain(model, self.plan.policy, examples, batch_norm=self.plan.batch_norm)
        for path, module in model.named_modules():
            if isinstance(module, LAYERS) and not str(found[path]).strip():
                raise FaultError(f"explain says nothing of {path}")
        for operation in found.plan.operations:
            for edge in operation.edges:
                if edge.spec is None and not (edge.reason or edge.rule):
                    raise FaultError(f"{operation.path}: {edge.operand} stays float without a reason")

    def trained(self, gm: GraphModule, done: int, loaded: Path | None = None) -> list[Tensor]:
        """Train from step ``done`` to the end; the state after it."""
        gm.train()
        optimizer = torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
        scheduler = PEGEScheduler(gm, total_steps=self.plan.steps)
        if loaded is not None:
            pege_fx.load(loaded, gm, scheduler=scheduler, optimizer=optimizer)
        else:
            torch.manual_seed(self.plan.seed)
        for step in range(done, self.plan.steps):
            if step == self.plan.steps - 1 and loaded is None:
                pege_fx.save(gm, self.folder / "state", scheduler=scheduler, optimizer=optimizer)
            optimizer.zero_grad()
            y = gm(*self.inputs)
            loss = sum(part.square().mean() for part in ([y] if isinstance(y, Tensor) else y))
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.backward()
            optimizer.step()
            scheduler.step()
        return [value.clone() for value in gm.state_dict().values()]

    def broken(self, path: Path, read: Callable[[Path], Any]) -> None:
        """A file cut off anywhere is refused."""
        whole = path.read_bytes()
        torn = self.folder / "torn"
        torn.write_bytes(whole[: self.plan.seed * 7919 % len(whole)])
        try:
            read(torn)
        except PegeError:
            return
        raise FaultError(f"{path.name} cut off at {torn.stat().st_size} of {len(whole)} bytes was read")

    def __call__(self, model: nn.Module) -> None:
        with self.stage("explain"):
            self.explained(model)
        with self.stage("prepare"):
            gm = self.prepared(model)
        if self.plan.steps and any(p.requires_grad for p in gm.parameters()):
            with self.stage("train"):
                ended = self.trained(gm, 0)
            with self.stage("resume"):
                other = self.trained(self.prepared(model), self.plan.steps - 1, self.folder / "state")
                if not all(torch.equal(a, b) or a.isnan().any() for a, b in zip(ended, other, strict=True)):
                    raise FaultError("resumed training ends elsewhere")
                self.broken(self.folder / "state", lambda path: pege_fx.load(path, gm))
        if not all(value.isfinite().all() for value in gm.state_dict().values() if value.is_floating_point()):
            self.reached.append("diverged")
            return
        with torch.no_grad():
            with self.stage("convert"):
                expected = gm.eval()(*self.inputs)
                deployed = pege_fx.convert(gm, packed=self.plan.packed)
                same("the converted model", deployed(*self.inputs), expected)
            with self.stage("store"):
                pege_fx.save_deployed(deployed, self.folder / "deployed")
                same("the stored model", pege_fx.load_deployed(self.folder / "deployed")(*self.inputs), expected)
                self.broken(self.folder / "deployed", pege_fx.load_deployed)
        if self.plan.style is not None:
            with self.stage("export"):
                pege_fx.export_onnx(deployed, self.folder / "model.onnx", self.inputs, style=self.plan.style)
                report = pege_fx.verify_export(deployed, self.folder / "model.onnx", [self.inputs])
                if not report.ok:
                    raise FaultError(f"the exported model differs:\n{report}")


def same(what: str, found: Any, expected: Any) -> None:
    """Equal bit for bit, NaN to NaN."""
    pairs = [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))
    for a, b in pairs:
        if not torch.equal(a.nan_to_num(1.5), b.nan_to_num(1.5)):
            raise FaultError(f"{what} differs from the prepared one in evaluation by {(a - b).abs().max()}")


def batch(seed: int, count: int = BATCH) -> tuple[Counter[str], str]:
    """Attack the networks of one seed; what happened to them, and the fault, "" if there was none."""
    seen: Counter[str] = Counter()
    last = ""  # when Hypothesis is done, it is the smallest

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(st.one_of(networks(), graph_modules()), PLANS)
    def attack(case: Any, plan: Plan) -> None:
        nonlocal last
        last = f"case = {case!r}\nplan = {plan!r}"
        model, inputs = case
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = Attack(plan, tuple(inputs), Path(folder))
            try:
                trial(model)
                seen["whole"] += 1
            except PegeError as error:
                seen[f"refused after {trial.reached[-1] if trial.reached else 'nothing'}: {type(error).__name__}"] += 1
                if not str(error).strip():
                    raise FaultError(f"{type(error).__name__} says nothing") from error
            seen.update(trial.reached)

    try:
        attack()
    except Exception as error:
        return seen, f"{type(error).__name__}: {error}\n{last}"
    return seen, ""


def work(number: int, args: argparse.Namespace, until: float) -> tuple[Counter[str], dict[int, str]]:
    """Batch after batch, until the time is over."""
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    faults: dict[int, str] = {}
    seed = args.first + number
    while time.time() < until:
        seen, fault = batch(seed, args.batch)
        total += seen
        total["batches"] += 1
        if fault:
            faults[seed] = fault
            print(f"--- seed {seed}\n{fault}\n", flush=True)
        seed += args.workers
    return total, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=BATCH, help="networks of one seed")
    parser.add_argument("--first", type=int, default=0, help="the first seed of a campaign")
    parser.add_argument("--seed", type=int, help="one batch, and no campaign")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.seed is not None:
        torch.set_num_threads(1)
        seen, fault = batch(args.seed, args.batch)
        print(dict(seen))
        sys.exit(fault or 0)
    started = time.time()
    jobs = [(number, args, started + 60 * args.minutes) for number in range(args.workers)]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        parts = pool.starmap(work, jobs)
    total: Counter[str] = sum((part for part, _ in parts), Counter())
    faults = {seed: fault for _, found in parts for seed, fault in found.items()}
    refused = {name: count for name, count in sorted(total.items()) if name.startswith("refused")}
    networks_tried = total["whole"] + sum(refused.values())
    campaign = {"first seed": args.first, "batch": args.batch, "batches": total["batches"], "networks": networks_tried}
    campaign |= {"minutes": round((time.time() - started) / 60, 1), "workers": args.workers, "faults": faults}
    campaign |= {"stages": {name: n for name, n in total.items() if name not in refused and name != "batches"}}
    campaign |= {"refused": refused, "torch": torch.__version__, "python": platform.python_version()}
    campaign |= {"hypothesis": hypothesis.__version__, "pege_fx": pege_fx.__version__}
    stored = json.loads(args.output.read_text()) if args.output.exists() else []
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps([*stored, campaign], indent=1) + "\n")
    print(json.dumps({key: value for key, value in campaign.items() if key != "faults"}, indent=1))
    sys.exit(f"{len(faults)} of {total['batches']} batches found a fault" if faults else 0)


if __name__ == "__main__":
    main()
