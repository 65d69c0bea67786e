"""examples/experiments.py: a table of runs becomes a page; it goes on where it was, and is made again from what is stored."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
Image = pytest.importorskip("PIL.Image")

FILE = Path(__file__).parent.parent / "examples" / "experiments.py"
spec = importlib.util.spec_from_file_location("experiments_example", FILE)
assert spec is not None
assert spec.loader is not None
experiments: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(experiments)

TABLE = """
[defaults]
seed = [0, 1]
epochs = 1
float_epochs = 1
batch_size = 8

[[run]]
group = "Estimators, W2A2"
name = "ste"
title = "STE"
estimator = "ste"

[[run]]
group = "Estimators, W2A2"
name = "pege"
title = "PEGE"
weight_lambda = [1e-8, 1e-6]
"""
AGAIN = """
[profiles.tiny]
subset = 8
seed = [0]
skip = ["s*"]
only = ["ste", "pege", "again"]

[[run]]
group = "Again"
name = "again"
weight_lambda = [1e-8, 1e-6]
"""
ANOTHER = """
[[run]]
group = "Again"
name = "another"
bits = "W4A4"
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("test", 3)):
        for label in ("blue", "red"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                image = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    (tmp_path / "table.toml").write_text(TABLE)
    places = {"--work": "work", "--results": "results", "--report": "docs/results.md", "--data-dir": "data"}
    named = [word for option, name in places.items() for word in (option, str(tmp_path / name))]
    return [str(tmp_path / "table.toml"), *named, "--device", "cpu", "--no-compile"]


def test_a_table_is_run_stored_and_reported_and_reported_again(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[tuple[str, list[int]]] = []
    execute = experiments.execute

    def dying(run: dict[str, Any], some: list[int], args: Any) -> None:
        if len(executed) == 3:
            executed.append(("died", []))
            raise MemoryError
        executed.append((run["name"], some))
        execute(run, some, args)

    monkeypatch.setattr(experiments, "execute", dying)
    with pytest.raises(MemoryError):
        experiments.main(words)
    assert "Not complete: pege." in (tmp_path / "docs/results.md").read_text()
    experiments.main(words)
    assert executed == [("ste", [0]), ("pege", [0]), ("ste", [1]), ("died", []), ("pege", [1])]
    page = (tmp_path / "docs/results.md").read_text()
    assert "## Estimators, W2A2" in page
    assert "| STE | " in page
    assert "**Small**: 1 epochs instead of 400" in page
    assert "![Estimators, W2A2](images/results-estimators--w2a2.png)" in page
    assert (tmp_path / "docs/images/results-estimators--w2a2.png").stat().st_size > 1000
    kept = json.loads((tmp_path / "results/pege-seed1.json").read_text())
    assert kept["options"]["weight_lambda"] == [1e-8, 1e-6]
    assert len(kept["curve"]) == 1
    (tmp_path / "docs/results.md").unlink()
    experiments.main([*words, "--report-only"])
    assert (tmp_path / "docs/results.md").read_text() == page
    (tmp_path / "table.toml").write_text(TABLE.replace("epochs = 1\nfloat", "epochs = 2\nfloat"))
    with pytest.raises(SystemExit):
        experiments.main(words)


def test_a_run_under_two_names_is_made_once_and_a_profile_has_a_folder_of_its_own(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "table.toml").write_text(TABLE + AGAIN + ANOTHER)
    trained: list[str] = []
    train = experiments.cifar10.main

    def counting(argv: list[str]) -> Any:
        trained.append(argv[-1])
        return train(argv)

    monkeypatch.setattr(experiments.cifar10, "main", counting)
    experiments.main([*words, "--profile", "tiny"])
    assert [Path(output).name for output in trained] == ["float-1-8-8", "pege"]
    one, other = (json.loads((tmp_path / f"results/tiny/{name}-seed0.json").read_text()) for name in ("pege", "again"))
    assert one == other
    assert one["options"]["subset"] == 8
    page = (tmp_path / "docs/results.md").read_text()
    assert "--profile tiny" in page
    monkeypatch.chdir(tmp_path)
    place = words.index("--report")
    experiments.main([*words[:place], *words[place + 2 :], "--profile", "tiny", "--report-only"])
    assert Path("docs/results-tiny.md").read_text() == page.replace("images/results-", "images/results-tiny-")
    with pytest.raises(SystemExit):
        experiments.main([*words, "--profile", "huge"])


def test_runs_at_once_store_what_runs_in_turn_do_and_stop_in_time(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "table.toml").write_text((TABLE + AGAIN).replace("[0, 1]", "[0]"))
    experiments.main([*words, "--time-limit", "0"])
    assert not (tmp_path / "results").exists()
    experiments.main(words)
    at_once = [word.replace(str(tmp_path / "results"), str(tmp_path / "other")) for word in words]
    command = [sys.executable, str(FILE), *at_once, "--work", str(tmp_path / "again"), "--jobs", "2"]
    subprocess.run(command, check=True, capture_output=True)
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "other").iterdir())
    assert names == ["again-seed0.json", "pege-seed0.json", "ste-seed0.json"]
    for name in names:
        one, other = (json.loads((tmp_path / folder / name).read_text()) for folder in ("results", "other"))
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize(
    ("one", "other", "words_of_it"),
    [
        ([91.0, 91.2, 91.1], [90.0, 90.3, 90.2], ": significant"),
        ([91.0, 90.0, 92.0], [91.5, 90.4, 90.9], ": not significant"),
        ([91.0], [90.0], r"+1.00 (one seed)"),
        ([91.0, 92.0], [90.0, 91.0], "+1.00 (all seeds alike)"),
    ],
)
def test_differences_are_judged(one: list[float], other: list[float], words_of_it: str) -> None:
    assert words_of_it in experiments.significance(dict(enumerate(one)), dict(enumerate(other)))
    assert experiments.significance(dict(enumerate(one)), {}) == "-"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[defaults]\n", "has no [[run]]"),
        ("[[run]]\nname = 'a'\n", "run 0 has no group"),
        ("[[run]]\nname = 'a'\ngroup = 'g'\n[[run]]\nname = 'a'\ngroup = 'g'\n", "a is the name of two runs"),
        ("[[run", "is not TOML"),
        (None, "can not read the table"),
    ],
)
def test_bad_tables_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], table: str | None, message: str) -> None:
    if table is not None:
        (tmp_path / "t.toml").write_text(table)
    with pytest.raises(SystemExit):
        experiments.main([str(tmp_path / "t.toml")])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_no_jobs_at_all_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        experiments.main([*words, "--jobs", "0"])
    assert "--jobs must be at least 1" in capsys.readouterr().err


def test_every_option_of_the_committed_table_is_one_of_the_example() -> None:
    runs = experiments.read_table(FILE.with_name("experiments.toml"))
    assert len(runs) > 20
    for run in runs:
        args = experiments.cifar10.parse(list(experiments.words(experiments.options(run))))
        experiments.cifar10.policy_of(args)
        experiments.cifar10.schedule(args, 100)


def test_the_smallest_difference_is_found_in_four_of_five_cases() -> None:
    """Simulated: paired t-tests on normal differences with that mean."""
    from scipy import stats

    deviation, count = 0.8, 6
    least = experiments.smallest_difference(deviation, count)
    drawn = stats.norm.rvs(least, deviation, size=(4000, count), random_state=0)
    found = (stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean()
    assert 0.77 < found < 0.83
    needed = experiments.seeds_for(deviation, least)
    assert needed == count
    assert experiments.smallest_difference(deviation, needed - 1) > least


def test_a_page_says_what_its_design_can_see_and_what_was_measured_at_the_end(words: list[str], tmp_path: Path) -> None:
    more = 'reestimate = 1\noscillations = true\nmodel = "mobilenetv2-tiny"\nbits = "W3A3"\n'
    (tmp_path / "table.toml").write_text(TABLE.replace("batch_size", f"{more}batch_size"))
    experiments.main(words)
    page = (tmp_path / "docs/results.md").read_text()
    kept = {
        name: [json.loads((tmp_path / f"results/{name}-seed{seed}.json").read_text()) for seed in (0, 1)]
        for name in ("ste", "pege")
    }
    heads = "| BatchNorm re-estimated, % | oscillating weights, % | depthwise, % | re-estimated, less STE |"
    assert f"less STE {heads}" in page
    assert all({"reestimated", "oscillating"} <= one.keys() for runs in kept.values() for one in runs)
    differences = [one["accuracy"] - two["accuracy"] for one, two in zip(kept["pege"], kept["ste"], strict=True)]
    text = experiments.power([{0: 0.0, 1: 0.0}, dict(enumerate(differences))])
    assert text == "" or text in page
    assert experiments.power([{0: 50.0, 1: 51.0}, {0: 50.4, 1: 51.8}]).startswith(
        "Paired differences have a standard deviation of 0.28 points (degrees of freedom: 1, a guess). With 2 seeds "
    )
    assert experiments.power([{0: 50.0}, {0: 50.4}]) == ""


QUEUE = """
[[queue]]
profile = "tiny"
question = "Which?"

[[queue]]
profile = "none"
question = "And then?"

[profiles.none]
only = ["ste"]
"""


def test_the_queue_says_what_is_left(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.toml").write_text(TABLE + QUEUE + AGAIN)
    asked = [words[0], "--results", str(tmp_path / "results"), "--queue"]
    experiments.main([*asked, "all"])
    assert capsys.readouterr().out == "1. tiny: 2 of 2 runs left. Which?\n2. none: 2 of 2 runs left. And then?\n"
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    for run in experiments.read_table(tmp_path / "table.toml", "tiny"):
        kept = {"options": experiments.options(run), "seed": 0, "seconds": 90.0}
        (folder / f"{run['name']}-seed0.json").write_text(json.dumps(kept))
        experiments.main([*asked, "all"])
    assert capsys.readouterr().out.splitlines() == [
        "1. tiny: 1 of 2 runs left, about 2 minutes. Which?",
        "2. none: 2 of 2 runs left. And then?",
        "1. tiny: done. Which?",
        "2. none: 2 of 2 runs left. And then?",
    ]
    experiments.main([*asked, "names"])
    assert capsys.readouterr().out == "none\n"


def test_the_queue_of_this_repository_is_one_of_its_profiles() -> None:
    table = FILE.with_name("experiments.toml")
    entries = list(experiments.queue(table, Path("nowhere")))
    assert [entry["profile"] for entry in entries][:2] == ["resnet20-400", "mobilenetv2-w3a3"]
    assert all(entry["left"] == entry["runs"] > 0 for entry in entries)
    for entry in entries:  # every run's options are some that cifar10.py takes
        for run in experiments.read_table(table, entry["profile"]):
            experiments.cifar10.parse([*experiments.words(experiments.options(run))])
