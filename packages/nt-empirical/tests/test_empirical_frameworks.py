"""Kernels of networks written with flax, equinox and haiku."""

import functools
import sys
from collections.abc import Callable

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_networks import assert_close, quickly_compiled
from flax import nnx
from framework_networks import NETWORKS, VECTORS, LinenMLP, NnxMLP, drawn, haiku_mlp, haiku_norm, linen
from nt_empirical import empirical_ntk_fn, from_equinox, from_haiku, from_linen, from_nnx

pytestmark = pytest.mark.unoptimised


@pytest.mark.sample(12)
@pytest.mark.parametrize(
    "implementation", [3, *(pytest.param(implementation, marks=pytest.mark.slow) for implementation in (1, 2))]
)
@pytest.mark.parametrize(("framework", "kind"), NETWORKS)
def test_kernels_are_those_of_the_network(framework, kind, implementation, dtype):
    """Outputs as the framework evaluates them; kernels as Jacobians give them; both follow the parameters."""
    f, params, x, judge = NETWORKS[framework, kind]()
    x = x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    # nnx takes the softmax of its attention in single precision.
    single = dtype == "float32" or (framework, kind) == ("nnx", "transformer")
    tolerance = {"float32": 1e-5, "float64": 1e-8 if single else 1e-11}[dtype]

    def everything(params, x):
        kernel = empirical_ntk_fn(f, trace_axes=(), vmap_axes=0, implementation=implementation)(x, None, params)
        return f(params, x), judge(params, x), kernel, jax.jacobian(judge)(params, x)

    compiled, found = quickly_compiled(everything), []
    for seed in (1, 2):
        shapes = jax.eval_shape(lambda: params)
        outputs, expected, kernel, jacobian = compiled(drawn(shapes, seed), x)
        assert kernel.dtype == dtype
        assert_close(outputs, expected, tolerance / 10)
        rows = np.concatenate([np.asarray(j, "float64").reshape(6, -1) for j in jax.tree.leaves(jacobian)], 1)
        full = (rows @ rows.T).reshape(3, 2, 3, 2).transpose(0, 2, 1, 3)
        assert_close(kernel, full, tolerance)
        found.append(full)
    assert np.max(np.abs(found[0] - found[1])) > 0.1 * np.max(np.abs(found[0]))


@pytest.mark.parametrize(
    ("framework", "names"),
    [
        ("linen", {"BatchNorm_0": {"bias", "scale"}, "Dense_0": {"bias", "kernel"}, "Dense_1": {"bias", "kernel"}}),
        ("nnx", {"norm": {"bias", "scale"}, "first": {"bias", "kernel"}, "last": {"bias", "kernel"}}),
        ("haiku", {"batch_norm": {"scale", "offset"}, "linear": {"w", "b"}, "linear_1": {"w", "b"}}),
    ],
)
def test_names_are_kept_and_statistics_are_fixed(framework, names):
    _, params, _, _ = NETWORKS[framework, "mlp"]()
    assert {name: set(arrays) for name, arrays in params.items()} == names


def test_equinox_keeps_its_structure():
    _, params, _, _ = NETWORKS["equinox", "mlp"]()
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert paths == [".first.weight", ".first.bias", ".norm.weight", ".norm.bias", ".last.weight", ".last.bias"]


def test_models_are_not_changed():
    """And parameters that an nnx model has more than are given are not taken from it."""
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxMLP(nnx.Rngs(0))))
    model = nnx.merge(graph, drawn(state))
    model.train()
    f, params = from_nnx(model)
    assert not model.dropout.deterministic
    assert not model.norm.use_running_average
    with pytest.raises(ValueError, match="Parameters must have the structure"):
        f({"first": params["first"]}, VECTORS)


def test_networks_in_training_mode_are_refused():
    _, params, _, _ = linen(LinenMLP(), VECTORS)
    statistics = {"BatchNorm_0": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}
    f, params = from_linen(LinenMLP(), {"params": params, "batch_stats": statistics}, train=True)
    with pytest.raises(Exception, match="batch_stats"):
        jax.eval_shape(f, params, VECTORS)

    def in_training(x):
        return haiku_norm(hk.Linear(4)(x), train=True)

    transformed = hk.transform_with_state(in_training)
    params, state = drawn(jax.eval_shape(lambda: transformed.init(jax.random.key(0), VECTORS)))
    f, params = from_haiku(transformed, params, state)
    with pytest.raises(ValueError, match=r"changes its state, .*batch_norm.*such as is_training=False"):
        jax.eval_shape(f, params, VECTORS)


class NnxStateful(nnx.Module):
    """Of layers that a user wrote: what they do to their variables, and through which transformation."""

    def __init__(self, change=lambda norm: None, training=False, transformed=lambda fn: fn):
        self.norm, self.sown = nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Intermediate(jnp.zeros(()))
        self.norm.count = nnx.BatchStat(jnp.zeros(()))
        self.change, self.training, self.transformed = change, training, transformed

    def __call__(self, x):
        def layer(norm, x):
            self.change(norm)
            return norm(x, use_running_average=not self.training)

        self.sown[...], self.new = jnp.sum(x), nnx.Intermediate(x)
        return self.transformed(layer)(self.norm, x)


class EqxStateful(eqx.Module):
    """The same."""

    norm: eqx.nn.BatchNorm
    count: eqx.nn.StateIndex
    change: Callable = eqx.field(static=True)
    training: bool = eqx.field(static=True)
    transformed: Callable = eqx.field(static=True)

    def __init__(self, change=lambda count, state: state, training=False, transformed=lambda fn: fn):
        self.norm, self.count = eqx.nn.BatchNorm(3, "batch", mode="batch"), eqx.nn.StateIndex(jnp.zeros(()))
        self.change, self.training, self.transformed = change, training, transformed

    def __call__(self, x, state):
        def layer(norm, x, state):
            return norm(x, self.change(self.count, state), inference=not self.training)

        return self.transformed(layer)(self.norm, x, state)


def count_in_nnx(norm):
    norm.count[...] += 1


def count_in_equinox(count, state):
    return state.set(count, state.get(count) + 1)


def stateful(framework, *arguments):
    """Returns `f, params` of a network with a state."""
    if framework == "nnx":
        return from_nnx(NnxStateful(*arguments))
    return from_equinox(*eqx.nn.make_with_state(EqxStateful)(*arguments))


@jax.custom_jvp
def with_jvp(state, x):
    return state, x


@jax.custom_vjp
def with_vjp(state, x):
    return state, x


with_jvp.defjvp(lambda arguments, tangents: (with_jvp(*arguments), tangents))
with_vjp.defvjp(lambda *arguments: (with_vjp(*arguments), None), lambda _, cotangents: cotangents)


TRANSFORMATIONS = {"nnx": [nnx.jit, nnx.remat], "equinox": [eqx.filter_jit, eqx.filter_checkpoint]}


@pytest.mark.parametrize("framework", ["nnx", "equinox"])
def test_networks_that_change_their_state_are_refused(framework):
    """Whatever transformation is around the layers; and statistics are as they were, also outside of `jit`."""
    count, advice = {
        "nnx": (count_in_nnx, r"model\.eval\(\).*use_running_average=False"),
        "equinox": (count_in_equinox, "inference_mode.*inference=False"),
    }[framework]
    message = rf"changes its state, or computes it anew, .*: [^,]*count[^,]*\. .*evaluation mode.*{advice}"
    for transformed in (lambda fn: fn, *TRANSFORMATIONS[framework]):
        f, params = stateful(framework, count, False, transformed)
        for call in (f, lambda params, x, f=f: jax.eval_shape(f, params, x)) * 2:
            with pytest.raises(ValueError, match=message):
                call(params, VECTORS)


@pytest.mark.parametrize("function", [with_jvp, with_vjp])
def test_state_may_pass_through_functions_with_derivatives_of_their_own(function):
    def network(added, x):
        count = hk.get_state("count", (), init=jnp.zeros)
        count, x = jax.jit(function)(count + added if added else count, x)
        hk.set_state("count", count)
        return x * hk.get_parameter("w", (), init=jnp.ones)

    for added in (0, 1):
        transformed = hk.transform_with_state(functools.partial(network, added))
        f, params = from_haiku(transformed, {"~": {"w": jnp.ones(())}}, {"~": {"count": jnp.zeros(())}})
        if added:
            with pytest.raises(ValueError, match=r"\['~'\]\['count'\]"):
                f(params, VECTORS)
        else:
            np.testing.assert_array_equal(f(params, VECTORS), VECTORS)
            np.testing.assert_array_equal(jax.jit(f)(params, VECTORS), VECTORS)


class NnxWith(nnx.Module):
    """A network with a variable of any kind, of which a call may make another one."""

    def __init__(self, value, change):
        self.w, self.count, self.held = nnx.Param(jnp.ones(())), nnx.BatchStat(jnp.zeros(())), nnx.Variable(value)
        self.change = change

    def __call__(self, x):
        self.change(self)
        return self.w * x


def handed_on(module):
    module.count[...] = jax.jit(lambda count: count)(module.count[...])
    if not isinstance(module.held.get_value(), str):
        module.held.set_value(jax.jit(jax.jit(lambda value: value))(module.held.get_value()))


def numbered(module):
    module.held.set_value(jax.jit(lambda: 2.0)())


def renamed(module):
    module.held.set_value("other")


def added_in_place(module):
    module.held[...] += 1


def recomputed(module):
    module.held[...] = jnp.where(False, module.held + 1, module.held[...])


@pytest.mark.parametrize("value", ["name", 2, 0.1, True, np.float32(0.1), np.zeros(2, "float32")])
def test_variables_of_other_kinds(value):
    """What is no array, and arrays of NumPy; all but strings can pass through `jax.jit`."""
    f, params = from_nnx(NnxWith(value, handed_on))
    for call in (f, f, jax.jit(f)):
        np.testing.assert_array_equal(call(params, VECTORS), VECTORS)


@pytest.mark.parametrize("change", [renamed, numbered, added_in_place, recomputed])
def test_changed_variables_of_other_kinds_are_refused(change):
    """Before arrays of NumPy are changed in place."""
    value = {renamed: "name", numbered: 1.0}.get(change, np.zeros(2, "float32"))
    f, params = from_nnx(NnxWith(value, change))
    for call in (f, f, jax.jit(f)):
        with pytest.raises(ValueError, match=r"changes its state, or computes it anew, .*: \['held'\]\. "):
            call(params, VECTORS)
    if isinstance(value, np.ndarray):
        np.testing.assert_array_equal(value, np.zeros(2))


def test_batch_statistics_in_training_are_refused():
    f, params = stateful("nnx", lambda norm: None, True)
    with pytest.raises(ValueError, match=r"changes its state, .*\['norm'\]\['mean'\], \['norm'\]\['var'\]\. "):
        empirical_ntk_fn(f)(VECTORS, None, params)
    model, state = eqx.nn.make_with_state(EqxStateful)(training=True)
    f, params = from_equinox(model, state)
    with pytest.raises(ValueError, match=r"changes its state, or computes it anew, .*\.norm\."):
        jax.vmap(f, (None, 0), axis_name="batch")(params, jnp.expand_dims(VECTORS, 1))


@pytest.mark.parametrize("framework", ["nnx", "equinox"])
def test_networks_with_a_state_in_evaluation(framework):
    """Of which transformations hand on the state; and a call sets it to what it is, or sows."""

    def unchanged(count, state):
        return state.set(count, state.get(count))

    changes = {"nnx": lambda norm: None, "equinox": unchanged}[framework]
    for transformed in (lambda fn: fn, *TRANSFORMATIONS[framework]):
        f, params = stateful(framework, changes, False, transformed)
        for call in (f, f, jax.jit(f)):
            np.testing.assert_allclose(call(params, VECTORS), VECTORS / np.sqrt(1 + 1e-5), rtol=1e-5)
        kernel = jax.jit(empirical_ntk_fn(f, vmap_axes=0))(VECTORS, None, params)
        assert_close(kernel, VECTORS @ VECTORS.T / 3 + 1, 1e-4)


def test_what_is_no_network_is_refused(monkeypatch):
    for adapter, arguments in [(from_linen, ({},)), (from_nnx, ()), (from_equinox, ()), (from_haiku, ({},))]:
        with pytest.raises(TypeError, match=rf"`{adapter.__name__}` takes .*, got <class 'function'>"):
            adapter(lambda x: x, *arguments)
    with pytest.raises(ValueError, match=r"must have the collection 'params', got \['batch_stats'\]"):
        from_linen(LinenMLP(), {"batch_stats": {}})
    for network, state in [(hk.transform(haiku_mlp), {}), (hk.transform_with_state(haiku_mlp), None)]:
        with pytest.raises(ValueError, match="needs its `state`"):
            from_haiku(network, {}, state)
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ImportError, match="pip install equinox"):
        from_equinox(None)
