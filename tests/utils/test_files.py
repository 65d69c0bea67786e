"""Every public function that takes a path refuses what is none, before anything is written, and says what to give."""

import fcntl
import inspect
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import pege_fx
from pege_fx.__main__ import main
from pege_fx._utils.files import atomic_write, while_replaced
from pege_fx.errors import PegeError
from pege_fx.serialization import tensor_tree

X = torch.randn(2, 4)
NO_PATHS = ["a\0b.html", Path("a\0b.svg"), "\ud800", 3, None, b"bytes", [1], nn.Linear(2, 2)]


@cache
def prepared() -> GraphModule:
    return pege_fx.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "W4A4", X)


@cache
def deployed() -> GraphModule:
    return pege_fx.convert(prepared())


TAKES_A_PATH: dict[str, Callable[[Any], object]] = {
    "save": lambda path: pege_fx.save(prepared(), path),
    "load": lambda path: pege_fx.load(path, prepared()),
    "checkpoint_info": pege_fx.checkpoint_info,
    "newest": pege_fx.newest,
    "save_deployed": lambda path: pege_fx.save_deployed(deployed(), path),
    "load_deployed": pege_fx.load_deployed,
    "export_onnx": lambda path: pege_fx.export_onnx(deployed(), path, X),
    "verify_export": lambda path: pege_fx.verify_export(deployed(), path, [X]),
    "verify": lambda path: pege_fx.verify(deployed(), path, [X], engine="onnxruntime"),
    "to_toml": pege_fx.QuantPolicy.parse("W4A4").to_toml,
    "from_toml": pege_fx.QuantPolicy.from_toml,
    "draw": lambda path: pege_fx.draw(prepared(), path),
    "Diff.draw": lambda path: pege_fx.diff(prepared(), deployed()).draw(path),
    "report": lambda path: pege_fx.report(prepared(), path),
    "history of report": lambda path: pege_fx.report(prepared(), "never written.html", history=path),
    "CSVWriter": pege_fx.CSVWriter,
    "read_history": pege_fx.read_history,
    "TensorBoardWriter": pege_fx.TensorBoardWriter,
}
NONE_IS_AN_ANSWER = {"to_toml", "history of report"}


@pytest.mark.parametrize("name", TAKES_A_PATH)
@pytest.mark.parametrize("path", NO_PATHS, ids=lambda path: ascii(path)[:12])
def test_what_is_no_path_is_refused(name: str, path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number would be a file descriptor to Python's open; one with a NUL was a bare ValueError."""
    if path is None and name in NONE_IS_AN_ANSWER:
        return
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PegeError, match=r"is no path .*: give text|the history can not be read .*: give rows"):
        TAKES_A_PATH[name](path)
    assert not list(tmp_path.iterdir())


READS = ["load", "checkpoint_info", "newest", "load_deployed", "verify_export", "from_toml", "read_history"]


@pytest.mark.parametrize("name", [*READS, "history of report"])
def test_a_pipe_is_no_file_to_read(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PegeError, match=r"pipe is a folder, a pipe or a device: give a file\."):
        TAKES_A_PATH[name](tmp_path / "pipe")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_has_the_mode_of_one_that_is_opened(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_text("")
        for text in ("new", "again"):
            with atomic_write(tmp_path / "whole") as temporary:
                temporary.write_text(text)
    finally:
        assert os.umask(before) == umask
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "whole").read_text() == "again"


def test_what_fails_leaves_the_file_before_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "whole").write_text("before")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "whole") as temporary:
        fail(temporary)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("whole", "before")]


@pytest.mark.parametrize(
    ("kind", "said"),
    [("pipe", "it is a device, not a file"), ("folder", "it is a folder"), ("no/file", "No such file or directory")],
)
def test_what_can_not_be_replaced_by_a_file_is_said(kind: str, said: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    refused = pytest.raises(pege_fx.OutputError, match=f"can not write .*{kind}: {said}; nothing was left there")
    with refused, atomic_write(tmp_path / kind, pege_fx.OutputError):
        pytest.fail("there is no file to write")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "pipe"]


WRITES = {
    "save": "state",
    "save_deployed": "model",
    "export_onnx": "model.onnx",
    "draw": "model.dot",
    "report": "page.html",
    "to_toml": "p",
}


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device"])
@pytest.mark.parametrize("name", WRITES)
def test_what_is_no_file_is_not_replaced_by_one(name: str, kind: str, tmp_path: Path) -> None:
    place = tmp_path / WRITES[name]
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/dev/null")
    with pytest.raises(PegeError, match=r"can not write .*: it is a (device, not a file|folder)"):
        TAKES_A_PATH[name](place)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    assert not place.is_file()
    assert Path("/dev/null").is_char_device()


def test_a_link_is_followed_by_what_is_saved_and_by_what_is_kept(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "disk" / "real")
    for _ in range(2):
        pege_fx.save(prepared(), tmp_path / "state")
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["real", "real.previous"]
    assert [path.name for path in tmp_path.iterdir() if path.is_symlink()] == ["state"]
    (tmp_path / "disk" / "real").write_bytes(b"cut")
    assert pege_fx.newest(tmp_path / "state") == tmp_path / "disk" / "real.previous"


def in_processes(count: int, work: Callable[[int], None]) -> list[int]:
    """Exit statuses of forked processes: 0 where ``work`` raises nothing."""
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            try:
                work(number)
            except BaseException:  # whatever it is, a child must not run the rest of the tests
                os._exit(1)
            os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_several_processes_write_one_path_while_others_read_it(tmp_path: Path) -> None:
    tensor_tree.write([0] * 3, tmp_path / "x", "test")

    def work(number: int) -> None:
        for _ in range(40):
            if number < 3:
                tensor_tree.write([number] * (3 + 500 * number), tmp_path / "x", "test")
            else:
                found = tensor_tree.read(tmp_path / "x", "test")
                assert len(set(found)) == 1
                assert len(found) == 3 + 500 * found[0]

    assert in_processes(5, work) == [0] * 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.previous"]
    assert set(tensor_tree.read(tmp_path / "x.previous", "test")) <= {0, 1, 2}


def test_what_a_killed_writer_left_goes_with_the_next_one_and_what_others_write_stays(tmp_path: Path) -> None:
    def half(_: int) -> None:
        with atomic_write(tmp_path / "x") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_processes(1, half) == [-signal.SIGKILL]
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_write(tmp_path / "x") as first:
        first.write_text("first")
        with atomic_write(tmp_path / "x") as second:
            second.write_text("second")
        assert (tmp_path / "x").read_text() == "second"
        assert len(list(tmp_path.iterdir())) == 2
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "first")]


def test_a_new_folder_that_another_takes_for_abandoned_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has locked it, and removes it a moment later: until then it is there, but nobody's to write in."""
    made: list[Path] = []
    removers: list[threading.Thread] = []
    real = tempfile.mkdtemp

    def found_by_another(*args: Any) -> str:
        folder = real(*args)
        made.append(Path(folder))
        if len(made) == 1:
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            removers.append(threading.Timer(0.2, lambda: (os.rmdir(folder), os.close(lock))))
            removers[0].start()
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", found_by_another)
    with atomic_write(tmp_path / "x") as temporary:
        removers[0].join()
        temporary.write_text("whole")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "whole")]
    assert len(made) == 2


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (done.append(name), real(*args))[1])
    with atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("whole")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    tries: list[int] = []

    def read() -> str:
        tries.append(len(tries))
        if len(tries) < 4:
            with atomic_write(tmp_path / "x") as temporary:
                temporary.write_text(f"{len(tries)}")
            raise PegeError("the header of one, the content of another")
        return (tmp_path / "x").read_text()

    assert while_replaced(tmp_path / "x", read, PegeError) == "3"
    with pytest.raises(PegeError, match="is broken"):
        while_replaced(tmp_path / "x", lambda: broken(tries), PegeError)
    assert len(tries) == 5


def broken(tries: list[int]) -> str:
    tries.append(0)
    raise PegeError("it is broken")


def test_every_public_function_that_takes_a_path_is_tried() -> None:
    """By the annotations of the arguments of what pege_fx has in public."""
    found = set()
    for name in pege_fx.__all__:
        value = getattr(pege_fx, name)
        if isinstance(value, type):
            found |= {each for each, method in vars(value).items() if each[0] != "_" and _takes_a_path(getattr(value, each))}
        if _takes_a_path(value):
            found.add(name)
    assert found == {name.rpartition(" ")[2].rpartition(".")[2] for name in TAKES_A_PATH}


def _takes_a_path(value: Any) -> bool:
    if not callable(value) or (isinstance(value, type) and issubclass(value, BaseException)):
        return False
    return any("Path" in str(each.annotation) for each in inspect.signature(value).parameters.values())


def test_a_folder_of_tensorboard_that_can_not_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(pege_fx.OutputError, match=r"can not write to the folder .*taken: File exists"):
        pege_fx.TensorBoardWriter(tmp_path / "taken")


def test_export_of_no_name_is_refused_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "", "--input", "1x4"]) == 1
    assert "is a folder" in capsys.readouterr().err
