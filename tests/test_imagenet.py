"""examples/imagenet.py on an ImageFolder of a few random images: what it writes, how it goes on, what it refuses."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pege_fx
from pege_fx.serialization import tensor_tree
from pege_fx.serialization.checkpoint import KIND

pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

FILE = Path(__file__).parent.parent / "examples" / "imagenet.py"
spec = importlib.util.spec_from_file_location("imagenet_example", FILE)
assert spec is not None
assert spec.loader is not None
imagenet = importlib.util.module_from_spec(spec)
spec.loader.exec_module(imagenet)

OPTIONS = (
    "--model shufflenet_v2_x0_5 --method lsq --weights none --device cpu --image-size 64 --batch-size 4 --epochs 2 "
    "--workers 0 --log-every 1 --save-every 1"
)
FIXED = OPTIONS.split()


def make_folder(root: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for split, count in {"train": 5, "val": 3}.items():
        for label in ("blue", "red"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                image = torch.randint(0, 256, (40, 48, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def go(folder: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the example: two steps an epoch, two epochs."""

    def run(*words: str, output: str = "out") -> dict[str, Any]:
        data = [] if "--data-dir" in words else ["--data-dir", str(folder)]
        results: dict[str, Any] = imagenet.main([*FIXED, "--output", str(tmp_path / output), *data, *words])
        return results

    return run


def state(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = tensor_tree.read(path / "state.safetensors", KIND)
    return tree


def test_a_run_trains_and_says_so(go: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = go("--distill", "0.3")
    assert results == json.loads((tmp_path / "out/results.json").read_text())
    assert results["finished"]
    assert [row["epoch"] for row in results["history"]] == [1, 2]
    assert (tmp_path / "out/history.csv").read_text().startswith("epoch,loss,p,top1,seconds")
    out = capsys.readouterr().out
    assert "epoch 1/2  step 2/2  loss" in out
    assert "images/s  ETA" in out
    assert pege_fx.checkpoint_info(tmp_path / "out/state.safetensors").extra["epoch"] == 2


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_died_ends_like_one_that_did_not(
    go: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    whole = go(output="whole")
    calls: list[int] = []

    def dying(self: pege_fx.PEGEScheduler) -> None:
        calls.append(self.t)
        if len(calls) > steps:
            raise MemoryError

    with monkeypatch.context() as patch:
        step = pege_fx.PEGEScheduler.step
        patch.setattr(pege_fx.PEGEScheduler, "step", lambda self: (dying(self), step(self)))
        with pytest.raises(MemoryError):
            go(output="parts")
    parts = go(output="parts")
    one, other = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert all(value.isfinite().all() for value in one["model"].values())
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert [row["top1"] for row in parts["history"]] == [row["top1"] for row in whole["history"]]


def test_two_processes_train_under_torchrun(folder: Path, tmp_path: Path) -> None:
    words = [*FIXED, "--data-dir", str(folder), "--output", str(tmp_path / "two"), "--parallel", "fsdp", "--epochs", "1"]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(FILE)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two/results.json").read_text())["processes"] == 2
    one = imagenet.main([*words, "--output", str(tmp_path / "one")])
    two = json.loads((tmp_path / "two/results.json").read_text())
    assert one["history"][0]["p"] == two["history"][0]["p"]
    assert state(tmp_path / "one")["scheduler"] == state(tmp_path / "two")["scheduler"]


def test_the_parts_of_a_batch_make_up_that_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(imagenet.Batches(10, 4, 0))
    parts = []
    for rank in range(2):
        monkeypatch.setattr(imagenet, "rank_and_size", lambda rank=rank: (rank, 2))
        parts.append(list(imagenet.Batches(10, 4, 0)))
    assert [one + other for one, other in zip(*parts, strict=True)] == whole
    assert len({index for batch in whole for _, index in batch}) == 8
    evaluation = imagenet.Batches(10, 4, None)
    assert [index for part in evaluation for _, index in part] == [2, 3, 6, 7, 0, 1]  # filled up by the first images


# --- what it refuses -----------------------------------------------------------------------------------------


def refused(go: Callable[..., Any], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        go(*words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_data_is_named_in_one_line(go: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "train does not exist: --data-dir takes an ImageFolder" in refused(go, capsys, "--data-dir", str(tmp_path / "no"))
    (tmp_path / "empty/train").mkdir(parents=True)
    assert "Couldn't find any class folder" in refused(go, capsys, "--data-dir", str(tmp_path / "empty"))
    root = make_folder(tmp_path / "damaged")
    (root / "train" / "green").mkdir()
    assert "Found no valid file for the classes green" in refused(go, capsys, "--data-dir", str(root))
    (root / "train" / "green").rename(root / "green")
    for path in (root / "train" / "red").iterdir():
        path.write_text("not an image")
    line = refused(go, capsys, "--data-dir", str(root))
    assert "is no image that can be read" in line
    assert "give --on-corrupt skip" in line
    assert go("--data-dir", str(root), "--on-corrupt", "skip", "--epochs", "1", output="skip")["finished"]
    (root / "val" / "red").rename(root / "val" / "pink")
    assert "pink, red must be a class of train/ and of val/" in refused(go, capsys, "--data-dir", str(root))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--batch-size 100", "lower --batch-size"),
        ("--model resnet17", "--model resnet17 --weights none"),
        ("--weights nowhere.pt", "give none, DEFAULT, or a state_dict"),
        ("--bits W9A2", "bits=9 is not a whole number from 2 to 8"),
    ],
)
def test_wrong_options_are_one_line(
    go: Callable[..., Any], capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert message in refused(go, capsys, *words.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(go: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cuda: PyTorch sees no GPU" in refused(go, capsys, "--device", "cuda")


def test_a_checkpoint_of_other_settings_is_refused(go: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    go("--epochs", "1")
    assert "was made with bits=W4A4, not W2A2: give another --output" in refused(go, capsys, "--epochs", "1", "--bits", "W2A2")


@pytest.mark.parametrize("recipe", imagenet.RECIPES)
def test_a_recipe_is_one_command(recipe: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = imagenet.RECIPES[recipe]
    if published.options["model"].startswith("timm:"):
        pytest.importorskip("timm")
    words = f"--recipe {recipe} --data-dir {folder} --output {tmp_path} --device cpu --workers 0".split()
    small = ["--weights", "none", "--image-size", "32", "--batch-size", "4", "--epochs", "1"]
    result = imagenet.main([*words, *small])
    assert result["finished"]
    assert result["published"]["top1"] == published.top1
    assert f"recipe {recipe}: top-1 {published.top1} % in {published.source}" in capsys.readouterr().out
    given = {"epochs": 1, "batch_size": 4}
    assert {name: result["settings"][name] for name in published.options if name in result["settings"]} == {
        name: value for name, value in (published.options | given).items() if name in result["settings"]
    }
    gm_bits = int(published.options["bits"][1])
    sites = pege_fx.checkpoint_info(tmp_path / "state.safetensors").sites
    assert sum(f"bits={gm_bits}" in spec for spec in sites.values()) > 10
    assert sum("bits=8" in spec for spec in sites.values()) in range(2, 6)  # weights and inputs of the ends


def test_scales_with_an_optimizer_of_their_own_and_freezing_go_on_where_they_were(
    go: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "--quantizer-optimizer",
        "adam",
        "--quantizer-lr",
        "0.01",
        "--freeze",
        "0.002",
        "0.0001",
        "--dampen",
        "0",
        "0.1",
        "--method",
        "lsq",
    ]
    whole = go(*words, output="whole")
    run_epoch = imagenet.Training.run_epoch

    def dying(self: Any) -> None:
        if self.epoch == 1:
            raise MemoryError
        run_epoch(self)

    monkeypatch.setattr(imagenet.Training, "run_epoch", dying)
    with pytest.raises(MemoryError):
        go(*words, output="again")
    monkeypatch.setattr(imagenet.Training, "run_epoch", run_epoch)
    again = go(*words, output="again")
    assert [row["loss"] for row in whole["history"]] == [row["loss"] for row in again["history"]]
    assert len(again["history"]) == 2
