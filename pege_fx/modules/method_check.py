"""A forward method against what would be deployed of it: levels, zero points and codes, compared when it is first used.

Training computes restore(discretizer(transform(x))) with the grid of ``qparams``. Evaluation and ``convert`` compute codes by
``encoding`` (of a weight by ``transform``) and their values by ``decoding``. Where somebody's own class says two different
functions, it is refused: nothing is deployed that was not trained.
"""

import torch
from torch import Tensor

from pege_fx.errors import ConvertError
from pege_fx.modules.forward_method import ForwardMethod
from pege_fx.numerics.functional import codes_of

_PARTS = ("qparams", "transform", "restore", "encoding", "decoding")
_SHARE_OF_A_STEP = 0.02  # 255 steps that float32 computes from two points are off by less


def is_own(method: ForwardMethod) -> bool:
    """Tell whether all that says the function of a method is this package's: tested there, and not again."""
    return all(getattr(type(method), part).__module__.startswith("pege_fx.") for part in _PARTS)


@torch.no_grad()
def check_method(method: ForwardMethod, site: str, dtype: torch.dtype, rank: int | None) -> None:
    """Compare the levels and codes of training with those that are deployed.

    Args:
        method: initialised.
        site: names it in errors.
        dtype: of the tensor that is quantized.
        rank: number of its dimensions; None, where no tensor is known, compares levels alone.

    Raises:
        ConvertError: if the scale is not positive and finite, a zero point is not whole, or a level or a code differs; with
            the values.
    """
    where = f"{type(method).__name__} ({site}, {str(dtype).removeprefix('torch.')})"
    if method.is_dynamic:
        return  # there is one function: what ``qparams`` says of a tensor is what is trained and deployed
    scale, zero_point, _ = method.grid_of()
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ConvertError(
            f"{where}: qparams() gives the scale {_first(scale, ~(scale > 0))}.\n  give a positive and finite one."
        )
    _check_whole(where, "qparams()", zero_point)
    _check_levels(where, method, scale, zero_point, dtype)
    if rank is not None and method.kind == "activation" and method.spec.number_format.is_integer and _says_codes(method):
        _check_codes(where, method, scale, zero_point, dtype, rank)


def _says_codes(method: ForwardMethod) -> bool:
    """Whether codes are deployed by something else than ``qparams`` alone; what does not say how is refused by ``encoding``."""
    cls = type(method)
    return cls.encoding is not ForwardMethod.encoding


def _first(values: Tensor, wrong: Tensor) -> float:
    return float(values[wrong | ~values.isfinite()].flatten()[0])


def _check_whole(where: str, source: str, zero_point: Tensor | None) -> None:
    if zero_point is None or bool((zero_point == zero_point.round()).all()):
        return
    found = _first(zero_point, zero_point != zero_point.round())
    raise ConvertError(
        f"{where}: {source} gives the zero point {found}, which is no whole number: codes are.\n"
        "  round it (with a straight-through gradient if it is learned)."
    )


def _check_levels(where: str, method: ForwardMethod, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> None:
    decoded, offset = method.decoding()
    codes = method.spec.number_format.levels
    wide = scale.dtype
    trained = torch.stack([_restored(method, code, scale, zero_point, dtype).to(wide) for code in codes])
    deployed = torch.stack([(code - (0.0 if offset is None else offset)) * decoded.to(wide) for code in codes])
    trained, deployed = trained + 0 * deployed, deployed + 0 * trained  # of one shape
    largest = trained.abs().amax()
    allowed = _SHARE_OF_A_STEP * decoded.to(wide).abs() + 4 * torch.finfo(dtype).eps * largest
    wrong = ~((trained - deployed).abs() <= allowed)
    if not bool(wrong.any()):
        return
    column = wrong.reshape(len(codes), -1).any(0).nonzero()[0, 0]  # of one channel
    expected, found = (values.reshape(len(codes), -1)[:, column].tolist() for values in (trained, deployed))
    raise ConvertError(
        f"{where}: what is trained is not what would be deployed.\n"
        f"  levels in training: {_listed(expected)}\n  levels deployed:    {_listed(found)}\n"
        "  a deployed level is scale * (code - zero point): restore() has to be affine, and decoding() to say the same."
    )


def _restored(method: ForwardMethod, code: float, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What training gives for a code."""
    value = (code - (0.0 if zero_point is None else zero_point)) * scale
    return method.restore(value.to(dtype))


def _check_codes(
    where: str, method: ForwardMethod, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype, rank: int
) -> None:
    scale_of_codes, offset, lower, width = method.encoding()
    _check_whole(where, "encoding()", offset)
    number_format, bounds = method.spec.number_format, (method.q_min, method.q_max)
    # A quarter of a step beside each code, and beyond both ends: nowhere near a tie.
    asked = torch.arange(bounds[0] - 3, bounds[1] + 3.5, 0.5, dtype=torch.float32, device=scale.device) + 0.25
    x = (asked - (0.0 if offset is None else offset)) * scale_of_codes
    x = x if lower is None or width is None else x * width + lower
    x = x.to(dtype).reshape((1,) * (rank - 1) + (-1,))
    trained = codes_of(method.transform(x), scale, number_format, zero_point)
    interval = None if lower is None or width is None else (lower, width)
    deployed = codes_of(x, scale_of_codes, number_format, offset, interval)
    near_a_tie = 2.0 * torch.finfo(dtype).eps * (asked.abs() + 1).reshape(x.shape) > 0.2  # half types round x itself
    wrong = (trained != deployed) & ~near_a_tie
    if bool(wrong.any()):
        values, expected, found = (values[wrong].flatten()[:8].tolist() for values in (x.float(), trained, deployed))
        raise ConvertError(
            f"{where}: encoding() says other codes than training has.\n"
            f"  values: {_listed(values)}\n  codes in training: {_listed(expected)}\n  codes deployed:    {_listed(found)}\n"
            "  code = clamp(round((x - lower) / width / scale) + zero_point) has to be what transform() and qparams() give."
        )


def _listed(values: list[float]) -> str:
    shown = [f"{value:.4g}" for value in values]
    return ", ".join(shown if len(shown) <= 16 else [*shown[:8], "...", *shown[-7:]])
