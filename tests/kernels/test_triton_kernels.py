"""The kernels written by hand, without a GPU: run by Triton's interpreter, and compiled for a device that is not here."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pege_fx.kernels import backends

triton = pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TYPES = {"fp32": 4, "bf16": 8, "fp16": 8}  # elements in 16 bytes, the largest that a thread loads at once


def test_the_interpreter_gives_what_plain_operations_give() -> None:
    """In a process of its own: a kernel is compiled or interpreted as the environment said when it was defined."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_kernels_by_hand.py")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert re.search(r"^\d{3} passed in ", run.stdout, re.MULTILINE), run.stdout[-300:]


def compiled(kernel: Any, constants: dict[str, Any], dtype: str) -> str:
    """PTX for compute capability 9.0, where pointers and sizes are divisible by 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    wide = {"positions": "i32", "channels": "i32", "q_min": "fp32", "q_max": "fp32", "key_ptr": "*i32"}
    tensors = {"x_ptr", "y_ptr", "grad_ptr", "grad_x_ptr"}
    types = {n: "constexpr" if n in constants else wide.get(n, f"*{dtype}" if n in tensors else "*fp32") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if types[n].startswith("*") or types[n] == "i32"}
    values = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=aligned)
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"])


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="interpreted, so never compiled")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_they_compile_and_move_sixteen_bytes_at_once(dtype: str, channels_last: bool) -> None:
    from pege_fx.kernels import triton_kernels

    tile = {"tile_positions": 128, "tile_channels": 16} if channels_last else {"tile_positions": 1, "tile_channels": 2048}
    layout = tile | {"per_row": not channels_last} | ({} if channels_last else {"positions": 1})
    for masked in (True, False):
        absent = {"zero_ptr": None} if masked else {"rate_ptr": None, "key_ptr": None}
        ptx = compiled(triton_kernels._forward, layout | {"is_part": masked} | absent, dtype)
        assert len(re.findall(r"ld\.global[\w.]*\.v4\.b32", ptx)) == len(re.findall(r"st\.global[\w.]*\.v4\.b32", ptx))
        assert len(re.findall(r"st\.global[\w.]*\.v4\.b32", ptx)) == 2048 // 128 // TYPES[dtype]
        assert "max.NaN" in ptx
    for estimator in ("ste", "ewgs", "pege"):
        ptx = compiled(triton_kernels._backward, layout | {"estimator": estimator, "zero_ptr": None}, dtype)
        assert len(re.findall(r"ld\.global[\w.]*\.v4\.b32", ptx)) == 3 * 2048 // 128 // TYPES[dtype]


def test_they_are_not_imported_for_tensors_on_a_processor() -> None:
    code = """import sys, torch, pege_fx
pege_fx.functional.fake_quantize(torch.ones(3), torch.tensor(1.0), pege_fx.QuantSpec(bits=2))
assert "pege_fx.kernels.triton_kernels" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_without_triton_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pege_fx.kernels.triton_kernels", None)
    monkeypatch.delattr("pege_fx.kernels.triton_kernels", raising=False)
    backends._backend_of.cache_clear()
    try:
        assert backends._backend_of("cuda") is None
    finally:
        backends._backend_of.cache_clear()
