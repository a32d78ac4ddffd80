"""Networks of layers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random
from nt_core import Kernel, Rule, Run, Value, apply_rules, layer, rules_of
from nt_core.authoring import (
    check_diagonals,
    emit_all,
    function_rule,
    in_parallel,
    in_series,
    is_of_layer,
    swallow_kwargs,
)

Layer = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


@layer
def serial(*layers: Layer):
    """Composes layers: each takes what the one before it gives.

    Args:
      *layers: triples `(init_fn, apply_fn, kernel_fn)`. A `kernel_fn` that does not come from a layer is a function
        `kernel_fn(kernel, **kwargs)` of materialised kernels.

    The parameters are a list of those of the layers.

    >>> from nt_stax import Dense, Relu, serial
    >>> init_fn, apply_fn, kernel_fn = serial(Dense(512), Relu(), Dense(10))
    >>> output_shape, params = init_fn(random.key(0), (-1, 3))
    >>> print(output_shape, apply_fn(params, jnp.ones((2, 3))).shape)
    (-1, 10) (2, 10)
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp"))
    [[0.5]]
    """
    init_fns, apply_fns, rules = _parts("serial", layers)

    def init_fn(rng, input_shape):
        params = []
        for init in init_fns:
            rng, layer_rng = random.split(rng)
            input_shape, layer_params = init(layer_rng, input_shape)
            params.append(layer_params)
        return input_shape, params

    def apply_fn(params, inputs, *, rng=None, **kwargs):
        _check_params("serial", params, len(apply_fns))
        for apply, layer_params, layer_rng in zip(apply_fns, params, _split(rng, len(apply_fns)), strict=True):
            inputs = apply(layer_params, inputs, rng=layer_rng, **kwargs)
        return inputs

    return init_fn, apply_fn, tuple(rule for layer_rules in rules for rule in layer_rules)


@layer
def parallel(*layers: Layer):
    """Applies each of several layers to an input of its own.

    Args:
      *layers: triples `(init_fn, apply_fn, kernel_fn)`.

    Inputs are a list or tuple with one entry (an array, a shape, a `Kernel`, or lists and tuples of these) for each
    layer, as `FanOut` gives it; so are the outputs. The parameters are a list of those of the layers.

    >>> from nt_stax import Dense, FanInSum, FanOut, parallel, serial
    >>> _, _, kernel_fn = serial(FanOut(2), parallel(Dense(512), Dense(512, W_std=2.0)), FanInSum())
    >>> print(kernel_fn(jnp.ones((1, 3)), None, "nngp"))
    [[5.]]
    """
    init_fns, apply_fns, rules = _parts("parallel", layers)
    requirements = [in_series(*(rule.requirements for rule in branch)) for branch in rules]

    def init_fn(rng, input_shape):
        branches = _branches("parallel", input_shape, len(init_fns))
        rngs = random.split(rng, len(init_fns))
        initialised = [init(r, shape) for init, r, shape in zip(init_fns, rngs, branches, strict=True)]
        return type(input_shape)(shape for shape, _ in initialised), [params for _, params in initialised]

    def apply_fn(params, inputs, *, rng=None, **kwargs):
        _check_params("parallel", params, len(apply_fns))
        branches = _branches("parallel", inputs, len(apply_fns))
        rngs = _split(rng, len(apply_fns))
        return type(inputs)(
            apply(p, x, rng=r, **kwargs) for apply, p, x, r in zip(apply_fns, params, branches, rngs, strict=True)
        )

    def emit_branches(builder, values):
        branches = checked(values)
        return type(values)(
            emit_all(branch_rules, builder, branch) for branch_rules, branch in zip(rules, branches, strict=True)
        )

    def apply_branches(kernels, run: Run):
        branches = checked(kernels)
        return type(kernels)(
            apply_rules(branch_rules, branch, run) for branch_rules, branch in zip(rules, branches, strict=True)
        )

    def checked(values):
        """Returns the branches: each must hold what all the layers of its branch require."""
        branches = _branches("parallel", values, len(rules))
        for i, (branch, required) in enumerate(zip(branches, requirements, strict=True)):
            if isinstance(branch, Kernel):
                check_diagonals(required, branch, f"Branch {i} of parallel")
            elif isinstance(branch, Value):
                check_diagonals(required, branch.spec, f"Branch {i} of parallel")
        return branches

    return init_fn, apply_fn, Rule("parallel", in_parallel(*requirements), emit_branches, apply_branches)


@layer
def repeat(layer: Layer, n: int):
    """Composes `n` copies of a layer, each with parameters of its own.

    The same as `serial(*[layer] * n)`, compiled once for all copies. The layer must leave the shape of its inputs as it
    is. The parameters are those of the layer, stacked along a leading axis of size `n`.

    Args:
      layer: a triple `(init_fn, apply_fn, kernel_fn)`.
      n: number of copies.

    >>> from nt_stax import Dense, Relu, repeat, serial
    >>> init_fn, apply_fn, kernel_fn = repeat(serial(Dense(16, W_std=2.0**0.5), Relu()), 50)
    >>> _, params = init_fn(random.key(0), (-1, 16))
    >>> print(params[0][0].shape)
    (50, 16, 16)
    >>> print(kernel_fn(jnp.ones((1, 16)), None, "nngp").round(3))
    [[1.]]
    """
    (layer_init,), (layer_apply,), (rules,) = _parts("repeat", (layer,))
    if n < 0:
        raise ValueError(f"A layer cannot be repeated {n} times.")

    def init_fn(rng, input_shape):
        copies = []
        for _ in range(n):
            rng, layer_rng = random.split(rng)
            output_shape, params = layer_init(layer_rng, input_shape)
            if output_shape != input_shape:
                raise ValueError(
                    f"`repeat` needs a layer that keeps the shape of its inputs, got one that turns {input_shape} into "
                    f"{output_shape}. Change its padding or number of channels, or use `serial`."
                )
            copies.append(params)
        return input_shape, jax.tree.map(lambda *leaves: jnp.stack(leaves), *copies) if copies else ()

    def apply_fn(params, inputs, *, rng=None, **kwargs):
        if n == 0:
            return inputs
        copies = (params, None if rng is None else random.split(rng, n))
        first, rest = (jax.tree.map(lambda leaf, at=at: leaf[at], copies) for at in (0, slice(1, None)))
        # The first copy may change the type of its inputs, which a loop must keep: to floating point, or to masked.
        outputs = layer_apply(first[0], inputs, rng=first[1], **kwargs)

        def step(outputs, copy):
            return layer_apply(copy[0], outputs, rng=copy[1], **kwargs), None

        return lax.scan(step, outputs, rest, length=n - 1)[0]

    return init_fn, apply_fn, rules * n


def _parts(name: str, layers: Sequence[Layer]) -> tuple[list, list, list[tuple[Rule, ...]]]:
    """Returns the `init_fn`s, the `apply_fn`s and the rules of layers."""
    for i, candidate in enumerate(layers):
        if not isinstance(candidate, tuple | list) or len(candidate) != 3 or not all(map(callable, candidate)):
            given = getattr(candidate, "__name__", repr(candidate))
            raise TypeError(
                f"{name}: argument {i} is no layer (init_fn, apply_fn, kernel_fn), got {given}. Layers are the results "
                "of calls: `Relu()`, not `Relu`."
            )
    return (
        [init_fn for init_fn, _, _ in layers],
        [swallow_kwargs(apply_fn) for _, apply_fn, _ in layers],
        [_rules(init_fn, kernel_fn) for init_fn, _, kernel_fn in layers],
    )


def _rules(init_fn: Callable[..., Any], kernel_fn: Callable[..., Any]) -> tuple[Rule, ...]:
    """Returns the rules of a layer, of which a `kernel_fn` that is no layer's is any function of kernels."""
    if is_of_layer(kernel_fn):
        return rules_of(kernel_fn)
    return (function_rule(kernel_fn, getattr(kernel_fn, "__name__", "kernel_fn"), init_fn),)


def _branches(name: str, inputs: Any, n: int) -> Sequence[Any]:
    if not isinstance(inputs, list | tuple) or len(inputs) != n:
        given = f"{len(inputs)}" if isinstance(inputs, list | tuple) else "a single one"
        raise ValueError(
            f"{name} of {n} layers takes a list or tuple of {n} inputs, e.g. from FanOut({n}), got {given}."
        )
    return inputs


def _check_params(name: str, params: Any, n: int) -> None:
    if len(params) != n:
        raise ValueError(f"{name} of {n} layers takes a list of {n} parameters, as init_fn gives, got {len(params)}.")


def _split(rng: Array | None, n: int) -> Any:
    return [None] * n if rng is None else random.split(rng, n)
