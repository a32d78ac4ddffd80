"""Handwritten digits with networks of infinite width: predictions with uncertainty, against two classical methods.

Run by `make demo`. Prints a table and writes a figure (by default `digits.png`).
"""

import argparse
import dataclasses
import time
from collections.abc import Callable

import matplotlib
import neural_tangents as nt
import numpy as np
from neural_tangents import stax
from scipy.special import log_ndtr
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAIN_SIZES = (25, 50, 100, 200, 400, 1000)
N_TEST = 597
N_REPEATS = 3  # training sets of each size, for the spread of the learning curves
GALLERY_SIZE = 100  # training images of the network whose most and least certain predictions are shown
N_CLASSES = 10
ROWS = 100  # images whose kernels are computed in one call, between two ticks of the progress bar
DIAG_REG = 1e-3  # noise of the labels, relative to the mean of the kernel's diagonal
W_STD, B_STD = 2**0.5, 0.1


@dataclasses.dataclass
class Result:
    """How one method does with training sets of one size."""

    accuracy: list[float] = dataclasses.field(default_factory=list)
    certainty: list[float] = dataclasses.field(default_factory=list)  # as often as this, the method means to be right
    negative_log_likelihood: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def fully_connected():
    return stax.serial(
        stax.Flatten(),
        *[layer for _ in range(3) for layer in (stax.Dense(512, W_STD, B_STD), stax.Relu())],
        stax.Dense(N_CLASSES, 1.0),
    )


def convolutional():
    return stax.serial(
        *[
            layer
            for _ in range(2)
            for layer in (stax.Conv(64, (3, 3), padding="SAME", W_std=W_STD, b_std=B_STD), stax.Relu())
        ],
        stax.AvgPool((2, 2), (2, 2)),
        stax.Flatten(),
        stax.Dense(N_CLASSES, 1.0),
    )


def kernels_of_all(kernel_fn: Callable, x: np.ndarray, name: str):
    """Returns the NNGP and NTK kernels between all images, computed in blocks of rows."""
    blocks = []
    for start in tqdm(range(0, len(x), ROWS), desc=f"{name} kernels", unit="block"):
        blocks.append(kernel_fn(x[start : start + ROWS], x, ("nngp", "ntk")))
    nngp, ntk = (np.concatenate([getattr(block, kind) for block in blocks]) for kind in ("nngp", "ntk"))
    return (nngp + nngp.T) / 2, (ntk + ntk.T) / 2


def infinite_network(
    kernels: tuple[np.ndarray, np.ndarray], kind: str, train: np.ndarray, test: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Returns class probabilities of the test images: the exact posterior, or the ensemble after gradient descent."""

    def both(rows, columns):
        return Kernels(*(k[np.ix_(rows, columns)] for k in kernels))

    y_train = np.eye(N_CLASSES, dtype=np.float32)[labels[train]] - 1 / N_CLASSES
    k_train_train = both(train, train)
    predict_fn = nt.predict.gp_inference(k_train_train, y_train, diag_reg=DIAG_REG)
    gaussian = predict_fn(kind, both(test, train), both(test, test))
    variance = np.maximum(np.diag(gaussian.covariance), 0)
    return probabilities(np.asarray(gaussian.mean), scale_of_outputs(k_train_train.nngp, y_train) * variance)


def scale_of_outputs(k_train_train: np.ndarray, y_train: np.ndarray) -> float:
    """Returns the most likely variance of the last layer's weights, given the labels.

    It multiplies kernels and noise alike, and so the variances of all predictions, but not their means.
    """
    noise = DIAG_REG * np.trace(k_train_train) / len(k_train_train)
    whitened = np.linalg.solve(k_train_train + noise * np.eye(len(k_train_train)), y_train)
    return np.sum(y_train * whitened) / y_train.size


def probabilities(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Returns the probability of each class to have the largest output, by quadrature.

    The outputs of the classes are independent, with means (image, class) and one variance for each image. Where class c
    has the output m_c + s z, z standard normal, class j is below it with probability Phi(z + (m_c - m_j) / s).
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(32)
    gaps = (mean[:, :, None] - mean[:, None, :]) / np.sqrt(variance + 1e-12)[:, None, None]
    log_others_below = log_ndtr(gaps[..., None] + nodes).sum(2) - log_ndtr(nodes)
    p = np.exp(log_others_below) @ weights
    return p / p.sum(1, keepdims=True)


@dataclasses.dataclass
class Kernels:
    nngp: np.ndarray
    ntk: np.ndarray


def classical(model, x: np.ndarray, train: np.ndarray, test: np.ndarray, labels: np.ndarray):
    """Returns the accuracy of a scikit-learn classifier on the raw pixels."""
    flat = x.reshape(len(x), -1)
    return model.fit(flat[train], labels[train]).score(flat[test], labels[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", default="digits.png", help="where to write the figure")
    args = parser.parse_args()

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images[order].astype(np.float32) / 16, digits.target[order]
    x, test, pool = images[..., None] - images.mean(), np.arange(N_TEST), np.arange(N_TEST, len(images))

    results: dict[tuple[str, int], Result] = {}
    probabilities_of = {}
    draws = [np.random.default_rng(seed).permutation(pool) for seed in range(N_REPEATS)]
    kernel_seconds = {}
    for name, network in (("FCN", fully_connected()), ("CNN", convolutional())):
        start = time.perf_counter()
        kernels = kernels_of_all(network[2], x, name)
        kernel_seconds[name] = time.perf_counter() - start
        for size in TRAIN_SIZES:
            for kind in ("nngp", "ntk"):
                result = results.setdefault((f"{name} {kind.upper()}", size), Result())
                for draw in draws:
                    start = time.perf_counter()
                    p = infinite_network(kernels, kind, draw[:size], test, labels)
                    result.seconds.append(time.perf_counter() - start)
                    result.accuracy.append(np.mean(p.argmax(1) == labels[test]))
                    result.certainty.append(np.mean(p.max(1)))
                    result.negative_log_likelihood.append(-np.mean(np.log(p[test, labels[test]])))
                probabilities_of[name, kind, size] = p
    for name, model in (("k-nearest neighbours", KNeighborsClassifier(3)), ("SVM, RBF kernel", SVC(C=10.0))):
        for size in TRAIN_SIZES:
            result = results.setdefault((name, size), Result())
            for draw in draws:
                start = time.perf_counter()
                result.accuracy.append(classical(model, x, draw[:size], test, labels))
                result.seconds.append(time.perf_counter() - start)

    print_table(results, kernel_seconds)
    draw_figure(args.figure, results, images[test], labels[test], probabilities_of["CNN", "nngp", GALLERY_SIZE])
    print(f"Figure: {args.figure}")


def print_table(results: dict[tuple[str, int], Result], kernel_seconds: dict[str, float]) -> None:
    print(f"\n{N_TEST} test images, means over {N_REPEATS} training sets (seconds: medians)")
    print(f"{'method':22s} {'images':>7s} {'accuracy':>9s} {'certainty':>10s} {'neg. log-lik.':>14s} {'seconds':>8s}")
    for (name, size), result in results.items():
        uncertainty = f"{'-':>10s} {'-':>14s}"
        if result.certainty:
            uncertainty = f"{np.mean(result.certainty):10.1%} {np.mean(result.negative_log_likelihood):14.3f}"
        print(f"{name:22s} {size:7d} {np.mean(result.accuracy):9.1%} {uncertainty} {np.median(result.seconds):8.3f}")
    for name, seconds in kernel_seconds.items():
        print(f"Kernels of the {name} between all images: {seconds:.1f} s")


def draw_figure(path: str, results, images: np.ndarray, labels: np.ndarray, p: np.ndarray) -> None:
    """Learning curves, and the digits that the convolutional posterior is most and least certain of."""
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    curves, gallery = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    axes = curves.subplots()
    for name in dict.fromkeys(name for name, _ in results):
        errors = 100 - 100 * np.array([results[name, size].accuracy for size in TRAIN_SIZES])
        (line,) = axes.plot(TRAIN_SIZES, errors.mean(1), "o-" if name[:3] in ("FCN", "CNN") else "s--", label=name)
        axes.fill_between(TRAIN_SIZES, errors.min(1), errors.max(1), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="training images", ylabel="test errors, %")
    axes.set_title(f"Handwritten digits (8 x 8): means and ranges over {N_REPEATS} training sets", fontsize=11)
    axes.set_xticks(TRAIN_SIZES, [str(s) for s in TRAIN_SIZES])
    axes.set_yticks(ticks := (0.5, 1, 2, 5, 10, 20, 40), [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    certainty = p.max(1)
    ranked = np.argsort(certainty)
    gallery.suptitle(f"Bayesian CNN, {GALLERY_SIZE} images: most certain (top), least (bottom)", fontsize=11)
    for axes, i in zip(gallery.subplots(4, 5).flat, (*ranked[:-11:-1], *ranked[:10]), strict=True):
        axes.imshow(images[i], cmap="gray_r")
        right = p[i].argmax() == labels[i]
        axes.set_title(
            f"{p[i].argmax()}: {certainty[i]:.0%}" + ("" if right else f" (is {labels[i]})"),
            fontsize=9,
            color="black" if right else "crimson",
        )
        axes.axis("off")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
