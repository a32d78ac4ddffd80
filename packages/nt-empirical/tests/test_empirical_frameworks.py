"""Kernels of networks written with flax, equinox and haiku."""

import sys

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from empirical_networks import assert_close, quickly_compiled
from flax import nnx
from framework_networks import NETWORKS, VECTORS, LinenMLP, NnxMLP, drawn, haiku_mlp, haiku_norm, linen
from nt_empirical import empirical_ntk_fn, from_equinox, from_haiku, from_linen, from_nnx


@pytest.mark.sample(12)
@pytest.mark.parametrize(
    "implementation", [3, *(pytest.param(implementation, marks=pytest.mark.slow) for implementation in (1, 2))]
)
@pytest.mark.parametrize(("framework", "kind"), NETWORKS)
def test_kernels_are_those_of_the_network(framework, kind, implementation):
    """Outputs as the framework evaluates them; kernels as Jacobians give them; both follow the parameters."""
    f, params, x, judge = NETWORKS[framework, kind]()

    def everything(params, x):
        kernel = empirical_ntk_fn(f, trace_axes=(), vmap_axes=0, implementation=implementation)(x, None, params)
        return f(params, x), judge(params, x), kernel, jax.jacobian(judge)(params, x)

    compiled, found = quickly_compiled(everything), []
    for seed in (1, 2):
        shapes = jax.eval_shape(lambda: params)
        outputs, expected, kernel, jacobian = compiled(drawn(shapes, seed), x)
        assert_close(outputs, expected, 1e-6)
        rows = np.concatenate([np.asarray(j, "float64").reshape(6, -1) for j in jax.tree.leaves(jacobian)], 1)
        full = (rows @ rows.T).reshape(3, 2, 3, 2).transpose(0, 2, 1, 3)
        assert_close(kernel, full, 1e-5)
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
    with pytest.raises(ValueError, match="changes its state"):
        jax.eval_shape(f, params, VECTORS)


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
