"""Handwritten digits by gradient descent on the cross-entropy, at several times of training.

The network is infinitely wide, and its outputs are logits: there is no closed form, and `gradient_descent` integrates.
Prints the losses, and the accuracy for digits that were not trained on, beside that with the mean squared error.
"""

import argparse

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
from neural_tangents import stax
from sklearn.datasets import load_digits

TIMES = (0.0, 100.0, 1000.0, 10000.0)
N_CLASSES = 10


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * labels, axis=-1))


def digits(n_train: int, n_test: int):
    """Returns images and one-hot labels of training and test digits."""
    x, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[: n_train + n_test]
    x, y = (x[order] / 16 - 0.5).astype(np.float32), np.eye(N_CLASSES, dtype=np.float32)[labels[order]]
    return (x[:n_train], y[:n_train]), (x[n_train:], y[n_train:])


def network():
    hidden = [stax.Dense(512, 2**0.5, 0.1), stax.Relu()]
    return stax.serial(*hidden, *hidden, stax.Dense(N_CLASSES))[2]


def logits(times, train, x_test):
    """Returns the logits of training and test digits at some times, of the mean of all networks."""
    kernel_fn, (x, y) = network(), train
    predict_fn = nt.predict.gradient_descent(cross_entropy, kernel_fn(x, None, "ntk"), y)
    return predict_fn(jnp.asarray(times), 0.0, 0.0, kernel_fn(x_test, x, "ntk"))


def accuracy(outputs, labels) -> float:
    return float(np.mean(np.argmax(outputs, -1) == np.argmax(labels, -1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--test", type=int, default=500)
    args = parser.parse_args()

    train, (x_test, y_test) = digits(args.train, args.test)
    on_train, on_test = logits(TIMES, train, x_test)
    print(f"{'time':>6s} {'training loss':>14s} {'test loss':>10s} {'test accuracy':>14s}")
    for time, fx, fx_test in zip(TIMES, on_train, on_test, strict=True):
        losses = f"{cross_entropy(fx, train[1]):14.3f} {cross_entropy(fx_test, y_test):10.3f}"
        print(f"{time:6.0f} {losses} {accuracy(fx_test, y_test):14.1%}")
    squared = nt.predict.gradient_descent_mse_ensemble(network(), *train, diag_reg=1e-3)(x_test=x_test, get="ntk")
    print(f"Mean squared error, trained to the end: {accuracy(squared, y_test):.1%}")


if __name__ == "__main__":
    main()
