"""How the kernels in C are compiled and kept, and what happens where they can not be."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pege_fx import PegeWarning, QuantSpec, functional, kernels
from pege_fx.kernels import c_kernels

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here")


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is compiled yet, and the cache is empty; returns its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for cached in (c_kernels._library, c_kernels._cache):
        cached.cache_clear()
    yield tmp_path / "pege_fx"
    for cached in (c_kernels._library, c_kernels._cache):
        cached.cache_clear()


def gradients(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    a, s = x.detach().requires_grad_(), scale.detach().requires_grad_()
    y = functional.fake_quantize(a, s, QuantSpec(bits=3), strength=torch.tensor(0.1))
    return y.detach(), *torch.autograd.grad(y, (a, s), torch.linspace(-1, 1, y.numel()).view(y.shape))


def script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(0o755)
    return path


@needs_compiler
def test_they_compile_with_every_set_of_flags_that_is_tried_without_a_warning(tmp_path: Path) -> None:
    for number, more in enumerate(c_kernels._MORE_FLAGS):
        assert COMPILER is not None
        command = [
            COMPILER,
            *c_kernels._FLAGS,
            *more,
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-Wno-unused-parameter",
        ]
        subprocess.run([*command, str(c_kernels._SOURCE), "-o", str(tmp_path / f"{number}.so"), "-lm"], check=True)


@needs_compiler
def test_they_are_compiled_once(anew: Path) -> None:
    assert c_kernels.library() is c_kernels.library()
    (kept,) = anew.iterdir()
    made = kept.stat().st_mtime_ns
    c_kernels._library.cache_clear()  # as in another process
    assert c_kernels.library() is not None
    assert [path.stat().st_mtime_ns for path in anew.iterdir()] == [made]


@needs_compiler
def test_processes_that_need_them_at_the_same_time(anew: Path) -> None:
    code = """import torch
from pege_fx import QuantSpec, functional
from pege_fx.kernels import c_kernels
assert c_kernels.library() is not None
print(functional.fake_quantize(torch.tensor([0.4, 0.6]), torch.tensor(1.0), QuantSpec(bits=2)).tolist())"""
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in running] == ["[0.0, 1.0]\n"] * 3
    assert len(list(anew.iterdir())) == 1


@needs_compiler
def test_a_compiler_that_knows_neither_this_processor_nor_threads(
    anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert COMPILER is not None
    refusing = script(tmp_path / "mycc", 'case "$*" in *native* | *openmp*) exit 1;; esac', f'exec {COMPILER} "$@"')
    monkeypatch.setenv("CC", str(refusing))
    monkeypatch.setenv("PATH", str(tmp_path))  # no other one
    assert c_kernels.library() is None  # ``exec`` by its full path finds no assembler
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(refusing))
    c_kernels._library.cache_clear()
    assert c_kernels.library() is not None
    x, scale = torch.randn(3, 50_000), torch.rand(3, 1) + 0.1
    found = gradients(x, scale)
    with kernels.eager_kernels():
        wanted = gradients(x, scale)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_without_a_compiler_everything_goes_on(anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    x, scale = torch.randn(30), torch.tensor(0.3)
    found = gradients(x, scale)
    assert c_kernels.library() is None
    with kernels.eager_kernels():
        assert all(map(torch.equal, found, gradients(x, scale)))
    assert not anew.exists()


@needs_compiler
def test_where_the_users_cache_can_not_be_written_nothing_is_kept_or_left(
    anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(c_kernels.tempfile, "tempdir", str(tmp_path))
    assert c_kernels.library() is not None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert computes()


def computes() -> bool:
    y = functional.fake_quantize(torch.tensor([0.4, 0.6]), torch.tensor(1.0), QuantSpec(bits=2))
    return torch.equal(y, torch.tensor([0.0, 1.0]))


def other_process() -> None:
    """From here on nothing is compiled yet, as in a process that starts now."""
    for cached in (c_kernels._library, c_kernels._cache):
        cached.cache_clear()


@needs_compiler
@pytest.mark.parametrize("harm", ["cut short", "a bit", "others may write it", "a link"])
def test_a_kept_library_that_is_not_what_was_written_is_compiled_again(
    harm: str, anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert c_kernels.library() is not None
    (kept,) = anew.iterdir()
    good, mode = kept.read_bytes(), kept.stat().st_mode
    kept.unlink()  # or this process, which has it in memory, would see the harm
    if harm == "a link":
        (tmp_path / "elsewhere.so").write_bytes(good)
        kept.symlink_to(tmp_path / "elsewhere.so")
    elif harm == "others may write it":
        kept.write_bytes(good)
        kept.chmod(0o666)
    else:
        half = len(good) // 2
        kept.write_bytes(good[:half] if harm == "cut short" else good[:half] + bytes([good[half] ^ 1]) + good[half + 1 :])
        kept.chmod(mode)
    other_process()
    assert c_kernels.library() is not None
    assert computes()
    (again,) = anew.iterdir()
    assert again.read_bytes() == good
    assert not again.is_symlink()
    assert not again.stat().st_mode & 0o022


@needs_compiler
@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_what_is_kept_may_be_written_by_the_user_alone_whatever_the_umask(umask: int, anew: Path) -> None:
    before = os.umask(umask)
    try:
        assert c_kernels.library() is not None
    finally:
        os.umask(before)
    (kept,) = anew.iterdir()
    assert c_kernels._is_trusted(anew)
    assert c_kernels._is_trusted(kept)


@needs_compiler
@pytest.mark.parametrize("owner", ["mode", "owner"])
def test_a_folder_that_others_may_write_is_not_used(owner: str, anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert c_kernels.library() is not None
    (kept,) = anew.iterdir()
    kept.write_bytes(b"what somebody else put there")
    if owner == "mode":
        anew.chmod(0o777)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: anew.stat().st_uid + 1)
    other_process()
    assert c_kernels.library() is not None
    assert computes()
    assert kept.read_bytes() == b"what somebody else put there"
    assert len(list(anew.iterdir())) == 1


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler whose child does not end, and which is given a tenth of a second."""
    monkeypatch.setattr(c_kernels, "TIME_LIMIT", 0.1)
    return script(tmp_path / "slow", f'echo $$ >> "{tmp_path}/started"', f'(sleep 1; touch "{tmp_path}/late") & wait')


def test_a_compiler_that_does_not_end_is_left_with_one_warning(
    hanging: Path, anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(hanging))
    monkeypatch.setattr(c_kernels.shutil, "which", lambda name: name if name == str(hanging) else None)
    x, scale = torch.randn(30), torch.tensor(0.3)
    with pytest.warns(PegeWarning, match=r"slow did not end within 0\.1 s\n  set CC to a compiler that works") as caught:
        found = gradients(x, scale)
    assert len(caught) == 1
    with kernels.eager_kernels():
        assert all(map(torch.equal, found, gradients(x, scale)))
    assert not list(anew.iterdir() if anew.exists() else ())
    assert len((hanging.parent / "started").read_text().split()) == 1  # whatever the flags
    time.sleep(1.2)
    assert not (hanging.parent / "late").exists()  # its child was ended too


@needs_compiler
def test_the_next_compiler_serves_where_one_does_not_end(anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(script(tmp_path / "slow", "exec sleep 1000")))
    monkeypatch.setattr(c_kernels, "TIME_LIMIT", 3.0)
    with pytest.warns(PegeWarning, match=r"slow did not end within 3 s"):
        assert c_kernels.library() is not None
    assert computes()


def test_a_compiler_that_fails_is_said_once(anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = script(tmp_path / "mycc", "echo 'no licence' >&2", "exit 3")
    monkeypatch.setenv("CC", str(failing))
    monkeypatch.setattr(c_kernels.shutil, "which", lambda name: name if name == str(failing) else None)
    with pytest.warns(PegeWarning, match=r"mycc: no licence\n"):
        gradients(torch.randn(30), torch.tensor(0.3))
    gradients(torch.randn(30), torch.tensor(0.3))  # warnings are errors here


@needs_compiler
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_that_is_forked_while_a_thread_compiles_goes_on(
    anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(script(tmp_path / "mycc", f'touch "{tmp_path}/begun"', "sleep 0.5", f'exec {COMPILER} "$@"')))
    thread = threading.Thread(target=c_kernels.library)
    thread.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if c_kernels.library() is not None and computes() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()
    assert computes()
    assert len(list(anew.iterdir())) == 1


@needs_compiler
def test_what_a_killed_process_left_of_a_compilation_goes_with_the_next_one(
    anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = script(tmp_path / "mycc", 'case "$*" in *-o*) kill -9 $PPID; exit 1;; esac', f'exec {COMPILER} "$@"')
    code = "from pege_fx.kernels import c_kernels; c_kernels.library()"
    environment = os.environ | {"CC": str(refusing)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL
    (left,) = anew.iterdir()
    monkeypatch.setenv("CC", str(refusing))
    script(refusing, f'exec {COMPILER} "$@"')
    assert c_kernels.library() is not None
    (kept,) = anew.iterdir()
    assert kept.suffix == ".so" != left.suffix


@pytest.mark.skipif(c_kernels.library() is None, reason="no C compiler here")
@pytest.mark.parametrize("shape", [(70_001,), (7, 11_111), (16, 16, 20, 20)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    scale = torch.tensor(0.3) if len(shape) == 1 else torch.rand(shape[0], *(1,) * (len(shape) - 1)) + 0.1
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(x, scale))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_compiler
def test_a_lack_of_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = c_kernels.library()
    assert found is not None

    class Full:
        pege_fx_forward = found.pege_fx_forward

        @staticmethod
        def pege_fx_backward(*_: object) -> int:
            return 1

    monkeypatch.setattr(c_kernels, "library", Full)
    with pytest.raises(torch.OutOfMemoryError, match=r"sums of a tensor of shape \(30,\)"):
        gradients(torch.randn(30), torch.tensor(0.3))


def test_a_mode_that_makes_tensors_without_memory_is_left_to_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(Tensor):
        pass

    made = torch.empty_like
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda *args, **kwargs: made(*args, **kwargs).as_subclass(Fake))
        arguments = (torch.randn(30), torch.tensor(0.3), None, None, None, None, -4, 3)
        with torch.no_grad():
            assert c_kernels.forward(*arguments) is None
            assert functional.fake_quantize(arguments[0], arguments[1], QuantSpec(bits=3)).shape == (30,)


def test_the_environment_names_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = script(tmp_path / "mycc", "exit 1")
    monkeypatch.setenv("CC", str(mine))
    assert next(iter(c_kernels._commands()))[0] == str(mine)
    monkeypatch.setenv("CC", os.devnull)
    assert all(command[0] != os.devnull for command in c_kernels._commands())
