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
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAIN_SIZES = (25, 50, 100, 200, 400)
N_TEST = 300
N_REPEATS = 3  # training sets of each size, for the spread of the learning curves
N_CLASSES = 10
ROWS = 100  # images whose kernels are computed in one call, between two ticks of the progress bar
DIAG_REG = 1e-3  # noise of the labels, relative to the mean of the kernel's diagonal
W_STD, B_STD = 2**0.5, 0.1


@dataclasses.dataclass
class Result:
    """How one method does with training sets of one size."""

    accuracy: list[float] = dataclasses.field(default_factory=list)
    negative_log_likelihood: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


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


def probabilities(gaussian: nt.predict.Gaussian, n_draws: int = 1000) -> np.ndarray:
    """Returns how often each class has the largest output, over draws from the predictive distribution."""
    mean, std = np.asarray(gaussian.mean), np.sqrt(np.maximum(np.diag(gaussian.covariance), 0) + DIAG_REG)
    draws = mean + std[:, None] * np.random.default_rng(0).normal(size=(n_draws, *mean.shape))
    counts = np.apply_along_axis(np.bincount, 0, draws.argmax(-1), minlength=N_CLASSES).T
    return (counts + 1) / (n_draws + N_CLASSES)


def infinite_network(
    kernels: tuple[np.ndarray, np.ndarray], kind: str, train: np.ndarray, test: np.ndarray, labels: np.ndarray
):
    """Returns class probabilities of the test images: the exact posterior, or the ensemble after gradient descent."""

    def both(rows, columns):
        nngp, ntk = (k[np.ix_(rows, columns)] for k in kernels)
        return Kernels(nngp, ntk)

    y_train = np.eye(N_CLASSES, dtype=np.float32)[labels[train]] - 1 / N_CLASSES
    predict_fn = nt.predict.gp_inference(both(train, train), y_train, diag_reg=DIAG_REG)
    return probabilities(predict_fn(kind, both(test, train), both(test, test)))


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
    n = N_TEST + max(TRAIN_SIZES)
    order = np.random.default_rng(0).permutation(len(digits.target))[:n]
    images, labels = digits.images[order].astype(np.float32) / 16, digits.target[order]
    x, test, pool = images[..., None] - images.mean(), np.arange(N_TEST), np.arange(N_TEST, n)

    results: dict[tuple[str, int], Result] = {}
    certainties = {}
    draws = [np.random.default_rng(seed).permutation(pool) for seed in range(N_REPEATS)]
    kernel_seconds = {}
    for name, network in (("FCN", fully_connected()), ("CNN", convolutional())):
        start = time.perf_counter()
        kernels = kernels_of_all(network[2], x, name)
        kernel_seconds[name] = time.perf_counter() - start
        for size in TRAIN_SIZES:
            for kind in ("nngp", "ntk"):
                result = results.setdefault((f"{name} {kind.upper()}", size), Result())
                start = time.perf_counter()
                for draw in draws:
                    p = infinite_network(kernels, kind, draw[:size], test, labels)
                    result.accuracy.append(np.mean(p.argmax(1) == labels[test]))
                    result.negative_log_likelihood.append(-np.mean(np.log(p[test, labels[test]])))
                    certainties[name, kind, size] = p
                result.seconds = (time.perf_counter() - start) / N_REPEATS
    for name, model in (("k-nearest neighbours", KNeighborsClassifier(3)), ("SVM, RBF kernel", SVC(C=10.0))):
        for size in TRAIN_SIZES:
            result = results.setdefault((name, size), Result())
            start = time.perf_counter()
            result.accuracy = [classical(model, x, draw[:size], test, labels) for draw in draws]
            result.seconds = (time.perf_counter() - start) / N_REPEATS

    print_table(results, kernel_seconds)
    draw_figure(args.figure, results, images[test], labels[test], certainties["CNN", "nngp", max(TRAIN_SIZES)])
    print(f"Figure: {args.figure}")


def print_table(results: dict[tuple[str, int], Result], kernel_seconds: dict[str, float]) -> None:
    print(f"\n{N_TEST} test images, means over {N_REPEATS} training sets")
    print(f"{'method':22s} {'images':>7s} {'accuracy':>9s} {'neg. log-lik.':>14s} {'seconds':>8s}")
    for (name, size), result in results.items():
        likelihood = (
            f"{np.mean(result.negative_log_likelihood):14.3f}" if result.negative_log_likelihood else " " * 13 + "-"
        )
        print(f"{name:22s} {size:7d} {np.mean(result.accuracy):9.1%} {likelihood} {result.seconds:8.3f}")
    for name, seconds in kernel_seconds.items():
        print(f"Kernels of the {name} between all {N_TEST + max(TRAIN_SIZES)} images: {seconds:.1f} s")


def draw_figure(path: str, results, images: np.ndarray, labels: np.ndarray, p: np.ndarray) -> None:
    """Learning curves, and the digits that the convolutional posterior is most and least certain of."""
    figure = plt.figure(figsize=(12, 5), layout="constrained")
    curves, gallery = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    axes = curves.subplots()
    for name in dict.fromkeys(name for name, _ in results):
        accuracy = np.array([results[name, size].accuracy for size in TRAIN_SIZES])
        mean, spread = 100 * accuracy.mean(1), 100 * accuracy.std(1)
        (line,) = axes.plot(TRAIN_SIZES, mean, "o-" if "NN" in name or "NTK" in name else "s--", label=name)
        axes.fill_between(TRAIN_SIZES, mean - spread, mean + spread, color=line.get_color(), alpha=0.15)
    axes.set(xscale="log", xlabel="training images", ylabel="test accuracy, %", title="Handwritten digits (8 x 8)")
    axes.set_xticks(TRAIN_SIZES, [str(s) for s in TRAIN_SIZES])
    axes.minorticks_off()
    axes.legend()
    certainty = p.max(1)
    ranked = np.argsort(certainty)
    gallery.suptitle("CNN, Bayesian posterior: most certain (top) and least certain")
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
