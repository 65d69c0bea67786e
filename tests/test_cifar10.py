"""examples/cifar10.py on an ImageFolder of a few random images: what it writes, how it goes on, what it refuses."""

import importlib.util
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pege_fx

pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

FILE = Path(__file__).parent.parent / "examples" / "cifar10.py"
spec = importlib.util.spec_from_file_location("cifar10_example", FILE)
assert spec is not None
assert spec.loader is not None
cifar10 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cifar10)

PER_CLASS = {"train": 10, "test": 3}


def make_folder(root: Path) -> Path:
    """Two classes of noise: nothing to learn, so that the gradients stay alive."""
    generator = torch.Generator().manual_seed(0)
    for split, count in PER_CLASS.items():
        for label in ("blue", "red"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                image = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def go(folder: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run the example: two steps an epoch, one epoch in float and two quantized unless told otherwise."""

    def run(*words: str, output: str = "out") -> list[dict[str, Any]]:
        fixed = f"--device cpu --no-compile --batch-size 8 --float-epochs 1 --epochs 2 --output {tmp_path / output}".split()
        data = [] if "--data-dir" in words else ["--data-dir", str(folder)]
        results: list[dict[str, Any]] = cifar10.main([*fixed, *data, *words])
        return results

    return run


def weights(path: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return model


def assert_same_run(one: Path, other: Path) -> None:
    for phase in ("float", "qat"):
        a, b = weights(one / f"seed0/{phase}.pt"), weights(other / f"seed0/{phase}.pt")
        assert list(a) == list(b)
        assert all(torch.equal(a[name], b[name]) for name in a)
    results = [json.loads((path / "seed0/results.json").read_text()) for path in (one, other)]
    for phase in ("float", "qat"):
        rows = [
            [{k: v for k, v in row.items() if k not in ("seconds", "rate")} for row in r[phase]["history"]] for r in results
        ]
        assert rows[0] == rows[1]


# --- what it does --------------------------------------------------------------------------------------------


def test_the_network_is_that_of_the_paper() -> None:
    gm = pege_fx.prepare(cifar10.ResNet20(10), cifar10.policy_of(cifar10.parse([])), (torch.randn(2, 3, 32, 32),))
    convs = [name for name, module in cifar10.ResNet20(10).named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convs) == 19
    assert len(pege_fx.fake_quants(gm)) == 36
    assert sum(p.numel() for p in cifar10.ResNet20(10).parameters()) == 269_722


def test_a_run_trains_both_phases_and_says_so(
    go: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (result,) = go("--match")
    assert result == json.loads((tmp_path / "out/seed0/results.json").read_text())
    assert result["finished"]
    assert result["settings"]["bits"] == "W2A2"
    assert [row["epoch"] for row in result["qat"]["history"]] == [1, 2]
    assert result["qat"]["best"] >= result["qat"]["last"]
    assert result["match"]["trained"] == result["match"]["converted"]
    assert result["match"]["quantized_bytes"] < result["match"]["float_bytes"] / 8
    out = capsys.readouterr().out
    assert "float seed 0  epoch 1/1  " in out
    assert "images/s  loss" in out
    assert (tmp_path / "out/seed0/qat.csv").read_text().startswith("epoch,lr,p,weight_lambda,activation_lambda,loss")
    assert "qat seed 0  epoch 2/2  p 1.000  λ" in out
    assert "equal" in out
    assert "blocks.8.conv2" in out


def test_several_seeds_from_given_float_models(go: Callable[..., Any], tmp_path: Path) -> None:
    go("--seed", "0", "1", "--epochs", "0", output="float")
    checkpoint = str(tmp_path / "float/seed{seed}/float.pt")
    results = go("--seed", "0", "1", "--epochs", "1", "--estimator", "ste", "--float-checkpoint", checkpoint)
    assert [result["settings"]["seed"] for result in results] == [0, 1]
    assert all("float" not in result and result["qat"]["history"][0]["p"] == 1.0 for result in results)
    assert results[0]["qat"]["history"][0]["loss"] != results[1]["qat"]["history"][0]["loss"]


@pytest.mark.parametrize("words", ["--estimator ewgs --method interval", "--estimator pege-relative --method dorefa --amp"])
def test_other_estimators_and_methods_train(go: Callable[..., Any], words: str) -> None:
    assert go(*words.split(), "--epochs", "1", "--refresh", "never")[0]["finished"]


def test_seeds_train_together_as_they_do_alone_and_are_evaluated_and_kept_when_asked(
    go: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["--seed", "0", "1", "--epochs", "3", "--method", "minmax"]
    alone = go(*words, output="alone")
    together = go(*words, "--together", "--evaluate-every", "2", "--checkpoint-every", "3", output="together")
    for one, other in zip(alone, together, strict=True):
        rows, some = one["qat"]["history"], other["qat"]["history"]
        assert [row["loss"] for row in rows] == [row["loss"] for row in some]
        assert [row["epoch"] for row in some if "test_accuracy" in row] == [2, 3]
        assert other["qat"]["last"] == one["qat"]["last"]


@pytest.mark.parametrize(("name", "depthwise"), [("mobilenetv2", 7), ("mobilenetv2-tiny", 5), ("efficientnet-lite", 6)])
def test_networks_with_depthwise_convolutions_are_quantized_but_for_their_ends(name: str, depthwise: int) -> None:
    network = cifar10.NETWORKS[name](10)
    gm = pege_fx.prepare(network, cifar10.policy_of(cifar10.parse(["--model", name])), (torch.randn(2, 3, 32, 32),))
    weights = {path for path, site in pege_fx.fake_quants(gm).items() if site.site.kind == "weight"}
    convs = [path for path, module in network.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert weights == {f"{path}.weight_fq" for path in convs[1:]}
    grouped = [path for path in convs if network.get_submodule(path).groups > 1]
    assert len(grouped) == depthwise
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


COMPANIONS = "--model mobilenetv2-tiny --bits W3A3 --weight-estimator pege-share --weight-lambda 0 0.1 --lambda-curve cosine"
COMPANIONS += " --lambda-start 0.5 --dampen 0 0.1 --freeze 0.01 0.001 --pull 0 0.3 --reestimate 2 --oscillations --epochs 3"


def test_companions_act_are_measured_and_go_on_where_they_were(
    go: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = go(*COMPANIONS.split(), output="whole")
    rows = whole["qat"]["history"]
    assert [row["weight_lambda"] for row in rows[:2]] == [0.0, pytest.approx(0.0125, abs=0.0126)]
    assert 0 <= rows[-1]["oscillating"] <= 1
    assert {"reestimated", "depthwise_oscillating", "frozen"} <= rows[-1].keys()
    (plain,) = go(*COMPANIONS.replace("--dampen 0 0.1", "").split(), output="plain")
    assert plain["qat"]["history"][-1]["loss"] != rows[-1]["loss"]
    go(*COMPANIONS.split(), "--time-limit", "0", output="again")  # stops after the float epoch
    go(*COMPANIONS.split(), "--time-limit", "0", output="again")  # after the first quantized one
    assert json.loads((tmp_path / "again/seed0/results.json").read_text())["finished"] is False
    go(*COMPANIONS.split(), output="again")
    assert_same_run(tmp_path / "whole", tmp_path / "again")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_seeds_are_compiled_once_and_compute_what_they_do_alone() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    x = torch.randn(4, 3, 8, 8)
    for seed in range(3):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 3))
        gm = cifar10.compiled_once(pege_fx.prepare(network, "W3A3", (x,), seed=seed))
        pege_fx.PEGEScheduler(gm, 10, pege_fx.Constant(0.5))
        call = torch.compile(gm, fullgraph=True, dynamic=False, backend=backend)
        with pege_fx.kernels.eager_kernels():
            torch.testing.assert_close(call(x), gm(x))
    assert len(compiled) == 1


def test_vgg_has_twelve_quantized_convolutions() -> None:
    vgg = cifar10.VGG16(10)
    assert sum(p.numel() for p in vgg.parameters()) == 14_724_042
    gm = pege_fx.prepare(vgg, cifar10.policy_of(cifar10.parse(["--model", "vgg16"])), (torch.randn(2, 3, 32, 32),))
    assert sum(site.site.kind == "weight" for site in pege_fx.fake_quants(gm).values()) == 12


def test_it_learns_from_its_float_model_and_writes_for_tensorboard(go: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (plain,) = go("--epochs", "1", output="plain")
    (result,) = go("--distill", "0.5", "--epochs", "1", "--tensorboard")
    assert result["float"]["history"][0]["loss"] == plain["float"]["history"][0]["loss"]
    assert result["qat"]["history"][0]["loss"] != plain["qat"]["history"][0]["loss"]
    assert list((tmp_path / "out/seed0").glob("events.*"))


def test_corrupt_images_are_skipped_if_told_so(
    go: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_folder(tmp_path / "damaged")
    with_text_for_an_image(root)
    assert go("--data-dir", str(root), "--epochs", "0", "--on-corrupt", "skip")[0]["finished"]
    assert "skipped: train/red/3.png is no image that can be read" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_blamed_on_a_site(go: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "the loss is NaN: " in refused(go, capsys, "--lr", "1e38", "--quantizer-lr", "1e38")


def test_augmentation_crops_and_flips() -> None:
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    data = cifar10.Images(images, torch.arange(5), 4)
    draw = data.draw(torch.Generator().manual_seed(0))
    assert sorted(draw[:, 0].tolist()) == list(range(5))
    x, labels = data(draw)
    scale = torch.tensor(cifar10.MEAN).view(3, 1, 1), torch.tensor(cifar10.STD).view(3, 1, 1)
    for row, got, label in zip(draw.tolist(), x, labels, strict=True):
        index, top, left, flip = row
        padded = torch.nn.functional.pad(images[index].permute(2, 0, 1), (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
        wanted = padded.flip(2) if flip else padded
        torch.testing.assert_close(got, (wanted / 255 - scale[0]) / scale[1])
        assert label == index


def test_evaluation_fills_up_its_last_batch(go: Callable[..., Any], tmp_path: Path) -> None:
    whole = go("--epochs", "0", output="whole")[0]["float"]["last"]
    assert go("--epochs", "0", "--eval-batch-size", "4", output="parts")[0]["float"]["last"] == whole


def test_an_archive_gives_the_images_of_its_folder_and_the_cache_saves_reading(
    go: Callable[..., Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "images.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for name in ("train", "test"):
            tar.add(folder / name, arcname=f"./{name}")
    words = ["--epochs", "0", "--cache", str(tmp_path / "cache")]
    go("--data-dir", str(archive), *words)
    (cache,) = (tmp_path / "cache").iterdir()
    read, cached = cifar10.read_images(folder), torch.load(cache, weights_only=True)
    assert read["classes"] == cached["classes"] == ["blue", "red"]
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(read[name], cached[name])
    assert len(read["train_labels"]) == 2 * PER_CLASS["train"]
    monkeypatch.setattr(cifar10, "read_images", None)
    go("--data-dir", str(archive), *words, output="again")
    go("--data-dir", str(cache), *words, output="straight")


# --- going on ------------------------------------------------------------------------------------------------


def test_a_run_stopped_after_every_epoch_ends_like_one_that_was_not(
    go: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(output="whole")
    epochs = []
    for _ in range(3):
        capsys.readouterr()
        (result,) = go("--time-limit", "0", output="parts")
        epochs.append([len(result[phase]["history"]) for phase in ("float", "qat") if phase in result])
    assert epochs == [[1], [1, 1], [1, 2]]
    assert result["finished"]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert "epoch" not in capsys.readouterr().out.replace("epoch 2/2", "").replace("last epoch", "")
    go(output="parts")  # nothing is left to do
    assert "epoch 1" not in capsys.readouterr().out


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_died_within_an_epoch_ends_like_one_that_did_not(
    go: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    go(output="whole")
    calls = []

    def dying(self: pege_fx.PEGEScheduler) -> None:
        calls.append(self.t)
        if len(calls) > steps:
            raise MemoryError

    with monkeypatch.context() as patch:
        step = pege_fx.PEGEScheduler.step
        patch.setattr(pege_fx.PEGEScheduler, "step", lambda self: (dying(self), step(self)))
        with pytest.raises(MemoryError):
            go(output="parts")
    go(output="parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    cifar10.save({"epoch": 1}, path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cifar10.save({"epoch": 2}, path)
    assert cifar10.load(path) == {"epoch": 1}


# --- what it refuses -----------------------------------------------------------------------------------------


def refused(go: Callable[..., Any], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line on stderr with which a run exits."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        go(*words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def without_test(root: Path) -> None:
    (root / "test").rename(root / "validation")


def with_empty_class(root: Path) -> None:
    (root / "train" / "green").mkdir()


def with_odd_class(root: Path) -> None:
    (root / "test" / "red").rename(root / "test" / "pink")


def with_text_for_an_image(root: Path) -> None:
    (root / "train" / "red" / "3.png").write_text("not an image")


def with_no_bytes(root: Path) -> None:
    (root / "train" / "red" / "3.png").write_bytes(b"")


def with_half_a_jpeg(root: Path) -> None:
    path = root / "train" / "red" / "x.jpg"
    Image.effect_noise((32, 32), 50).save(path)
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_test, "has no folder test/<class>/: give an ImageFolder with train/ and test/ in it"),
        (with_empty_class, "class train/green has no images: add some, or remove the folder"),
        (with_odd_class, "pink, red must be a class of train/ and of test/"),
        (with_text_for_an_image, "train/red/3.png is no image that can be read"),
        (with_no_bytes, "train/red/3.png is no image that can be read"),
        (with_half_a_jpeg, "train/red/x.jpg is no image that can be read"),
    ],
)
def test_damaged_folders_are_named(
    go: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    words: str,
) -> None:
    root = make_folder(tmp_path / "damaged")
    damage(root)
    assert words in refused(go, capsys, "--data-dir", str(root))


def test_missing_empty_and_broken_data_are_refused(
    go: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist: give a folder" in refused(go, capsys, "--data-dir", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "has no folder train/<class>/" in refused(go, capsys, "--data-dir", str(tmp_path / "empty"))
    (tmp_path / "x.tar.xz").write_bytes(b"\xfd7zXZ\x00 broken")
    assert "is no tar archive that can be read" in refused(go, capsys, "--data-dir", str(tmp_path / "x.tar.xz"))
    (tmp_path / "x.pt").write_bytes(b"broken")
    assert "can not read" in refused(go, capsys, "--data-dir", str(tmp_path / "x.pt"))
    assert "lower --batch-size" in refused(go, capsys, "--batch-size", "100")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(go: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device cuda: PyTorch sees no GPU; use --device cpu" in refused(go, capsys, "--device", "cuda")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bits W9A2", "bits=9 is not a whole number from 2 to 8"),
        ("--replacement-start 1.5", "start=1.5 must lie in [0, 1)"),
        ("--weight-lambda 0 1e-6", "must be a positive, finite number"),
        ("--float-checkpoint nowhere.pt", "nowhere.pt does not exist: give the float.pt of a run"),
    ],
)
def test_wrong_options_are_refused_before_training(
    go: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    assert message in refused(go, capsys, *words.split())
    assert not (tmp_path / "out/seed0").exists()


def test_checkpoints_of_other_runs_are_refused(
    go: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go("--time-limit", "0", "--float-epochs", "2")
    path = tmp_path / "out/seed0/float.pt"
    assert "float.pt was made with float_epochs=2, not 1: give another --output" in refused(go, capsys)
    line = refused(go, capsys, "--float-checkpoint", str(path), "--output", str(tmp_path / "other"))
    assert "float.pt is at epoch 1 of 2: finish that run" in line
    go("--float-epochs", "2")
    assert "qat.pt was made with bits=W2A2, not W4A4" in refused(go, capsys, "--float-epochs", "2", "--bits", "W4A4")
    path.write_bytes(path.read_bytes()[:1000])
    assert f"can not read {path}" in refused(go, capsys, "--float-epochs", "2")
