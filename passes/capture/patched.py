"""What is patched while a module is traced: one table of names, what each one becomes, and why.

A trace runs the model's Python with proxies. Torch's operators notice a proxy by ``__torch_function__``. What is in this table
does not, or would do something that a graph can not hold. Everything is put back when the trace ends. Other threads see the
replacements too; each of them looks at who calls, and does what the original does for anybody but the code that is traced.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

# What stands in.
#   "node": what writes a node, if a proxy is among the arguments or a call writes to what it makes; "random node": in any case.
#   "class": what answers for the value that a proxy stands for.
#   "draw", "set", "block": what refuses.
#   "ask": what answers, and notes the question: the trace is held against one with the other answer.
#   "region": what writes the ends of a region. "assume": what does nothing.
Role = Literal["node", "random node", "class", "draw", "set", "ask", "block", "region", "assume"]


@dataclass(frozen=True, kw_only=True)
class Patched:
    """Names that mean something else while a module is traced.

    Attributes:
        where: the module or the class that holds them; "" is the globals of the code that the model may run.
        names: those that are replaced, as far as this version of torch has them.
        role: what stands in for them.
        reason: why the originals can not stay.
    """

    where: str
    names: tuple[str, ...]
    role: Role
    reason: str

    @property
    def holder(self) -> Any:
        """The module or class."""
        module, _, name = self.where.rpartition(".")
        try:
            return importlib.import_module(self.where)
        except ModuleNotFoundError:
            return getattr(importlib.import_module(module), name)

    @property
    def namespace(self) -> dict[str, Any]:
        """The names of the module or class, where its own code looks them up."""
        own: dict[str, Any] = vars(self.holder)
        hidden = [name for name in self.names if name not in own and hasattr(self.holder, name)]
        # torch.backends.cudnn is an object in the place of its module, which hands on what the module has.
        if len(hidden) < len(self.names):
            return own
        found: dict[str, Any] = inspect.unwrap(getattr(self.holder, hidden[0])).__globals__
        return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TABLE: tuple[Patched, ...] = (
    Patched(
        where="torch",
        names=_words("arange zeros ones full empty eye linspace tensor finfo iinfo"),
        role="node",
        reason="They take sizes and no tensor, so torch does not look for a proxy among their arguments.",
    ),
    Patched(
        where="torch",
        names=_words(
            "as_tensor complex empty_like full_like logspace ones_like scalar_tensor tril_indices triu_indices zeros_like"
        ),
        role="node",
        reason="They make tensors: constants of the graph, or where a call writes to those, nodes.",
    ),
    Patched(
        where="torch",
        names=_words("rand randn randint randperm normal"),
        role="random node",
        reason="As above; and a number drawn while tracing would be a constant of the graph.",
    ),
    Patched(
        where="torch",
        names=("is_tensor",),
        role="class",
        reason="It asks for the class of its argument, and a proxy is no tensor.",
    ),
    Patched(
        where="",
        names=_words("isinstance hasattr getattr type"),
        role="class",
        reason="Python answers them without asking the proxy; globals come before builtins, so nobody else sees these.",
    ),
    Patched(
        where="random",
        names=_words("random uniform randint randrange choice choices sample shuffle gauss"),
        role="draw",
        reason="A number drawn while tracing would be a constant of the graph; such a module stays Python.",
    ),
    Patched(
        where="numpy.random",
        names=_words("rand randn random uniform randint choice permutation shuffle normal"),
        role="draw",
        reason="As for Python's generator.",
    ),
    Patched(
        where="torch",
        names=_words("""
            is_grad_enabled is_inference_mode_enabled is_anomaly_enabled is_autocast_enabled is_autocast_cpu_enabled
            is_autocast_cache_enabled get_autocast_dtype get_autocast_cpu_dtype get_autocast_gpu_dtype
            are_deterministic_algorithms_enabled is_deterministic_algorithms_warn_only_enabled get_deterministic_debug_mode
            get_float32_matmul_precision get_default_dtype
        """),
        role="ask",
        reason="A graph may be called in another mode than it was traced in: the other answer must give the same graph.",
    ),
    Patched(
        where="torch",
        names=_words("""
            set_autocast_enabled set_autocast_cpu_enabled set_autocast_dtype set_autocast_cpu_dtype set_autocast_gpu_dtype
            set_autocast_cache_enabled clear_autocast_cache use_deterministic_algorithms set_deterministic_debug_mode
            set_float32_matmul_precision set_default_dtype set_default_device manual_seed seed set_rng_state
        """),
        role="set",
        reason="fx writes no node for a mode, so the graph would run without it.",
    ),
    Patched(
        where="torch.random",
        names=_words("fork_rng manual_seed seed set_rng_state"),
        role="set",
        reason="fx writes no node for it, so the graph would draw from the generator as it is.",
    ),
    Patched(
        where="torch.autograd.graph",
        names=("allow_mutation_on_saved_tensors",),
        role="set",
        reason="fx writes no node for a context.",
    ),
    Patched(where="torch.nn.attention", names=("sdpa_kernel",), role="set", reason="fx writes no node for a context."),
    Patched(
        where="torch.backends.cuda",
        names=_words("""
            sdp_kernel flash_sdp_enabled mem_efficient_sdp_enabled math_sdp_enabled cudnn_sdp_enabled enable_flash_sdp
            enable_mem_efficient_sdp enable_math_sdp enable_cudnn_sdp
        """),
        role="set",
        reason="Which attention kernels may run is a mode; the answer has no other that a model could be traced with.",
    ),
    Patched(where="torch.backends.cudnn", names=("flags", "set_flags"), role="set", reason="They set a mode of the process."),
    Patched(where="torch.backends.mkldnn", names=("flags", "set_flags"), role="set", reason="They set a mode of the process."),
    *(
        Patched(where=where, names=("__enter__",), role="block", reason="fx writes no node for a context.")
        for where in (
            "torch.no_grad",
            "torch.enable_grad",
            "torch.inference_mode",
            "torch.autograd.detect_anomaly",
            "torch.autograd.graph.saved_tensors_hooks",
        )
    ),
    *(
        Patched(where=where, names=("__init__",), role="block", reason="It may set the mode without a ``with`` block.")
        for where in ("torch.set_grad_enabled", "torch.autograd.set_detect_anomaly")
    ),
    Patched(
        where="torch.autocast",
        names=("__init__", "__enter__", "__exit__"),
        role="region",
        reason="A block that switches autocast off is written down as a region of the graph; any other is refused.",
    ),
    Patched(
        where="transformers.utils.import_utils",
        names=("torch_compilable_check",),
        role="assume",
        reason="It checks what tensors hold, which a proxy can not answer; for a compiler it holds, too.",
    ),
)


def patched(*roles: Role) -> Iterator[Patched]:
    """Yield the entries of these roles."""
    return (entry for entry in TABLE if entry.role in roles)


def names_of(*roles: Role) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the namespace and the name of each function with one of these roles that is there."""
    for entry in patched(*roles):
        if entry.where.partition(".")[0] in sys.modules:  # a library that nobody imported is in no model
            namespace = entry.namespace
            yield from ((namespace, name) for name in entry.names if name in namespace)


def functions_of(*roles: Role) -> dict[Any, str]:
    """Return the functions with one of these roles, by the name that they have there."""
    return {namespace[name]: name for namespace, name in names_of(*roles)}


# Taken when this is imported: while a module is traced, the names mean something else.
FACTORIES = functions_of("node", "random node")
DRAWING = functions_of("random node")
RAND, IS_TENSOR = torch.rand, torch.is_tensor
