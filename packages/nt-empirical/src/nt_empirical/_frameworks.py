"""Networks of other libraries as functions of parameters and inputs."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nt_empirical._state import outputs_at

Function = Callable[..., Any]


def from_linen(module: Any, variables: Any, **kwargs: Any) -> tuple[Function, Any]:
    """A network of `flax.linen` as a function of its parameters.

    Args:
      module: a ``flax.linen.Module``.
      variables: what ``module.init`` returned, or training. The collection ``"params"`` is trainable; all others, such
        as ``"batch_stats"``, are held fixed.
      **kwargs: keywords of all calls, among them what switches the module to evaluation: ``train=False``,
        ``deterministic=True``, as the module calls it. In training mode flax refuses calls of modules with batch
        statistics, and of those with dropout that get no random keys.

    Returns:
      ``(f, params)``: ``f(params, x, **more)`` is ``module.apply`` with these parameters, and ``params`` are those of
      ``variables``, by their names.

    Raises:
      TypeError: ``module`` is of another kind.
      ValueError: ``variables`` has no ``"params"``.
      ImportError: flax is not installed.

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> from nt_empirical import empirical_ntk_fn, from_linen
      >>> variables = {"params": {"kernel": jnp.ones((2, 1))}}  # as nn.Dense(1, use_bias=False).init makes them
      >>> f, params = from_linen(nn.Dense(1, use_bias=False), variables)
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> print(empirical_ntk_fn(f)(x, None, params))
      [[1. 1.]
       [1. 2.]]
    """
    linen = _imported("flax.linen", "flax")
    _check_type(module, linen.Module, "from_linen", "a flax.linen.Module")
    if "params" not in variables:
        raise ValueError(
            f"`variables` must have the collection 'params', got {sorted(variables)}. Give what `module.init` returns."
        )
    collections = importlib.import_module("flax.core").unfreeze(variables)
    params = collections.pop("params")

    def f(params: Any, x: Any, **more: Any) -> Any:
        return module.apply({**collections, "params": params}, x, **kwargs, **more)

    return f, params


def from_nnx(model: Any, **kwargs: Any) -> tuple[Function, Any]:
    """A network of `flax.nnx` as a function of its parameters.

    Args:
      model: a ``flax.nnx.Module``, which is not changed. Every ``nnx.Param`` is trainable; all other variables, such as
        batch statistics and random state, are held fixed at their present values. A copy is used, in evaluation mode
        (``model.eval()``).
      **kwargs: keywords of all calls.

    Returns:
      ``(f, params)``: ``f(params, x, **more)`` is the model with these parameters, and ``params`` are those of the
      model, dicts by the names of attributes. ``f`` raises a ``ValueError`` if a call changes a variable that is held
      fixed, as in training mode, or computes it anew; what it sows (``nnx.Intermediate``) is dropped.

    Raises:
      TypeError: ``model`` is of another kind.
      ImportError: flax is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from nt_empirical import empirical_ntk_fn, from_nnx
      >>> f, params = from_nnx(nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0)))
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> print(empirical_ntk_fn(f)(x, None, params))
      [[1. 1.]
       [1. 2.]]
    """
    nnx = _imported("flax.nnx", "flax")
    _check_type(model, nnx.Module, "from_nnx", "a flax.nnx.Module")
    model = nnx.merge(*nnx.split(model))
    model.eval()
    graph, trainable, sown, fixed = nnx.split(model, nnx.Param, nnx.Intermediate, ...)
    params, state = nnx.to_pure_dict(trainable), jax.tree.map(_immutable, nnx.to_pure_dict(fixed))
    structure = jax.tree.structure(params)

    def variables(of: Any, values: Any) -> Any:
        """Returns new variables: a call may assign to them, and only where they were made."""
        made = jax.tree.map(lambda a: a, of)
        nnx.replace_by_pure_dict(made, values)
        return made

    def f(params: Any, x: Any, **more: Any) -> Any:
        if jax.tree.structure(params) != structure:  # flax would take what is missing from the model
            raise ValueError(f"Parameters must have the structure {structure}, got {jax.tree.structure(params)}.")

        def network(state: Any) -> tuple[Any, Any]:
            module = nnx.merge(graph, variables(trainable, params), variables(sown, {}), variables(fixed, state))
            outputs = module(x, **kwargs, **more)
            *_, after = nnx.split(module, nnx.Param, nnx.Intermediate, ...)
            return outputs, nnx.to_pure_dict(after)

        return outputs_at(
            network,
            state,
            "`from_nnx` calls `model.eval()`: take away what overrules that, such as use_running_average=False or "
            "deterministic=False in a call of a layer, and what assigns to variables.",
        )

    return f, params


def from_equinox(model: Any, state: Any = None, **kwargs: Any) -> tuple[Function, Any]:
    """A network of Equinox as a function of its parameters.

    Args:
      model: an ``equinox.Module`` that is called with one sample, ``model(x)``, or ``model(x, state)``. All arrays of
        floating-point numbers are trainable (for others, see ``scale`` of the kernels); anything else is held fixed. It
        is put into evaluation mode (``equinox.nn.inference_mode``).
      state: an ``equinox.nn.State``, of models that have one, such as those with batch statistics; is held fixed.
      **kwargs: keywords of all calls.

    Returns:
      ``(f, params)``: ``f(params, x, **more)`` calls the model with these parameters on each sample along the first
      axis of ``x``, and ``params`` is the model with None in the place of what is fixed. ``f`` raises a ``ValueError``
      if a call changes the state, as in training mode, or computes it anew.

    Raises:
      TypeError: ``model`` is of another kind.
      ImportError: Equinox is not installed.

    Example:
      >>> import equinox
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from nt_empirical import empirical_ntk_fn, from_equinox
      >>> f, params = from_equinox(equinox.nn.Linear(2, 1, use_bias=False, key=jax.random.key(0)))
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> print(empirical_ntk_fn(f)(x, None, params))
      [[1. 1.]
       [1. 2.]]
    """
    equinox = _imported("equinox", "equinox")
    _check_type(model, equinox.Module, "from_equinox", "an equinox.Module")
    params, fixed = equinox.partition(
        equinox.nn.inference_mode(model), lambda a: equinox.is_array(a) and jnp.issubdtype(a.dtype, jnp.floating)
    )

    def is_index(leaf: Any) -> bool:
        return isinstance(leaf, equinox.nn.StateIndex)

    parts = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_index)
    indices = {jax.tree_util.keystr(path): leaf for path, leaf in parts if is_index(leaf)}

    def f(params: Any, x: Any, **more: Any) -> Any:
        network = equinox.combine(params, fixed)

        def with_state(sample: Any, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            current = jax.tree.map(lambda a: a, state)  # a copy: what is set makes a state useless
            for name, value in values.items():
                current = current.set(indices[name], value)
            outputs, after = network(sample, current, **kwargs, **more)
            return outputs, {name: after.get(index) for name, index in indices.items()}

        def of_sample(sample: Any) -> Any:
            if state is None:
                return network(sample, **kwargs, **more)
            return outputs_at(
                functools.partial(with_state, sample),
                {name: state.get(index) for name, index in indices.items()},
                "`from_equinox` applies `equinox.nn.inference_mode`: take away what overrules that, such as "
                "inference=False in a call of a layer, and what sets the state.",
            )

        return jax.vmap(of_sample)(x)

    return f, params


def from_haiku(transformed: Any, params: Any, state: Any = None, **kwargs: Any) -> tuple[Function, Any]:
    """A network of Haiku as a function of its parameters.

    Args:
      transformed: the result of ``haiku.transform`` or ``haiku.transform_with_state`` (not of ``without_apply_rng``).
      params: what ``transformed.init`` returned, or training.
      state: the state of a network ``with_state``, such as batch statistics; is held fixed.
      **kwargs: keywords of all calls, among them what switches the network to evaluation: ``is_training=False``, as
        the network calls it.

    Returns:
      ``(f, params)``: ``f(params, x, **more)`` is the network with these parameters and without random keys, and
      ``params`` are those given. ``f`` raises a ``ValueError`` if the network changes its state, as in training mode,
      or computes it anew.

    Raises:
      TypeError: ``transformed`` is of another kind.
      ValueError: the network has a state and none is given, or the other way round.
      ImportError: Haiku is not installed.

    Example:
      >>> import haiku as hk
      >>> import jax.numpy as jnp
      >>> from nt_empirical import empirical_ntk_fn, from_haiku
      >>> network = hk.transform(lambda x: hk.Linear(1, with_bias=False)(x))
      >>> f, params = from_haiku(network, {"linear": {"w": jnp.ones((2, 1))}})
      >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
      >>> print(empirical_ntk_fn(f)(x, None, params))
      [[1. 1.]
       [1. 2.]]
    """
    haiku = _imported("haiku", "dm-haiku")
    with_state = isinstance(transformed, haiku.TransformedWithState)
    if not with_state:
        _check_type(transformed, haiku.Transformed, "from_haiku", "the result of haiku.transform")
    if with_state != (state is not None):
        raise ValueError(
            "A network of `haiku.transform_with_state` needs its `state`, and one of `haiku.transform` has none; got "
            f"{type(transformed).__name__} and {'a' if state is not None else 'no'} state."
        )

    def f(params: Any, x: Any, **more: Any) -> Any:
        if not with_state:
            return transformed.apply(params, None, x, **kwargs, **more)
        return outputs_at(
            lambda state: transformed.apply(params, state, None, x, **kwargs, **more),
            state,
            "Switch it to evaluation by a keyword of `from_haiku`, such as is_training=False.",
        )

    return f, params


def _immutable(leaf: Any) -> Any:
    """Returns an array of JAX for one of NumPy, which a call could change in place, and anything else as it is."""
    return jnp.array(leaf) if isinstance(leaf, np.ndarray) else leaf


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"`{module}` does not import: {error}. To install it: pip install {package}") from error


def _check_type(network: Any, kind: type, function: str, expected: str) -> None:
    if not isinstance(network, kind):
        raise TypeError(f"`{function}` takes {expected}, got {type(network)}.")
