"""What nonlinearities do to numbers in a kernel, in operations that Mosaic lowers."""

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from nt_core.activations.arcs import horner
from nt_core.activations.polynomials import ERFC_FLOAT32, P_FLOAT32, Q_FLOAT32

_TINY = float(jnp.finfo(jnp.float32).tiny)


def relu_dual(a: Any, b: Any, root1: Array, root2: Array, deficit: Array) -> tuple[Array, Array, Array]:
    """Returns deficit and covariance after `a min(x, 0) + b max(x, 0)`, and the factor of the tangent kernel.

    As `ABRelu.dual`, from the standard deviations.
    """
    slope, kink = 0.5 * (a * a + b * b), 0.5 * (a - b) * (a - b)
    difference = root1 - root2
    scale = jnp.maximum(root1 * root2, _TINY)
    excess = deficit - 0.5 * difference * difference  # scale (1 - c)
    covariance = scale - excess
    apart = jnp.maximum(jnp.minimum(excess, scale + covariance), _TINY)  # scale (1 - |c|); c = 0 if there is no scale
    # A root of scale and another of w: on GPUs, division and root of a quotient take more instructions.
    inverse = lax.rsqrt(scale)
    w = apart * inverse * inverse
    root = jnp.sqrt(w)
    opposed = scale * (w * root * horner(Q_FLOAT32, w)) + jnp.maximum(-covariance, 0.0)
    angle = root * horner(P_FLOAT32, w)
    angle = jnp.where(covariance < 0, 1 - angle, angle)
    return slope * deficit - kink * opposed, kink * opposed + slope * covariance, slope - kink * angle


def inlined(fn: Callable[..., Any], *args: Any, node: Callable[[int, Array], Sequence[Array]] | None = None) -> Any:
    """Calls `fn` without what Mosaic GPU of JAX 0.11 does not lower: custom derivatives, and functions like `expm1`.

    Args:
      fn: the function.
      args: its arguments.
      node: for functions with loops over the nodes of quadratures, `scan`s over constants: returns, for how many there
        are and the number of one, the latter and its weight.
    """
    leaves, structure = jax.tree.flatten(args)
    jaxpr, shape = jax.make_jaxpr(lambda *leaves: fn(*jax.tree.unflatten(structure, leaves)), return_shape=True)(
        *leaves
    )
    return jax.tree.unflatten(jax.tree.structure(shape), _evaluated(jaxpr.jaxpr, jaxpr.consts, leaves, node))


def _evaluated(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], node: Any) -> Sequence[Any]:
    from jax.extend.core import ClosedJaxpr, Literal  # it imports Pallas, which plans need not

    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(x: Any) -> Any:
        return x.val if isinstance(x, Literal) else values[x]

    for equation in jaxpr.eqns:
        inputs = [read(x) for x in equation.invars]
        inner: Any = equation.params.get("call_jaxpr", equation.params.get("jaxpr"))
        inner, constants = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, [])
        if equation.primitive.name in _INSTEAD:
            outputs = [_INSTEAD[equation.primitive.name](*inputs, **equation.params)]
        elif equation.primitive.name == "scan":
            outputs = _over_nodes(partial(_evaluated, inner, constants, node=node), inputs, len(equation.outvars), node)
        elif inner is None:
            outputs = equation.primitive.bind(*inputs, **equation.params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        else:
            outputs = _evaluated(inner, constants, inputs, node)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]


def _over_nodes(
    body: Callable[[Sequence[Any]], Sequence[Array]], inputs: list[Array], n_carry: int, node: Any
) -> Sequence[Array]:
    """A loop that returns what it carries. Its inputs: constants of the loop, what is carried, nodes and weights."""
    *constants, at, _ = inputs
    constants, carry = constants[:-n_carry], constants[-n_carry:]
    like = next(x for x in constants if jnp.shape(x) == jnp.shape(carry[0]))
    start = [x + 0 * like for x in carry]  # laid out as what is added to it

    def add(k: Array, carry: Sequence[Array]) -> Sequence[Array]:
        return body([*constants, *carry, *node(len(at), k)])

    return lax.fori_loop(jnp.int32(0), jnp.int32(len(at)), add, start)


def _integer_pow(x: Array, y: int) -> Array:
    power = reduce(operator.mul, [x] * abs(y), jnp.ones_like(x))
    return power if y >= 0 else 1 / power


def _expm1(x: Array, **_: Any) -> Array:
    near_zero = x * horner(tuple(1 / math.factorial(k) for k in range(1, 9)), x)
    return jnp.where(jnp.abs(x) < 0.5, near_zero, jnp.exp(x) - 1)


def _sinh(x: Array, **_: Any) -> Array:
    rise = _expm1(jnp.abs(x))
    half = 0.5 * (rise + rise / (1 + rise))
    return jnp.where(x < 0, -half, half)


def _log1p(x: Array, **_: Any) -> Array:
    rounded = 1 + x  # what rounding has changed, the logarithm and its argument's distance from 1 have in common
    is_one = rounded == 1
    return jnp.where(is_one, x, jnp.log(rounded) * (x / jnp.where(is_one, 1, rounded - 1)))


def _erfc(x: Array, **_: Any) -> Array:
    """For `x >= 0`."""
    near_zero = 1 / (1 + 0.5 * x)
    return jnp.exp(-x * x) * near_zero * horner(ERFC_FLOAT32, near_zero)


_INSTEAD = {"integer_pow": _integer_pow, "expm1": _expm1, "sinh": _sinh, "log1p": _log1p, "erfc": _erfc}
