r"""Run a table of experiments with examples/cifar10.py, and write what they found as a page with tables and plots.

    python examples/experiments.py examples/experiments.toml --data-dir cifar10-jpeg.tar.xz
    python examples/experiments.py examples/experiments.toml --report-only          # the page again, from the stored runs
    python examples/experiments.py examples/experiments.toml --profile cpu --data-dir cifar10-jpeg.tar.xz    # small
    python examples/experiments.py examples/experiments.toml --data-dir cifar10-jpeg.tar.xz --jobs 1         # on a GPU
    python examples/experiments.py examples/experiments.toml --queue all          # what to run next, and what is left

The table is TOML: ``[defaults]`` and each ``[[run]]`` hold options of cifar10.py by their names; a run also has a ``name``, and
a ``group``: the runs of a group make one table, and each is compared with the group's first. Every finished run is stored as
one JSON file per seed in --results. The command can be stopped, or killed, and given again: it goes on where it was.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path
from statistics import mean, stdev
from typing import Any

OWN = ("name", "group", "title")
SHARED = ("model", "float_epochs", "float_lr", "batch_size", "subset")  # what a float model depends on
MEASURED = ("reestimated", "oscillating", "depthwise_oscillating", "frozen")  # at the end, where it was asked for
HEADINGS = {
    "reestimated": "BatchNorm re-estimated, %",
    "oscillating": "oscillating weights, %",
    "depthwise_oscillating": "depthwise, %",
    "frozen": "frozen, %",
}
FULL_EPOCHS = 400
spec = importlib.util.spec_from_file_location("cifar10_example", Path(__file__).with_name("cifar10.py"))
assert spec is not None
assert spec.loader is not None
cifar10: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cifar10)


class UserError(Exception):
    """One line for the person at the keyboard: what is wrong, and the fix."""


# --- the table -----------------------------------------------------------------------------------------------


def read_table(path: Path, profile: str | None = None) -> list[dict[str, Any]]:
    """Return the runs with the defaults filled in, and over those what the profile says."""
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"can not read the table {path}: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}.") from error
    profiles = table.get("profiles", {})
    if profile is not None and profile not in profiles:
        raise UserError(f"{path} has no [profiles.{profile}]; it has: {', '.join(profiles) or 'none'}.")
    other = dict(profiles[profile]) if profile else {}
    only, skip = other.pop("only", ["*"]), other.pop("skip", [])
    other.pop("findings", None)
    runs = [table.get("defaults", {}) | other | run for run in table.get("run", [])]
    runs = [run for run in runs if matches(run, only) and not matches(run, skip)]
    if not runs:
        raise UserError(f"{path} has no [[run]]: add one with a name, a group, and options of cifar10.py.")
    for number, run in enumerate(runs):
        if missing := [name for name in ("name", "group") if not isinstance(run.get(name), str)]:
            raise UserError(f'{path}: run {number} has no {missing[0]}: add {missing[0]} = "...".')
    names = [run["name"] for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{path}: {', '.join(sorted(twice))} is the name of two runs: choose another.")
    return runs


def matches(run: dict[str, Any], patterns: list[str]) -> bool:
    return any(fnmatch(str(run.get("name")), pattern) for pattern in patterns)


def findings(path: Path, profile: str | None) -> str:
    """Return what people wrote in the table about the results: ``findings`` of the profile, or of the whole table."""
    table = tomllib.loads(path.read_text())
    return str((table["profiles"][profile] if profile else table).get("findings", "")).strip()


def options(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name not in (*OWN, "seed")}


def words(settings: dict[str, Any]) -> Iterator[str]:
    """Settings as cifar10.py takes them on its command line."""
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            yield option if value else f"--no-{option.removeprefix('--')}"
        else:
            yield option
            yield from map(str, value if isinstance(value, list) else [value])


def seeds(run: dict[str, Any]) -> list[int]:
    seed = run.get("seed", [0])
    return seed if isinstance(seed, list) else [seed]


# --- running -------------------------------------------------------------------------------------------------


def stored(folder: Path, run: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """The result of a finished run with these very options, or None."""
    path = folder / f"{run['name']}-seed{seed}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    if found["options"] != options(run):
        raise UserError(f"{path} was made with other options than the table has now: give the run another name, or delete it.")
    return found


def made_under_another_name(folder: Path, run: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """The result of a run with the same options: groups show the same run from different sides."""
    for path in sorted(folder.glob(f"*-seed{seed}.json")):
        found: dict[str, Any] = json.loads(path.read_text())
        if found["options"] == options(run):
            return found
    return None


def float_folder(run: dict[str, Any], args: argparse.Namespace) -> Path:
    """Where the float models lie that all runs of this network share."""
    shared = [str(value) for name, value in options(run).items() if name in SHARED]
    folder: Path = args.work / "-".join(["float", *shared])
    return folder


def float_models(run: dict[str, Any], some: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train the float models of some seeds, as far as they are not there yet; return their results."""
    shared = {name: value for name, value in options(run).items() if name in (*SHARED, "test_subset", "evaluate_every")}
    return train(args, some, float_folder(run, args), [*words(shared), "--epochs", "0"])


def train(args: argparse.Namespace, some: list[int], folder: Path, more: list[str]) -> list[dict[str, Any]]:
    """Call cifar10.py for some seeds, with the time that is left; return the results of those that it came to."""
    data = ["--data-dir", args.data_dir] if args.data_dir else []
    limit = [] if args.deadline == math.inf else ["--time-limit", str(args.deadline - time.time())]
    common = [*args.rest, *data, *limit, "--cache", str(args.work / "cache"), "--seed", *map(str, some)]
    results: list[dict[str, Any]] = cifar10.main([*common, *more, "--output", str(folder)])
    return results


def execute(run: dict[str, Any], some: list[int], args: argparse.Namespace) -> None:
    """Train one run with some seeds and store those that are finished when the time is over."""

    def target(seed: int) -> Path:
        path: Path = args.results / f"{run['name']}-seed{seed}.json"
        return path

    known = {seed: made_under_another_name(args.results, run, seed) for seed in some}
    for seed, found in known.items():
        if found:
            cifar10.save(found, target(seed))
    some = [seed for seed in some if not known[seed]]
    if not some or time.time() > args.deadline:
        return
    floats = float_models(run, some, args)
    if not all(base["finished"] for base in floats) or time.time() > args.deadline:
        return
    checkpoint = str(float_folder(run, args) / "seed{seed}" / "float.pt")
    settings = options(run)
    results = train(args, some, args.work / run["name"], [*words(settings), "--float-checkpoint", checkpoint])
    for seed, base, result in zip(some, floats, results, strict=False):
        if not result["finished"]:
            continue
        kept = {"options": settings, "seed": seed, "float": base["float"]["last"], "accuracy": result["qat"]["last"]}
        kept |= {"best": result["qat"]["best"], "seconds": result["qat"]["seconds"], "device": result["device"]}
        rows = [row for row in result["qat"]["history"] if "test_accuracy" in row]
        kept |= {"versions": result["versions"], "curve": [row["test_accuracy"] for row in rows]}
        kept |= {"epochs": [row["epoch"] for row in rows]}
        kept |= {name: rows[-1][name] for name in MEASURED if name in rows[-1]}
        cifar10.save(kept, target(seed))


def execute_at_once(runs: list[dict[str, Any]], todo: dict[str, list[int]], args: argparse.Namespace) -> Iterator[None]:
    """Run all of them, ``--jobs`` at a time, each with its seeds in a process of its own. The float models come first."""
    start = multiprocessing.get_context("spawn")
    floats = {float_folder(run, args): run for run in runs}
    distinct: dict[str, dict[str, Any]] = {}
    for run in runs:  # in the table's order, which says what matters most
        distinct.setdefault(json.dumps(options(run), sort_keys=True), run)
    with ProcessPoolExecutor(args.jobs, start, max_tasks_per_child=1) as pool:
        for future in [pool.submit(float_models, run, todo[run["name"]], args) for run in floats.values()]:
            future.result()
        started = [pool.submit(execute, run, todo[run["name"]], args) for run in distinct.values()]
        for future in as_completed(started):
            if future.cancelled():
                continue
            future.result()
            if time.time() > args.deadline:
                for waiting in started:
                    waiting.cancel()
            yield
    for run in runs:  # those that are there under another name
        if time.time() < args.deadline:
            execute(run, todo[run["name"]], args)


def execute_in_turn(runs: list[dict[str, Any]], todo: dict[str, list[int]], args: argparse.Namespace) -> Iterator[None]:
    """Run one after the other: a first look at all of them, then the next seed."""
    for seed in sorted({seed for some in todo.values() for seed in some}):
        for run in runs:
            if seed in todo[run["name"]] and time.time() < args.deadline:
                execute(run, [seed], args)
                yield


# --- the queue -----------------------------------------------------------------------------------------------


def queue(path: Path, results: Path) -> Iterator[dict[str, Any]]:
    """Yield the table's ``[[queue]]`` in its order: profile, question, runs in all and left, seconds left if they are known."""
    for entry in tomllib.loads(path.read_text()).get("queue", []):
        runs, folder = read_table(path, entry["profile"]), results / entry["profile"]
        known = [[stored(folder, run, seed) for seed in seeds(run)] for run in runs]
        made = [one for some in known for one in some if one is not None]
        left = sum(one is None for some in known for one in some)
        seconds = left * mean(one["seconds"] for one in made) if made else None
        yield entry | {"runs": left + len(made), "left": left, "seconds": seconds}


def print_queue(path: Path, results: Path, names_alone: bool) -> None:
    """Print what is left, what matters most first; or the names of its profiles alone, for scripts."""
    for number, entry in enumerate(queue(path, results), 1):
        if names_alone:
            if entry["left"]:
                print(entry["profile"])
            continue
        time_left = "" if entry["seconds"] is None else f", about {entry['seconds'] / 60:.0f} minutes"
        state = f"{entry['left']} of {entry['runs']} runs left{time_left}" if entry["left"] else "done"
        print(f"{number}. {entry['profile']}: {state}. {entry['question']}")


# --- the page ------------------------------------------------------------------------------------------------


def significance(one: dict[int, float], other: dict[int, float]) -> str:
    """The mean difference with its 95 % interval and p of the paired t-test over the seeds that both have."""
    from scipy import stats

    shared = sorted(set(one) & set(other))
    differences = [one[seed] - other[seed] for seed in shared]
    if len(shared) < 2:
        return f"{differences[0]:+.2f} (one seed)" if shared else "-"
    if stdev(differences) == 0:
        return f"{mean(differences):+.2f} (all seeds alike)"
    test = stats.ttest_rel([one[seed] for seed in shared], [other[seed] for seed in shared])
    interval = test.confidence_interval(0.95)
    verdict = "significant" if test.pvalue < 0.05 else "not significant"
    return f"{mean(differences):+.2f} [{interval.low:+.2f}, {interval.high:+.2f}], p = {test.pvalue:.3f}: {verdict}"


def smallest_difference(deviation: float, count: int) -> float:
    """The difference that a paired t-test at the 5 % level finds in four of five cases.

    Args:
        deviation: of the paired differences.
        count: of seeds, at least 2.
    """
    from scipy import stats

    return float((stats.t.ppf(0.975, count - 1) + stats.t.ppf(0.8, count - 1)) * deviation / math.sqrt(count))


def seeds_for(deviation: float, difference: float) -> int:
    """The number of seeds with which a difference is found in four of five cases; at least 2."""
    return next(count for count in range(2, 10_000) if smallest_difference(deviation, count) <= difference or count == 9_999)


def power(accuracies: list[dict[int, float]]) -> str:
    """What the design can see, from the spread of the paired differences to the first run, pooled over the others."""
    base, *others = accuracies
    paired = [[one[seed] - base[seed] for seed in set(one) & set(base)] for one in others]
    paired = [differences for differences in paired if len(differences) > 1]
    if not paired or not any(map(stdev, paired)):
        return ""
    deviation = math.sqrt(mean(stdev(differences) ** 2 for differences in paired))
    count = round(mean(map(len, paired)))
    least, freedom = smallest_difference(deviation, count), sum(map(len, paired)) - len(paired)
    basis = "a guess" if freedom < 5 else "pooled over the runs"
    return (
        f"Paired differences have a standard deviation of {deviation:.2f} points (degrees of freedom: {freedom}, {basis}). "
        f"With {count} seeds a difference of {least:.1f} points is found in four of five cases (two-sided, 5 %); one point "
        f"takes {seeds_for(deviation, 1.0)} seeds, half a point {seeds_for(deviation, 0.5)}."
    )


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def plot(path: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    """Test accuracy over epochs: the mean of the seeds, and the range between them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for title, kept in found.items():
        columns = list(zip(*(one["curve"] for one in kept), strict=False))
        epochs = kept[0].get("epochs", range(1, len(columns) + 1))
        (line,) = axes.plot(epochs, [mean(column) for column in columns], label=title, marker="." if len(columns) < 5 else "")
        axes.fill_between(epochs, list(map(min, columns)), list(map(max, columns)), alpha=0.2, color=line.get_color())
    axes.set(xlabel="epoch", ylabel="test accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def measured(kept: list[dict[str, Any]], first: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
    """The cells of what was measured at the end, beside the accuracy: shares in percent."""
    for name in names:
        values = [one[name] if name == "reestimated" else 100 * one[name] for one in kept if name in one]
        yield spread(values) if values else ""
    if "reestimated" in names:
        one, other = ({run["seed"]: run["reestimated"] for run in runs if "reestimated" in run} for runs in (kept, first))
        yield "" if kept is first else significance(one, other)


def group_section(group: str, runs: list[dict[str, Any]], args: argparse.Namespace) -> Iterator[str]:
    found = {run["name"]: [kept for seed in seeds(run) if (kept := stored(args.results, run, seed))] for run in runs}
    done = [run for run in runs if found[run["name"]]]
    yield f"## {group}\n"
    if not done:
        yield "No run of this group has been made yet.\n"
        return
    first, *_ = done
    base = {kept["seed"]: kept["accuracy"] for kept in found[first["name"]]}
    title = first.get("title", first["name"])
    more = [name for name in MEASURED if any(name in kept for run in done for kept in found[run["name"]])]
    head = [HEADINGS[name] for name in more] + ([f"re-estimated, less {title}"] if "reestimated" in more else [])
    yield f"| {' | '.join(['run', 'accuracy after the last epoch, %', 'seeds', 'best epoch, %', f'less {title}', *head])} |"
    yield f"|{'---|' * (5 + len(head))}"
    floats = {kept["seed"]: kept["float"] for run in done for kept in found[run["name"]]}
    yield f"| float | {spread(list(floats.values()))} | {len(floats)} | | |{' |' * len(head)}"
    for run in done:
        kept = found[run["name"]]
        accuracy = {one["seed"]: one["accuracy"] for one in kept}
        against = "" if run is first else significance(accuracy, base)
        best = spread([one["best"] for one in kept])
        cells = [run.get("title", run["name"]), spread(list(accuracy.values())), str(len(kept)), best, against]
        yield f"| {' | '.join([*cells, *measured(kept, found[first['name']], more)])} |"
    if text := power([{one["seed"]: one["accuracy"] for one in found[run["name"]]} for run in done]):
        yield f"\n{text}"
    epochs = {run.get("epochs", FULL_EPOCHS) for run in done}
    subset = {run.get("subset") for run in done} - {None}
    some = found[first["name"]][0]
    minutes = sum(one["seconds"] for run in done for one in found[run["name"]]) / 60
    if min(epochs) < FULL_EPOCHS or subset:
        images = f"{', '.join(map(str, subset))} training images" if subset else "all images"
        yield f"\n**Small**: {', '.join(map(str, sorted(epochs)))} epochs instead of {FULL_EPOCHS}, {images}."
    yield f"\n{minutes:.0f} minutes of training, summed over the seeds, on {some['device']}, torch {some['versions']['torch']}."
    if missing := [run["name"] for run in runs if len(found[run["name"]]) < len(seeds(run))]:
        yield f"\nNot complete: {', '.join(missing)}."
    words = "".join(c if c.isalnum() and c.isascii() else "-" for c in group.lower())
    image = args.report.parent / "images" / f"{args.report.stem}-{words}.png"
    plot(image, {run.get("title", run["name"]): found[run["name"]] for run in done})
    yield f"\n![{group}]({image.relative_to(args.report.parent).as_posix()})\n"


def write_report(runs: list[dict[str, Any]], args: argparse.Namespace) -> None:
    lines = [
        "# Results",
        "",
        f"Made by `examples/experiments.py {args.table.name}{f' --profile {args.profile}' if args.profile else ''}`",
        "from the stored runs; do not edit. Mean ± standard",
        "deviation over seeds; differences are paired by seed, with the 95 % interval and p of the t-test, not corrected for",
        "the number of comparisons: of twenty, one looks significant by chance.",
        "",
    ]
    if text := findings(args.table, args.profile):
        lines += ["## What holds and what does not", "", text, ""]
    for group in dict.fromkeys(run["group"] for run in runs):
        lines += group_section(group, [run for run in runs if run["group"] == group], args)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text("\n".join(lines).rstrip() + "\n")


# --- the command ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False  # what is not ours is for cifar10.py
    add = parser.add_argument
    add("table", type=Path, help="TOML")
    add("--data-dir", help="as for cifar10.py")
    add("--work", type=Path, default=Path("runs/experiments"), help="folder of checkpoints, to go on from")
    add("--results", type=Path, default=Path("benchmarks/results/cifar10"), help="folder of stored runs, one JSON per seed")
    add(
        "--profile",
        help="a section [profiles.NAME] of the table: another size, or some of the runs; results go into a folder of that name",
    )
    add("--jobs", type=int, help="runs at once, each with all its seeds together; default: one seed of one run after the other")
    add("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="stop then; the same command goes on")
    add("--report", type=Path, help="the page; default: docs/results.md, of a profile docs/results-NAME.md")
    add("--report-only", action="store_true")
    add(
        "--queue",
        choices=("all", "names"),
        help="print the table's queue of profiles and what is left of it; names: for scripts",
    )
    args, args.rest = parser.parse_known_args(argv)
    if args.jobs is not None and args.jobs < 1:
        parser.error("--jobs must be at least 1")
    args.report = args.report or Path(f"docs/results-{args.profile}.md" if args.profile else "docs/results.md")
    if args.profile:
        args.work, args.results = args.work / args.profile, args.results / args.profile
    args.deadline = time.time() + args.time_limit
    try:
        if args.queue:
            return print_queue(args.table, args.results, args.queue == "names")
        runs = read_table(args.table, args.profile)
        todo = {run["name"]: [seed for seed in seeds(run) if stored(args.results, run, seed) is None] for run in runs}
        left = [run for run in runs if todo[run["name"]] and not args.report_only]
        for _ in (execute_at_once if args.jobs else execute_in_turn)(left, todo, args):
            write_report(runs, args)
        write_report(runs, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
