"""Random numbers while a module is traced: in the graph they are drawn anew in each call, outside they would be constants."""

from collections.abc import Callable
from typing import Any

from torch.fx import Proxy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pege_fx.passes.capture.patched import functions_of

_IN_PLACE = {"uniform_", "normal_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_"}
_IN_PLACE |= {"rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "poisson"}  # of constants
_DRAWS = functions_of("draw")  # taken now: while a module is traced, the names mean something else


class ConstantDrawGuard(TorchFunctionMode):
    """Calls ``refuse``, in the thread that traces, where torch makes random numbers without the graph."""

    def __init__(self, refuse: Callable[[], None]) -> None:
        super().__init__()
        self.refuse = refuse

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draws = getattr(func, "__name__", "") in _IN_PLACE
        if draws and not any(isinstance(leaf, Proxy) for leaf in tree_leaves((args, kwargs))):
            self.refuse()
        return func(*args, **kwargs)


def guards(refuse: Callable[[], None]) -> dict[Any, Callable[..., Any]]:
    """Return what stands in for the functions of Python's and NumPy's generators while a module is traced."""
    return {function: _guard(function, refuse) for function in _DRAWS}


def _guard(original: Callable[..., Any], refuse: Callable[[], None]) -> Callable[..., Any]:
    def draw(*args: Any, **kwargs: Any) -> Any:
        refuse()
        return original(*args, **kwargs)

    return draw
