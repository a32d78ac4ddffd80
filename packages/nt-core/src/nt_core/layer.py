"""The layer protocol: what turns `(init_fn, apply_fn, kernel rule)` into a layer that users call."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp

from nt_core.backends import Implementation, Request
from nt_core.get import Get, as_named, parse_get
from nt_core.kernel import Kernel
from nt_core.masks import MaskedArray, get_masked_array
from nt_core.requirements import NO_REQUIREMENTS, check_diagonals, in_series, resolve
from nt_core.rules import Rule, Run, apply_rules, collect, collect_masked
from nt_core.sources import Inputs, make_inputs, with_batch_sizes
from nt_core.trees import nt_tree_leaves, nt_tree_map

_F = TypeVar("_F", bound=Callable[..., Any])
_KERNEL_FIELDS = tuple(f.name for f in dataclasses.fields(Kernel))


def layer(layer_fn: _F) -> _F:
    """Decorates the constructor of a layer.

    The constructor returns `(init_fn, apply_fn, kernel_fn)`. Here `kernel_fn` maps a `Kernel` (or nested lists and
    tuples of them) to another, as `kernel_fn(k, **kwargs)`. In the decorated layer `kernel_fn` also takes arrays, and
    `get`. The decorator works on functions and on methods.

    >>> from nt_core import layer
    >>> @layer
    ... def Double():
    ...     init_fn = lambda rng, input_shape: (input_shape, ())
    ...     apply_fn = lambda params, inputs, **kwargs: 2.0 * inputs
    ...     kernel_fn = lambda k, **kwargs: k * 2.0
    ...     return init_fn, apply_fn, kernel_fn
    >>> _, _, kernel_fn = Double()
    >>> kernel_fn(jnp.ones((1, 3)), None, "nngp")
    Array([[4.]], dtype=float32)
    """

    @functools.wraps(layer_fn)
    def constructor(*args, **kwargs):
        init_fn, apply_fn, rule = layer_fn(*args, **kwargs)
        name = layer_fn.__name__
        kernel_fn = make_kernel_fn(_as_rules(rule, name, init_fn))
        for fn in (init_fn, apply_fn, kernel_fn):
            fn.__name__ = name
        return init_fn, swallow_kwargs(apply_fn), kernel_fn

    return constructor  # type: ignore[return-value]


def supports_masking(remask_kernel: bool) -> Callable[[_F], _F]:
    """Decorates the constructor of a layer that works with masks. It stands below `layer`.

    The constructor returns `(init_fn, apply_fn, kernel_fn)` or `(init_fn, apply_fn, kernel_fn, mask_fn)`, where
    `apply_fn(params, inputs, *, mask=None, **kwargs)` gets inputs with zeros at masked entries and the boolean mask,
    and `mask_fn(mask, input_shape)` returns the mask of the outputs (by default that of the inputs).

    Args:
      remask_kernel: the layer's kernel is not zero at masked positions by itself, and must be zeroed there.
    """

    def decorate(layer_fn: _F) -> _F:
        @functools.wraps(layer_fn)
        def constructor(*args, **kwargs):
            functions = layer_fn(*args, **kwargs)
            if len(functions) not in (3, 4):
                raise ValueError(
                    f"{layer_fn.__name__} must return (init_fn, apply_fn, kernel_fn) or (init_fn, apply_fn, kernel_fn, "
                    f"mask_fn), got {len(functions)} values."
                )
            init_fn, apply_fn, rule = functions[:3]
            mask_fn = functions[3] if len(functions) == 4 else lambda mask, input_shape: mask
            mask_fn = _skip_without_mask(mask_fn)
            (rule,) = _as_rules(rule, layer_fn.__name__, init_fn)
            rule = dataclasses.replace(rule, mask_fn=mask_fn, remask=remask_kernel)
            return init_fn, _masked_apply(apply_fn, mask_fn), rule

        return constructor  # type: ignore[return-value]

    return decorate


def make_kernel_fn(rules: tuple[Rule, ...]) -> Callable[..., Any]:
    """Returns the public `kernel_fn` of a layer or network with these rules."""
    requirements = in_series(*(rule.requirements for rule in rules))
    # Programs are remembered as long as the network is there: their coefficients may be traced, and live no longer.
    remembering, remembering_masked = _Remembering(collect), _Remembering(collect_masked)

    def kernel_fn(
        x1_or_kernel: Any,
        x2: Any = None,
        get: Get = None,
        *,
        pattern: Any = None,
        mask_constant: float | None = None,
        diagonal_batch: bool | None = None,
        diagonal_spatial: bool | None = None,
        implementation: Implementation = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the infinite-width kernels of this network.

        Args:
          x1_or_kernel: inputs `x1`, or the `Kernel` of preceding layers; or nested lists and tuples of these. Inputs of
            any real type are computed with in JAX's default precision: float32, or float64 under `jax_enable_x64`.
          x2: inputs of the same structure, or None for the kernel of `x1` with itself.
          get: 'nngp', 'ntk' or another field of `Kernel`, for the bare value; several of them, for a namedtuple; None
            for the whole `Kernel`. What is not asked for is not computed.
          pattern: `(pattern1, pattern2)` of graph layers.
          mask_constant: inputs equal to this value are masked.
          diagonal_batch: store covariances of a batch with itself only between equal samples.
          diagonal_spatial: store covariances only between equal positions.
          implementation: backend, or backends in order of preference; see `nt_core.propagate`.
          **kwargs: handed to every layer.
        """
        names = kernel_fields(get)
        state, requested = x1_or_kernel, request_for(names)
        if x2 is not None or not all(isinstance(leaf, Kernel) for leaf in nt_tree_leaves(x1_or_kernel)):
            layout = resolve(requirements, diagonal_batch=diagonal_batch, diagonal_spatial=diagonal_spatial)
            state = _make_state(x1_or_kernel, x2, layout, mask_constant)
            arrays = [x for x in nt_tree_leaves(x1_or_kernel) if not isinstance(x, Kernel)]
            if any(layout["batch_axis"] % jnp.ndim(x) for x in arrays):
                warnings.warn(
                    f"The inputs have batch_axis={layout['batch_axis']}; kernels lead with the batch axes anyway, "
                    "and `batch` and `predict` expect batch_axis=0.",
                    stacklevel=2,
                )
        else:
            state = nt_tree_map(lambda k: _given_kernel(k, names), state)
            if isinstance(state, Kernel):
                check_diagonals(requirements, state, "This network")
        run = Run(requested, implementation, dict(kwargs, pattern=pattern), remembering, remembering_masked)
        kernels = apply_rules(rules, state, run)
        return nt_tree_map(lambda kernel: _select(kernel, get, names), kernels)

    kernel_fn.input_req = requirements  # type: ignore[attr-defined]
    kernel_fn.rules = rules  # type: ignore[attr-defined]
    return kernel_fn


class _Remembering:
    """A function that remembers its last results. What is pickled, for another process, is the function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._remembering = functools.lru_cache(maxsize=128)(function)

    def __call__(self, *args: Any) -> Any:
        return self._remembering(*args)

    def __reduce__(self) -> Any:
        return _Remembering, (self._function,)


def rules_of(kernel_fn: Callable[..., Any]) -> tuple[Rule, ...]:
    """Returns the rules behind the public `kernel_fn` of a layer. Raises `TypeError` for any other function."""
    if not is_of_layer(kernel_fn):
        raise TypeError(
            f"{getattr(kernel_fn, '__name__', kernel_fn)} is not the kernel_fn of a layer. Decorate the constructor of "
            "your layer with `layer`."
        )
    return kernel_fn.rules  # type: ignore[attr-defined]


def is_of_layer(kernel_fn: Callable[..., Any]) -> bool:
    """Whether a function is the public `kernel_fn` of a layer, not a function around one."""
    # `functools.wraps` copies attributes to what does something else.
    return hasattr(kernel_fn, "rules") and not hasattr(kernel_fn, "__wrapped__")


def _as_rules(rule: Any, name: str, init_fn: Callable[..., Any]) -> tuple[Rule, ...]:
    if isinstance(rule, tuple):  # a combinator: the rules of its layers
        return rule
    if isinstance(rule, Rule):
        return (dataclasses.replace(rule, name=name),)
    return (function_rule(rule, name, init_fn),)


def function_rule(kernel_fn: Callable[..., Any], name: str, init_fn: Callable[..., Any]) -> Rule:
    """Returns the rule of a layer whose `kernel_fn(kernels, **kwargs)` is any function of kernels."""
    function = swallow_kwargs(kernel_fn)
    return Rule(
        name,
        getattr(kernel_fn, "input_req", NO_REQUIREMENTS),
        function=lambda kernels, run: function(kernels, **run.kwargs),
        init_fn=init_fn,
    )


def _make_state(x1: Any, x2: Any, layout: dict[str, Any], mask_constant: float | None) -> Any:
    if x2 is None or all(leaf is None for leaf in nt_tree_leaves(x2)):
        x2 = nt_tree_map(lambda _: None, x1)
    return nt_tree_map(lambda a, b: _make_source(a, b, layout, mask_constant), x1, x2)


def _make_source(x1: Any, x2: Any, layout: dict[str, Any], mask_constant: float | None) -> Inputs:
    return make_inputs(get_masked_array(x1, mask_constant), get_masked_array(x2, mask_constant), layout)


def kernel_fields(get: Get) -> tuple[str, ...] | None:
    """Returns the fields of a `Kernel` that `get` names, or None for all of it."""
    return None if get is None else parse_get(get, _KERNEL_FIELDS)


def request_for(names: tuple[str, ...] | None) -> Request:
    """Returns what has to be computed for these fields of a `Kernel`, None for all of them."""
    if names is None:
        return Request(ntk=True, covariances=True)
    return Request(ntk="ntk" in names, covariances="cov1" in names or "cov2" in names)


def _given_kernel(kernel: Kernel, names: tuple[str, ...] | None) -> Kernel:
    """Returns a kernel that is given for inputs, with what these fields of the results need."""
    kernel = with_batch_sizes(kernel)
    if names is None:
        return kernel
    _check_ntk(kernel, names, "the Kernel that was given")
    return kernel if "ntk" in names else kernel.replace(ntk=None)


def _select(kernel: Kernel, get: Get, names: tuple[str, ...] | None) -> Any:
    if names is None:
        return kernel
    _check_ntk(kernel, names, "the Kernel that a layer returned")
    return as_named(get, "AnalyticKernel", {name: getattr(kernel, name) for name in names})


def _check_ntk(kernel: Kernel, names: tuple[str, ...], which: str) -> None:
    if "ntk" in names and kernel.ntk is None:
        raise ValueError(
            f"`get` asks for ntk, and {which} holds none (ntk=None, which means that it was not asked for). Compute it "
            "with get=None, or set ntk=jnp.zeros(()) if there is no layer with parameters before it."
        )


def _skip_without_mask(mask_fn: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(mask: Any, input_shape: Any) -> Any:
        if all(m is None for m in nt_tree_leaves(mask)):
            return None
        return mask_fn(mask, input_shape)

    return wrapped


def _masked_apply(apply_fn: Callable[..., Any], mask_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `apply_fn` that finds the masked inputs by `mask_constant`, and hands masks from layer to layer."""

    def apply(params: Any, inputs: Any, *, mask_constant: float | None = None, **kwargs: Any) -> Any:
        masked = nt_tree_map(lambda x: get_masked_array(x, mask_constant), inputs)
        values = nt_tree_map(lambda x: x.masked_value if isinstance(x, MaskedArray) else x, masked)
        mask = nt_tree_map(lambda x: x.mask if isinstance(x, MaskedArray) else None, masked)
        if all(m is None for m in nt_tree_leaves(mask)):
            return apply_fn(params, values, mask=None, **kwargs)
        shapes = _shapes(values)
        outputs = apply_fn(params, values, mask=mask, **kwargs)
        return nt_tree_map(_with_mask, outputs, _like(mask_fn(mask, shapes), outputs))

    return apply


def _with_mask(value: Any, mask: Any) -> Any:
    if mask is None:
        return value
    mask = jnp.broadcast_to(mask, value.shape)
    return MaskedArray(jnp.where(mask, jnp.zeros((), value.dtype), value), mask)


def _like(masks: Any, outputs: Any) -> Any:
    return nt_tree_map(lambda _: None, outputs) if masks is None else masks


def _shapes(values: Any) -> Any:
    return values.shape if hasattr(values, "shape") else type(values)(_shapes(v) for v in values)


def swallow_kwargs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fn` that ignores keywords it does not name: networks hand all of them to every layer."""
    parameters = inspect.signature(fn).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return fn

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **{k: v for k, v in kwargs.items() if k in parameters})

    return call
