"""Layers of neural networks that know their infinite-width kernels.

A layer is a triple of functions. `init_fn(rng, input_shape) -> (output_shape, params)` and `apply_fn(params, inputs,
**kwargs) -> outputs` are an ordinary finite network; `kernel_fn(x1, x2, get)` is its limit of infinitely many channels:
the covariance of its outputs ('nngp') and its tangent kernel ('ntk'). Layers compose by `serial`, `parallel` and
`repeat`.
"""

from nt_core import Bool, Diagonal, MaskedArray, layer, requires, supports_masking, unmask_fn

from nt_stax.attention import AttentionMechanism, GlobalSelfAttention, PositionalEmbedding
from nt_stax.branching import FanInConcat, FanInProd, FanInSum, FanOut
from nt_stax.combinators import parallel, repeat, serial
from nt_stax.convolutions import Conv, ConvLocal, ConvTranspose
from nt_stax.elementwise import (
    ABRelu,
    Abs,
    Cos,
    Elementwise,
    ElementwiseNumerical,
    Erf,
    Exp,
    ExpNormalized,
    Gabor,
    Gaussian,
    Gelu,
    Hermite,
    LeakyRelu,
    Monomial,
    Polynomial,
    Rbf,
    RectifiedMonomial,
    Relu,
    Sigmoid_like,
    Sign,
    Sin,
)
from nt_stax.embedding import Embedding
from nt_stax.gated import GEGLU, GLU, SwiGLU
from nt_stax.graphs import Aggregate, AggregateImplementation
from nt_stax.indexing import Index, Slice
from nt_stax.kinked import Celu, Elu, HardSigmoid, HardSilu, HardSwish, HardTanh, Relu6, Selu
from nt_stax.linear import Dense, Dropout, Flatten, Identity, Scale
from nt_stax.linear_maps import DotGeneral, ImageResize
from nt_stax.normalization import LayerNorm, RMSNorm
from nt_stax.pooling import AvgPool, GlobalAvgPool, GlobalSumPool, SumPool
from nt_stax.smooth import (
    LogSigmoid,
    Mish,
    QuickGelu,
    Sigmoid,
    Silu,
    Softplus,
    SquaredRelu,
    Squareplus,
    Swish,
    Tanh,
)
from nt_stax.windows import Padding

__version__ = "0.1.0"

__all__ = [
    "GEGLU",
    "GLU",
    "ABRelu",
    "Abs",
    "Aggregate",
    "AggregateImplementation",
    "AttentionMechanism",
    "AvgPool",
    "Bool",
    "Celu",
    "Conv",
    "ConvLocal",
    "ConvTranspose",
    "Cos",
    "Dense",
    "Diagonal",
    "DotGeneral",
    "Dropout",
    "Elementwise",
    "ElementwiseNumerical",
    "Elu",
    "Embedding",
    "Erf",
    "Exp",
    "ExpNormalized",
    "FanInConcat",
    "FanInProd",
    "FanInSum",
    "FanOut",
    "Flatten",
    "Gabor",
    "Gaussian",
    "Gelu",
    "GlobalAvgPool",
    "GlobalSelfAttention",
    "GlobalSumPool",
    "HardSigmoid",
    "HardSilu",
    "HardSwish",
    "HardTanh",
    "Hermite",
    "Identity",
    "ImageResize",
    "Index",
    "LayerNorm",
    "LeakyRelu",
    "LogSigmoid",
    "MaskedArray",
    "Mish",
    "Monomial",
    "Padding",
    "Polynomial",
    "PositionalEmbedding",
    "QuickGelu",
    "RMSNorm",
    "Rbf",
    "RectifiedMonomial",
    "Relu",
    "Relu6",
    "Scale",
    "Selu",
    "Sigmoid",
    "Sigmoid_like",
    "Sign",
    "Silu",
    "Sin",
    "Slice",
    "Softplus",
    "SquaredRelu",
    "Squareplus",
    "SumPool",
    "SwiGLU",
    "Swish",
    "Tanh",
    "layer",
    "parallel",
    "repeat",
    "requires",
    "serial",
    "supports_masking",
    "unmask_fn",
]
