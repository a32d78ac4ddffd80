"""Gradient flow on the mean squared loss, for given kernels."""

from typing import Any

import jax
import jax.numpy as jnp
from nt_core.tracing import evaluate_now, is_traced

from nt_predict._factored import Factored
from nt_predict._layout import symmetric
from nt_predict._spectral import einsum


def flow_times(t: Any, learning_rate: Any, output_size: int, dtype: Any) -> tuple[jax.Array | None, tuple[int, ...]]:
    """Returns the times of the flow `df/dtau = -K (f - y)` as a vector (None for infinity), and the shape of `t`.

    The loss is half the mean, not the sum, of the squared residuals over all outputs: tau = learning_rate t / n.
    """
    if t is None:
        return None, ()
    with evaluate_now():
        t = jnp.asarray(t, dtype)
        times = jnp.asarray(learning_rate, dtype) * t / output_size
        if not is_traced(times) and not (times >= 0).all():
            raise ValueError(
                f"`learning_rate * t` must be at least 0, but `learning_rate` is {learning_rate} and `t` goes "
                f"from {t.min()} to {t.max()}."
            )
        return times.ravel(), t.shape


def test_change(gram: Factored, times: jax.Array | None, test_train: jax.Array, residuals: jax.Array) -> jax.Array:
    """Returns the change of test outputs, (times, test, columns), where training began at `residuals` = y - f_0.

    With the kernel of the flow this is gradient descent, at infinite time Bayesian inference with any kernel.
    """
    return einsum("qn,tnc->tqc", test_train, gram.gain(times, residuals))


def bayesian_covariance(
    nngp: Factored, times: jax.Array | None, test_train: jax.Array, test_test: jax.Array
) -> jax.Array:
    """Returns the covariance of test outputs, (times, test, test), where NNGP and flow have the same kernel."""
    with evaluate_now():
        doubled = None if times is None else 2 * times
    few, at_all_times = nngp.few_times(doubled)
    known = einsum("qn,tnr->tqr", test_train, nngp.gain(few, test_train.T))
    return symmetric(test_test[None] - at_all_times(known))


def ensemble_covariance(
    ntk: Factored,
    times: jax.Array | None,
    ntk_test_train: jax.Array,
    nngp_train_train: jax.Array,
    nngp_test_train: jax.Array,
    nngp_test_test: jax.Array,
) -> jax.Array:
    """Returns the covariance of test outputs, (times, test, test), that start with the NNGP's and follow the NTK.

    Test outputs are f*_t = f*_0 - A (f_0 - y), linear in the random initial outputs.
    """
    few, at_all_times = ntk.few_times(times)
    a = ntk.gain(few, ntk_test_train.T).swapaxes(-1, -2)
    cross = at_all_times(einsum("tqn,rn->tqr", a, nngp_test_train))
    of_training = at_all_times(einsum("tqn,nm->tqm", a, nngp_train_train))
    spread = einsum("tqm,trm->tqr", of_training, at_all_times(a))
    return symmetric(nngp_test_test[None] + spread - cross - cross.swapaxes(-1, -2))


def train_change(gram: Factored, times: jax.Array, residuals: jax.Array) -> jax.Array:
    """Returns the change of training outputs, (times, n, columns), where training began at `residuals` = y - f_0."""
    return -gram.fall(times, residuals)


def train_covariance(gram: Factored, times: jax.Array | None, initial: jax.Array) -> jax.Array:
    """Returns the covariance of training outputs, (times, n, n), that start with covariance `initial`."""
    if times is None:
        return jnp.zeros_like(initial)[None]
    decay = gram.decay(times, jnp.eye(len(initial), dtype=initial.dtype))
    return symmetric(einsum("tij,jk,tlk->til", decay, initial, decay))
