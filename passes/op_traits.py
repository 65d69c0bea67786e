"""What passes may assume of an operation: one table, and nothing of an operation that is not in it.

``traits_of`` answers for any node. A trait is stated for operations whose every call has it; ``tests/passes/test_op_traits.py``
runs each of them on tensors and looks at memory and values.
"""

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from pege_fx.decompositions.recurrent import given_or_zeros, recurrent
from pege_fx.modules.autocast import SWITCHES
from pege_fx.modules.calls import beside_forward
from pege_fx.modules.fake_quant import FakeQuant
from pege_fx.modules.mode import CHECKS, TrainingMode, contains, length, select_by_mode, written
from pege_fx.numerics.functional import dequantize, quantize
from pege_fx.numerics.packing import unpack
from pege_fx.numerics.recompute import original_of

# A function, a method's name, a module's class, or "package.module.name" of what is not imported here.
Target: TypeAlias = Any


@dataclass(frozen=True, kw_only=True)
class OpTraits:
    """What passes may assume of an operation. The defaults assume nothing.

    Attributes:
        view: the result shares memory with the first argument (True), with no argument (False), or that is not known, and
            it is treated as a view and as a copy, whichever is unsafe (None).
        writes: the operation may change what it is given, other than by ``inplace``, ``out`` or a name that ends in ``_``.
        identity_in_eval: it returns its input unchanged in evaluation, and drops something of it in training.
    """

    view: bool | None = None
    writes: bool = True
    identity_in_eval: bool = False


UNKNOWN = OpTraits()
_NEW = OpTraits(view=False, writes=False)
_VIEW = OpTraits(view=True, writes=False)
_EITHER = OpTraits(view=None, writes=False)
_DROPPING = replace(_EITHER, identity_in_eval=True)

# Names of functions of torch and of torch.nn.functional, and of methods, that are the same operation wherever they are found.
_MAKING = """
    abs absolute acos acosh add addbmm addcdiv addcmul addmm addmv addr all allclose amax amin aminmax angle any arange
    arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort argwhere asin asinh atan atan2 atanh
    baddbmm bernoulli bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
    block_diag bmm bucketize cat cdist ceil clamp clamp_max clamp_min clip clone concat concatenate copysign cos cosh
    cosine_similarity count_nonzero cov cross cummax cummin cumprod cumsum deg2rad det diag_embed diff digamma dist div
    divide dot empty empty_like eq equal erf erfc erfinv exp exp2 expm1 eye fix flip fliplr flipud float_power floor
    floor_divide fmax fmin fmod frac full full_like gather ge greater greater_equal gt heaviside histc hstack hypot
    index_add index_copy index_fill index_put index_select inner inverse isclose isfinite isin isinf isnan isneginf
    isposinf item kron kthvalue lcm lerp less less_equal lgamma linspace log log10 log1p log2 logaddexp logaddexp2
    logcumsumexp logdet logical_and logical_not logical_or logical_xor logit logspace logsumexp lt le masked_fill
    masked_scatter masked_select matmul matrix_exp maximum mean median min minimum max mm mode msort mul multinomial
    multiply mv nanmean nanmedian nanquantile nansum ne neg negative new_empty new_full new_ones new_zeros nextafter
    nonzero norm normal not_equal ones ones_like outer pow prod quantile rad2deg rand rand_like randint randint_like randn
    randn_like randperm reciprocal remainder repeat roll rot90 round rsqrt scatter scatter_add scatter_reduce searchsorted
    select_scatter sgn sign signbit sin sinc sinh slice_scatter sort sqrt square stack std std_mean sub subtract sum take
    take_along_dim tan tile tolist topk trace tril tril_indices triu triu_indices true_divide trunc unique
    unique_consecutive var var_mean vdot vstack where xlogy zeros zeros_like adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d affine_grid avg_pool1d avg_pool2d
    avg_pool3d batch_norm bilinear binary_cross_entropy binary_cross_entropy_with_logits celu conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d cross_entropy elu embedding_bag fold gelu glu grid_sample
    group_norm grouped_mm gumbel_softmax hardshrink hardsigmoid hardswish hardtanh instance_norm interpolate rrelu
    embedding l1_loss layer_norm leaky_relu linear local_response_norm log_softmax logsigmoid max_pool1d max_pool2d
    max_pool3d mish mse_loss nll_loss normalize one_hot pad prelu relu relu6 rms_norm scaled_dot_product_attention selu
    sigmoid silu smooth_l1_loss softmax softmin softplus softshrink softsign tanh tanhshrink threshold
"""
_VIEWING = """
    adjoint as_strided broadcast_to chunk detach diagonal dsplit expand expand_as hsplit moveaxis movedim narrow permute
    select split split_with_sizes squeeze swapaxes swapdims t tensor_split transpose unbind unsqueeze view view_as
    view_as_complex view_as_real vsplit
"""
_MAY_VIEW = """
    atleast_1d atleast_2d atleast_3d bfloat16 bool broadcast_tensors byte cartesian_prod channel_shuffle conj contiguous
    cpu cuda diag double einsum flatten float half imag int long meshgrid pixel_shuffle pixel_unshuffle positive ravel
    real repeat_interleave reshape reshape_as resolve_conj resolve_neg short sum_to_size to type type_as unflatten
    nan_to_num tensordot is_tensor numel size dim stride is_floating_point is_complex data_ptr element_size get_device
    is_contiguous nelement ndimension storage_offset unfold __getitem__
"""
_DROPOUTS = """
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout
"""

_MAKING_MODULES = """
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d AvgPool1d
    AvgPool2d AvgPool3d BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm Bilinear CELU Conv1d Conv2d Conv3d
    ConvTranspose1d ConvTranspose2d ConvTranspose3d ELU Embedding EmbeddingBag Fold GELU GLU GRUCell GroupNorm Hardshrink
    Hardsigmoid Hardswish Hardtanh InstanceNorm1d InstanceNorm2d InstanceNorm3d LSTMCell LayerNorm LeakyReLU Linear
    LocalResponseNorm LogSigmoid LogSoftmax MaxPool1d MaxPool2d MaxPool3d Mish PReLU RMSNorm RNNCell ReLU ReLU6
    ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d SELU SiLU Sigmoid
    Softmax Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold Unfold Upsample UpsamplingBilinear2d
    UpsamplingNearest2d ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d
"""
_OTHER_MODULES = """
    Identity Flatten Unflatten ChannelShuffle PixelShuffle PixelUnshuffle GRU LSTM RNN MultiheadAttention
"""
_DROPOUT_MODULES = """
    Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout
"""

_ARITHMETIC = """
    add sub mul truediv floordiv mod pow neg abs matmul and_ or_ xor invert lshift rshift lt le eq ne ge gt
"""


def _everywhere(text: str, traits: OpTraits) -> dict[Target, OpTraits]:
    """An entry for each function and method of these names."""
    names = text.split()
    functions = [getattr(space, name) for name in names for space in (torch, F) if hasattr(space, name)]
    return dict.fromkeys([*functions, *(name for name in names if hasattr(Tensor, name))], traits)


def _of_modules(names: str, traits: OpTraits) -> dict[Target, OpTraits]:
    return {getattr(nn, name): traits for name in names.split()}


TRAITS: dict[Target, OpTraits] = {
    **_everywhere(_MAKING, _NEW),
    **_everywhere(_VIEWING, _VIEW),
    **_everywhere(_MAY_VIEW, _EITHER),
    **_everywhere(_DROPOUTS, _DROPPING),
    **_of_modules(_MAKING_MODULES, _NEW),
    **_of_modules(_OTHER_MODULES, _EITHER),
    **_of_modules(_DROPOUT_MODULES, _DROPPING),
    **{getattr(operator, name): _NEW for name in _ARITHMETIC.split()},
    **{function: _NEW for function in vars(math).values() if callable(function)},
    **dict.fromkeys((len, int, float, bool, round, isinstance), _NEW),
    **dict.fromkeys((operator.getitem, getattr, max, min, sum, abs, tuple, list, dict, slice), _EITHER),
    **dict.fromkeys(
        (quantize, dequantize, unpack, FakeQuant, TrainingMode, *SWITCHES, *CHECKS, contains, length, recurrent),
        _NEW,
    ),
    **dict.fromkeys((select_by_mode, written, given_or_zeros), _EITHER),
    **dict.fromkeys((f"einops.einops.{name}" for name in ("rearrange", "reduce", "repeat", "einsum", "asnumpy")), _EITHER),
    **dict.fromkeys((f"einops.layers.torch.{name}" for name in ("Rearrange", "Reduce")), _EITHER),
    "torchvision.ops.stochastic_depth.stochastic_depth": _DROPPING,
}


def traits_of(root: nn.Module, node: Node) -> OpTraits:
    """Return what may be assumed of a node's operation; ``UNKNOWN`` where the table has no entry.

    A module is what its class says, exactly: a subclass, hooks or a ``forward`` of its own may do anything.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return _EITHER
    target: Any = original_of(node.target)
    if node.op == "call_module":
        module = operator.attrgetter(str(target))(root)
        target = None if beside_forward(module) else type(module)
    try:
        found = TRAITS.get(target)
    except TypeError:  # a target that can not be hashed
        return UNKNOWN
    if found is None and not isinstance(target, str):
        found = TRAITS.get(f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}")
    return UNKNOWN if found is None else found


def may_write(root: nn.Module, node: Node) -> bool:
    """Tell whether a function or method may change what it is given: by the table, or as it did on the example inputs."""
    if node.op not in ("call_function", "call_method") or not traits_of(root, node).writes:
        return False
    return bool(node.meta.get("writes", True))
