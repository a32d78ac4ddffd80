"""All implementations against products of Jacobians in NumPy, for small functions of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_functions import TABLE
from empirical_networks import assert_close, quickly_compiled, reduce
from nt_empirical import NtkImplementation, empirical_ntk_fn

pytestmark = pytest.mark.unoptimised

TOLERANCE = {"float64": 1e-11, "float32": 1e-5}
AT_ONCE = 5  # functions that are compiled together
GROUPS = [
    pytest.param(kind, list(functions)[start : start + AT_ONCE], id=f"{kind}-{start}")
    for kind, functions in TABLE.items()
    for start in range(0, len(functions), AT_ONCE)
]


def test_there_are_many_functions():
    assert sum(map(len, TABLE.values())) >= 150


def arguments(kind, name, dtype):
    """Returns a function, parameters, and two batches.

    Numbers are small: where all tanh are flat, the kernel is what rounding leaves of 1 - tanh^2, in the judge as well.
    """
    f, shapes, shape = TABLE[kind][name]
    rng = np.random.default_rng(len(name))

    def draw(shape):
        return jnp.asarray(rng.normal(scale=0.5, size=shape), dtype)

    return f, jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple)), draw((2, *shape)), draw((3, *shape))


def products(jacobians1, jacobians2, outputs1, outputs2):
    """Returns the kernel of all axes of an output: those for `x1`, then those for `x2`."""
    rows = [
        np.concatenate([np.asarray(j, "float64").reshape(y.size, -1) for j in jax.tree.leaves(jacobians)], axis=1)
        for jacobians, y in ((jacobians1, outputs1), (jacobians2, outputs2))
    ]
    return (rows[0] @ rows[1].T).reshape(*outputs1.shape, *outputs2.shape)


def check(kind, names, implementation, dtype, second=True, settings=(0, 1)):
    """Compares kernels: 0 of all axes, without `vmap_axes`, and 1 of a trace where there are channels, with them.

    Without `second` there is one batch, for less compilation.
    """
    functions = {name: arguments(kind, name, dtype)[0] for name in names}
    inputs = {name: arguments(kind, name, dtype)[1:] for name in names}

    def axes_of(f, params, x1, x2):
        ndims = [y.ndim for y in jax.tree.leaves(jax.eval_shape(f, params, x1))]
        both = [((), (), None), ((-1,), (), 0) if min(ndims) > 1 else ((), (), 0)]
        return [both[setting] for setting in settings]

    axes = {name: axes_of(functions[name], *inputs[name]) for name in names}

    def everything(inputs):
        found = {}
        for name, (params, x1, x2) in inputs.items():
            f = functions[name]
            kernels = [
                empirical_ntk_fn(f, *axes_and_vmap, implementation)(x1, x2 if second else None, params)
                for axes_and_vmap in axes[name]
            ]
            judges = [(f(params, x), jax.jacobian(f)(params, x)) for x in ((x1, x2) if second else (x1,))]
            found[name] = kernels, judges
        return found

    for name, (kernels, judges) in quickly_compiled(everything)(inputs).items():
        (y1, j1), (y2, j2) = judges[0], judges[-1]
        leaves, structure = jax.tree.flatten(y1)
        jacobians1, jacobians2 = structure.flatten_up_to(j1), structure.flatten_up_to(j2)
        full = list(map(products, jacobians1, jacobians2, leaves, jax.tree.leaves(y2)))
        for kernel, (*traced_and_diagonal, _) in zip(kernels, axes[name], strict=True):
            for actual, expected in zip(jax.tree.leaves(kernel), full, strict=True):
                try:
                    assert_close(actual, reduce(expected, *traced_and_diagonal), TOLERANCE[dtype])
                except AssertionError as error:
                    raise AssertionError(f"{kind}: {name}, {traced_and_diagonal}") from error


@pytest.mark.sample(16)
@pytest.mark.parametrize(("kind", "names"), GROUPS)
def test_structured_derivatives(kind, names, x64):
    check(kind, names, NtkImplementation.STRUCTURED_DERIVATIVES, "float64", second=False, settings=(1,))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", list(NtkImplementation)[1:])
@pytest.mark.parametrize(("kind", "names"), GROUPS)
def test_all_implementations(kind, names, implementation, dtype):
    check(kind, names, implementation, dtype)
