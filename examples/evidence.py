"""The weights, biases and noise of a network of infinite width, chosen by the gradient of the evidence.

Disease progression from ten measurements of 442 patients. No patient is set aside for the choice: it is made by the
density of the labels, and judged by patients that it has not seen. Needs optax: `pip install optax`.
"""

import argparse

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import optax
from neural_tangents import stax
from sklearn.datasets import load_diabetes

N_TRAIN = 200
LEARNING_RATE = 0.1
START = {"W_std": 2**0.5, "b_std": 0.1, "last_W_std": 1.0, "diag_reg": 1e-2}


def patients(seed: int = 0):
    """Returns inputs and labels of training patients, and of others, in units of the training set's spread."""
    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], y[order, None]
    x, y = ((a - a[:N_TRAIN].mean(0)) / a[:N_TRAIN].std(0) for a in (x, y))
    return (x[:N_TRAIN], y[:N_TRAIN]), (x[N_TRAIN:], y[N_TRAIN:])


def network(parameters):
    """Two hidden layers; the last layer's weights scale everything."""
    hidden = [stax.Dense(512, parameters["W_std"], parameters["b_std"]), stax.Relu()]
    return stax.serial(*hidden, *hidden, stax.Dense(1, parameters["last_W_std"]))[2]


def posterior(logarithms, x, y):
    """Returns the Bayesian network, given labels."""
    parameters = jax.tree.map(jnp.exp, logarithms)
    gram = nt.predict.Gram(network(parameters), x, "nngp", parameters["diag_reg"])
    return nt.predict.fit(gram, y, nt.predict.Cholesky())


def improve(logarithms, x, y, steps: int):
    """Returns parameters of a larger evidence, and the evidence of each step."""

    def loss(logarithms):
        return -posterior(logarithms, x, y).log_evidence().value / len(x)

    optimiser = optax.adam(LEARNING_RATE)

    @jax.jit
    def step(logarithms, state):
        value, gradient = jax.value_and_grad(loss)(logarithms)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(logarithms, updates), state, -value

    state, evidence = optimiser.init(logarithms), []
    for _ in range(steps):
        logarithms, state, value = step(logarithms, state)
        evidence.append(float(value))
    return logarithms, evidence


@jax.jit
def held_out(logarithms, x, y, x_test, y_test):
    """Returns the mean logarithm of the density of labels of other patients, each by itself."""
    fitted = posterior(logarithms, x, y)
    kernel = network(jax.tree.map(jnp.exp, logarithms))(x, None, "nngp")
    noise = jnp.exp(logarithms["diag_reg"]) * jnp.trace(kernel) / len(x)
    variance = jnp.diagonal(fitted.covariance(x_test)) + noise
    errors = (y_test - fitted.mean(x_test))[:, 0]
    return -jnp.mean(errors**2 / variance + jnp.log(2 * jnp.pi * variance)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    train, test = patients()
    start = {name: jnp.log(value) for name, value in START.items()}
    end, evidence = improve(start, *train, args.steps)
    print(f"Log evidence per patient: {evidence[0]:.3f} at the start, {evidence[-1]:.3f} after {args.steps} steps")
    for name, logarithms in (("start", start), ("end", end)):
        numbers = ", ".join(f"{key} {float(jnp.exp(value)):.3g}" for key, value in logarithms.items())
        print(f"{name:5s} held-out log density {float(held_out(logarithms, *train, *test)):.3f}: {numbers}")


if __name__ == "__main__":
    main()
