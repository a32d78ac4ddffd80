"""What the author of a layer needs beside `nt_core` itself.

`Kernel.map`, `Kernel.rescale` and `Kernel.matrices` serve most layers that are functions of kernels. Here is what is
left: functions of arrays in a kernel's layout, kernels of several branches, and what combinators of layers are made of.

A layer that emits steps where it can, and is a function of kernels otherwise:

>>> import jax.numpy as jnp
>>> from nt_core import Rule, layer, steps
>>> from nt_core.authoring import NoStep
>>> @layer
... def Scale(factor, by_steps=True):
...     def init_fn(rng, input_shape):
...         return input_shape, ()
...     def apply_fn(params, inputs, **kwargs):
...         return factor * inputs
...     def emit(builder, value):
...         if not by_steps:
...             raise NoStep
...         return builder.add(steps.Combine((factor**2,)), value)
...     def function(kernel, run):
...         return kernel * factor
...     return init_fn, apply_fn, Rule("Scale", emit=emit, function=function)
>>> for by_steps in (True, False):
...     print(Scale(3.0, by_steps)[2](jnp.ones((1, 1)), None, "nngp"))
[[9.]]
[[9.]]
"""

from nt_core.indexing import expand_index, index_mask
from nt_core.kernel import combine
from nt_core.layer import function_rule, is_of_layer, swallow_kwargs
from nt_core.layouts import (
    from_positions,
    interleave_ones,
    make_2d,
    reverse_zipped,
    same_sample,
    to_positions,
    transpose_zipped,
    unzip_axes,
    zip_axes,
    zipped_diagonal,
)
from nt_core.requirements import check_diagonals, in_parallel, in_series
from nt_core.rules import NoStep, emit_all
from nt_core.tracing import is_traced

__all__ = [
    "NoStep",
    "check_diagonals",
    "combine",
    "emit_all",
    "expand_index",
    "from_positions",
    "function_rule",
    "in_parallel",
    "in_series",
    "index_mask",
    "interleave_ones",
    "is_of_layer",
    "is_traced",
    "make_2d",
    "reverse_zipped",
    "same_sample",
    "swallow_kwargs",
    "to_positions",
    "transpose_zipped",
    "unzip_axes",
    "zip_axes",
    "zipped_diagonal",
]
