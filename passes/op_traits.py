"""What passes may assume of an operation: one table, and nothing of an operation that is not in it.

``pege_fx.passes.graph.traits_of`` answers for a node. A trait is stated for operations whose every call has it, or by a rule
that looks at the call. ``tests/passes/test_op_traits.py`` runs each entry on tensors and looks at memory and values.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pege_fx.decompositions.recurrent import given_or_zeros, recurrent
from pege_fx.modules.autocast import SWITCHES
from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.modules.mode import CHECKS, TrainingMode, contains, length, select_by_mode, written
from pege_fx.numerics.functional import dequantize, dynamic_qparams, quantize
from pege_fx.numerics.packing import unpack
from pege_fx.passes import op_rules as rules
from pege_fx.passes.op_rules import Call

# A function, a method's name, a module's class, or "package.module.name" of what is not imported here.
Target: TypeAlias = Any


@dataclass(frozen=True, kw_only=True)
class OpTraits:
    """What passes may assume of an operation. The defaults assume nothing.

    Attributes:
        view: the result shares memory with the first argument (True), with no argument (False), or that is not known, and
            it is treated as a view and as a copy, whichever is unsafe (None).
        writes: the operation may change what it is given, other than by ``inplace``, ``out`` or a name that ends in ``_``.
        random: two calls with the same arguments may give different results.
        reads_data: the result depends on what tensors hold, and not on their shape, type and place alone.
        identity_in_eval: it returns its input unchanged in evaluation. In training it may drop a part of it.
        keeps_sign: a non-negative first argument gives a non-negative result.
        non_negative: the result is never negative: in every call (True), or in those of which the rule says so. NaN counts
            as non-negative: no code of a grid stands for it.
        joins: the elements of the result are those of all tensors in its first argument, in another arrangement.
        transposes: it exchanges two dimensions and does nothing else.
        keeps_rank: the result has as many dimensions as the first argument.
        rank: how many dimensions the result must have, or the rule that says it; None: not known.
    """

    view: bool | None = None
    writes: bool = True
    random: bool = True
    reads_data: bool = True
    identity_in_eval: bool = False
    keeps_sign: bool = False
    non_negative: bool | Callable[[Call], bool] = False
    joins: bool = False
    transposes: bool = False
    keeps_rank: bool = False
    rank: int | Callable[[Call], int | None] | None = None


UNKNOWN = OpTraits()
TRAITS: dict[Target, OpTraits] = {}

_NEW = OpTraits(view=False, writes=False, random=False)
_VIEW = OpTraits(view=True, writes=False, random=False)
_EITHER = OpTraits(view=None, writes=False, random=False)
_ASKING = OpTraits(view=None, writes=False, random=False, reads_data=False)


def _state(traits: OpTraits, names: str = "", *, operators: str = "", modules: str = "") -> None:
    """Make an entry for each operation: functions of torch and ``torch.nn.functional`` and methods by name, and the others."""
    made: dict[Target, OpTraits] = {getattr(operator, name): traits for name in operators.split()}
    made |= {getattr(nn, name): traits for name in modules.split()}
    for name in names.split():
        made |= {getattr(space, name): traits for space in (torch, F) if callable(getattr(space, name, None))}
        made |= {name: traits} if hasattr(Tensor, name) else {}
    assert not TRAITS.keys() & made.keys(), f"stated twice: {TRAITS.keys() & made.keys()}"
    TRAITS.update(made)


# One line for operations with the same traits; a name stands once.
_state(
    _NEW,
    """
    acosh addbmm addcdiv addcmul addmm addmv addr affine_grid all allclose aminmax angle any arange arccos arccosh
    arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere asinh atan2 atanh baddbmm bilinear
    binary_cross_entropy binary_cross_entropy_with_logits bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor block_diag bucketize cdist copysign cosine_similarity cov cross cross_entropy cummax
    cummin cumprod deg2rad det diag_embed diff digamma dist dot embedding embedding_bag equal erfinv eye fix fliplr
    flipud float_power fmax fmin fmod fold frac full full_like gather glu greater greater_equal grouped_mm heaviside
    histc index_add index_copy index_fill index_put inner inverse isclose isfinite isin isneginf isposinf item kron
    kthvalue l1_loss lcm lerp less less_equal lgamma linspace local_response_norm logaddexp logaddexp2 logcumsumexp
    logdet logical_and logical_or logical_xor logit logspace logsumexp masked_scatter matrix_exp mode mse_loss msort mv
    nanmean nanmedian nanquantile nansum new_full new_ones new_zeros nextafter nll_loss nonzero not_equal one_hot ones
    ones_like outer quantile rad2deg scatter scatter_add scatter_reduce searchsorted select_scatter sgn signbit sinc
    slice_scatter smooth_l1_loss std_mean sub subtract take tolist trace tril_indices triu_indices unique
    unique_consecutive var_mean vdot xlogy zeros zeros_like
    """,
    operators="sub and_ or_ xor invert lshift rshift",
    modules="Bilinear Embedding EmbeddingBag Fold GLU GRUCell LSTMCell LocalResponseNorm RNNCell",
)
_state(
    replace(_NEW, keeps_rank=True),
    """
    batch_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d group_norm instance_norm
    layer_norm log_softmax logsigmoid prelu rms_norm tanhshrink celu rsqrt reciprocal log log2 log10 sin cos sinh
    tan asin acos atan neg negative
    """,
    operators="neg",
    modules="""
    BatchNorm1d SyncBatchNorm Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d GroupNorm
    InstanceNorm1d InstanceNorm2d InstanceNorm3d LayerNorm Linear LogSigmoid LogSoftmax RMSNorm Tanhshrink
    """,
)
_state(replace(_NEW, rank=rules.rank_of_linear), "linear")
_state(replace(_NEW, keeps_rank=True, rank=4), modules="BatchNorm2d")
_state(replace(_NEW, keeps_rank=True, rank=5), modules="BatchNorm3d")
_state(
    replace(_NEW, random=True),
    """
    bernoulli empty empty_like gumbel_softmax multinomial new_empty normal rand randint randint_like randn randn_like
    randperm scaled_dot_product_attention
    """,
)
_state(replace(_EITHER, random=True), modules="GRU LSTM RNN MultiheadAttention")  # dropout between layers, of weights
_state(replace(_NEW, random=True, non_negative=True), "rand_like")
_state(replace(_NEW, random=True, keeps_sign=True), "rrelu", modules="RReLU")
_state(
    replace(_NEW, non_negative=True),
    "count_nonzero eq ge gt hypot isinf isnan le logical_not lt ne norm std var",
    operators="eq ge gt le lt ne",
)
_state(
    replace(_NEW, non_negative=True, keeps_rank=True),
    """
    abs absolute cosh erfc exp exp2 hardsigmoid relu relu6 sigmoid softmax softmin softplus square
    """,
    operators="abs",
    modules="Hardsigmoid ReLU ReLU6 Sigmoid Softmax Softmax2d Softmin Softplus",
)
_state(
    replace(_NEW, keeps_sign=True),
    """
    amax amin cumsum index_select masked_select mean median prod repeat rot90 sum take_along_dim tile sort topk
    """,
    modules="Unfold",
)
_state(
    replace(_NEW, keeps_sign=True, keeps_rank=True),
    """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d ceil clone elu erf expm1 flip floor gelu hardshrink hardswish leaky_relu log1p lp_pool1d
    lp_pool2d max_pool1d max_pool2d max_pool3d mish normalize roll round selu sign silu softshrink softsign sqrt tanh
    tril triu trunc
    """,
    modules="""
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d CELU
    CircularPad1d CircularPad2d CircularPad3d ELU GELU Hardshrink Hardswish LPPool1d LPPool2d LeakyReLU MaxPool1d
    MaxPool2d MaxPool3d Mish PReLU ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d
    ReplicationPad3d SELU SiLU Softshrink Softsign Tanh UpsamplingBilinear2d UpsamplingNearest2d ZeroPad1d ZeroPad2d
    ZeroPad3d
    """,
)
_state(replace(_NEW, non_negative=rules.sums), "add", operators="add")
_state(replace(_NEW, non_negative=rules.multiplies), "mul multiply", operators="mul")
_state(replace(_NEW, non_negative=rules.combines), "bmm matmul max maximum min minimum mm", operators="matmul")
_state(replace(_NEW, non_negative=rules.combines, joins=True), "cat concat concatenate stack vstack hstack")
_state(replace(_NEW, non_negative=rules.divides), "div divide floor_divide true_divide", operators="floordiv truediv")
_state(replace(_NEW, non_negative=rules.leaves_a_remainder), "remainder", operators="mod")
_state(replace(_NEW, non_negative=rules.raises), "pow", operators="pow")
_state(
    replace(_NEW, non_negative=rules.averages, keeps_rank=True),
    "avg_pool1d avg_pool2d avg_pool3d",
    modules="AvgPool1d AvgPool2d AvgPool3d",
)
_state(replace(_NEW, non_negative=rules.clamps), "clamp clamp_min clip")
_state(replace(_NEW, non_negative=rules.clamps, keeps_rank=True), "hardtanh", modules="Hardtanh")
_state(replace(_NEW, non_negative=rules.clamps_above), "clamp_max")
_state(replace(_NEW, non_negative=rules.replaces_below, keeps_rank=True), "threshold", modules="Threshold")
_state(replace(_NEW, non_negative=rules.fills), "masked_fill")
_state(replace(_NEW, non_negative=rules.pads, keeps_rank=True), "pad", modules="ConstantPad1d ConstantPad2d ConstantPad3d")
_state(replace(_NEW, non_negative=rules.resizes, keeps_rank=True), "interpolate upsample", modules="Upsample")
_state(replace(_NEW, non_negative=rules.samples), "grid_sample")
_state(replace(_NEW, non_negative=rules.chooses), "where")
_state(_VIEW, "adjoint as_strided dsplit hsplit moveaxis view_as_complex view_as_real vsplit")
_state(
    replace(_VIEW, keeps_sign=True),
    """
    broadcast_to chunk detach diagonal expand expand_as movedim narrow permute select split split_with_sizes squeeze
    tensor_split unbind unsqueeze view view_as
    """,
)
_state(replace(_VIEW, keeps_sign=True, transposes=True), "swapaxes swapdims t transpose")
_state(
    _EITHER,
    """
    atleast_1d atleast_2d atleast_3d bool broadcast_tensors byte cartesian_prod conj cuda diag einsum imag int long
    meshgrid nan_to_num positive ravel real resolve_conj resolve_neg short sum_to_size tensordot type unfold __getitem__
    is_tensor data_ptr
    """,
)
_state(
    replace(_EITHER, keeps_sign=True),
    """
    bfloat16 channel_shuffle contiguous cpu double float half pixel_shuffle pixel_unshuffle repeat_interleave reshape
    reshape_as to type_as unflatten
    """,
    operators="getitem pos",
    modules="ChannelShuffle PixelShuffle PixelUnshuffle Unflatten",
)
_state(replace(_EITHER, keeps_sign=True, rank=rules.rank_of_flat), "flatten", modules="Flatten")
_state(replace(_EITHER, keeps_sign=True, keeps_rank=True, identity_in_eval=True), modules="Identity")
_state(
    replace(_EITHER, random=True, keeps_sign=True, keeps_rank=True, identity_in_eval=True),
    "dropout dropout1d dropout2d dropout3d feature_dropout",
    modules="Dropout Dropout1d Dropout2d Dropout3d",
)
_state(
    replace(_EITHER, random=True, keeps_rank=True, identity_in_eval=True),
    "alpha_dropout feature_alpha_dropout",
    modules="AlphaDropout FeatureAlphaDropout",
)
_state(_ASKING, "get_device is_complex is_contiguous is_floating_point storage_offset stride")
_state(replace(_ASKING, non_negative=True), "dim element_size ndimension nelement numel size")
TRAITS |= {
    "where": replace(TRAITS["where"], non_negative=rules.chooses_by_method),  # its arguments come in another order
    F.unfold: replace(_NEW, keeps_sign=True),  # and no view, as the method of this name is
    **{function: _NEW for function in vars(math).values() if callable(function)},
    **dict.fromkeys((math.sqrt, math.ceil, math.floor, round), replace(_NEW, keeps_sign=True)),
    **dict.fromkeys((int, float, bool, isinstance), _NEW),
    len: replace(_NEW, reads_data=False, non_negative=True),
    abs: replace(_EITHER, non_negative=True),
    **dict.fromkeys((getattr, max, min, sum, tuple, list, dict, slice), _EITHER),
    **dict.fromkeys((quantize, dequantize, dynamic_qparams, unpack, TrainingMode, *SWITCHES, *CHECKS, contains, length), _NEW),
    **dict.fromkeys((FakeQuant, recurrent), replace(_NEW, random=True)),
    **dict.fromkeys((select_by_mode, written, given_or_zeros), _EITHER),
    **dict.fromkeys((f"einops.einops.{name}" for name in ("rearrange", "reduce", "repeat", "einsum", "asnumpy")), _EITHER),
    **dict.fromkeys((f"einops.layers.torch.{name}" for name in ("Rearrange", "Reduce")), _EITHER),
    "torchvision.ops.stochastic_depth.stochastic_depth": replace(_EITHER, random=True, keeps_sign=True, identity_in_eval=True),
}

# Attributes of a tensor, which a graph reads by ``getattr``.
ATTRIBUTES: dict[str, OpTraits] = {
    **dict.fromkeys(("T", "mT"), replace(_VIEW, transposes=True)),
    **dict.fromkeys(("shape", "ndim", "itemsize"), replace(_ASKING, non_negative=True)),
    **dict.fromkeys(
        ("dtype", "device", "layout", "is_cuda", "requires_grad", "names", "is_sparse", "is_nested", "is_quantized"), _ASKING
    ),
}

# The operation that one in place is: ``operator.iadd`` adds.
_IN_PLACE = {
    getattr(operator, f"i{name}"): getattr(operator, name, None) for name in dir(operator) if hasattr(operator, f"i{name}")
}


def traits_of_target(target: Target) -> OpTraits:
    """Return what may be assumed of a function, a method's name or a module's class; ``UNKNOWN`` without an entry.

    An operation in place has the values of the one that is not; of its memory nothing is assumed.
    """
    try:
        found = TRAITS.get(target)
    except TypeError:  # a target that can not be hashed
        return UNKNOWN
    if found is not None:
        return found
    if (base := _out_of_place(target)) is not None:
        return replace(traits_of_target(base), view=None, writes=True, identity_in_eval=False)
    if isinstance(target, str):
        return UNKNOWN
    return TRAITS.get(f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}", UNKNOWN)


def _out_of_place(target: Target) -> Target | None:
    """The function or method that computes what one in place does; None if there is none in the table."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if target in _IN_PLACE:
        return _IN_PLACE[target]
    if not name.endswith("_") or name.endswith("__"):
        return None
    base = name.removesuffix("_")
    if isinstance(target, str):
        return base if base in TRAITS else None
    of_torch = any(getattr(space, name, None) is target for space in (torch, F))
    return next((getattr(space, base) for space in (torch, F) if of_torch and hasattr(space, base)), None)
