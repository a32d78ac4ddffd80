"""Ten images that teach as much as a hundred: handwritten digits, distilled by the gradient of a convolutional kernel.

Kernel ridge regression on a few images and their labels predicts batches of real digits; gradient descent on the images
and on the labels makes these predictions better (kernel inducing points, arXiv:2011.00050). Prints how many test digits
are classified right, and writes a figure of the images (by default `distillation.png`).
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from neural_tangents import stax
from sklearn.datasets import load_digits
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N_CLASSES = 10
N_TEST = 597
BATCH = 100  # real digits of one step
DIAG_REG = 1e-3  # noise of the labels, relative to the mean of the kernel's diagonal
N_DRAWS = 5  # of real images, for comparison
LEARNING_RATE = 0.05  # of the first step; it falls to 0
KERNEL = "ntk"


class Support(NamedTuple):
    """What is regressed on: images (n, height, width, 1), and labels (n, class)."""

    images: jax.Array
    labels: jax.Array


def myrtle5():
    """Myrtle-5 (arXiv:2003.02237) for images of 10 x 10: two average pools before the global one, not three."""
    conv = stax.Conv(64, (3, 3), padding="SAME", W_std=2**0.5, b_std=0.1)
    block, pool = (conv, stax.Relu()), stax.AvgPool((2, 2), (2, 2))
    return stax.serial(*block, *block, pool, *block, pool, *block, stax.GlobalAvgPool(), stax.Dense(N_CLASSES))


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all digits in a random order, with a frame of one pixel around them (10 x 10), their one-hot labels of
    mean 0, and the mean of the pixels, which was taken from them."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    framed = np.pad(data.images[order].astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))[..., None]
    labels = np.eye(N_CLASSES, dtype=np.float32)[data.target[order]] - np.float32(1 / N_CLASSES)
    return framed - framed.mean(), labels, framed.mean()


def draw(images: np.ndarray, labels: np.ndarray, per_class: int, seed: int) -> Support:
    """Returns some random images of each class, in the order of the classes."""
    order = np.random.default_rng(seed).permutation(len(images))
    classes = labels[order].argmax(1)
    chosen = np.concatenate([order[classes == c][:per_class] for c in range(N_CLASSES)])
    return Support(jnp.asarray(images[chosen]), jnp.asarray(labels[chosen]))


def predict(kernel_fn: Callable, support: Support, images) -> jax.Array:
    """Returns what kernel ridge regression on the support predicts for images: (image, class)."""
    k = kernel_fn(support.images, None, KERNEL)
    noise = DIAG_REG * jnp.trace(k) / len(k)
    weights = jnp.linalg.solve(k + noise * jnp.eye(len(k)), support.labels)
    return kernel_fn(images, support.images, KERNEL) @ weights


def accuracy(kernel_fn: Callable, support: Support, images, labels) -> float:
    return float(np.mean(predict(kernel_fn, support, images).argmax(1) == labels.argmax(1)))


def squared_error(kernel_fn: Callable, support: Support, images, labels) -> jax.Array:
    """Returns the mean squared distance of predictions from labels."""
    return jnp.mean(jnp.sum((predict(kernel_fn, support, images) - labels) ** 2, axis=1))


def distil(kernel_fn: Callable, start: Support, images, labels, n_steps: int) -> Support:
    """Returns the support that predicts real digits better, after steps of Adam on the squared error."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, n_steps))

    @jax.jit
    def step(support, state, images, labels):
        value, gradient = jax.value_and_grad(lambda s: squared_error(kernel_fn, s, images, labels))(support)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(support, updates), state, value

    support, state, random = start, optimizer.init(start), np.random.default_rng(0)
    bar = tqdm(range(n_steps), desc="distilling", unit="step")
    for _ in bar:
        chosen = random.choice(len(images), min(BATCH, len(images)), replace=False)
        support, state, value = step(support, state, images[chosen], labels[chosen])
        bar.set_postfix(error=f"{value:.3f}")
    return support


def draw_figure(path: str, start: Support, end: Support, mean: float, titles: tuple[str, str]) -> None:
    """The real images that were the start, and what was made of them."""
    figure = plt.figure(figsize=(1.1 * len(start.images), 3.2), layout="constrained")
    for row, images, title in zip(figure.subfigures(2, 1), (start.images, end.images), titles, strict=True):
        row.suptitle(title, fontsize=11)
        for axes, image in zip(row.subplots(1, len(images)), images, strict=True):
            axes.imshow(image[..., 0] + mean, cmap="gray_r", vmin=images.min() + mean, vmax=images.max() + mean)
            axes.axis("off")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", default="distillation.png", help="where to write the figure")
    parser.add_argument("--per-class", type=int, default=1, help="images that are made of each class")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    images, labels, mean = digits()
    test, train = (images[:N_TEST], labels[:N_TEST]), (images[N_TEST:], labels[N_TEST:])
    kernel_fn = myrtle5()[2]
    draws = [draw(*train, args.per_class, seed) for seed in range(N_DRAWS)]
    of_draws = [accuracy(kernel_fn, support, *test) for support in tqdm(draws, desc="real images", unit="draw")]
    support = distil(kernel_fn, draws[0], *train, args.steps)
    after = accuracy(kernel_fn, support, *test)
    of_more = accuracy(kernel_fn, draw(*train, 10 * args.per_class, seed=0), *test)

    n = len(support.images)
    print(f"\nAccuracy for {N_TEST} test digits, by kernel ridge regression on {n} images:")
    print(f"random real images, mean of {N_DRAWS} draws  {np.mean(of_draws):6.1%} (best {np.max(of_draws):.1%})")
    print(f"before: the first of these draws      {of_draws[0]:6.1%}")
    print(f"after: the same, distilled            {after:6.1%} ({args.steps} steps)")
    print(f"ten times as many real images         {of_more:6.1%}")
    titles = f"real: {of_draws[0]:.1%} of the test digits right", f"distilled: {after:.1%}"
    draw_figure(args.figure, draws[0], support, mean, titles)
    print(f"Figure: {args.figure}")


if __name__ == "__main__":
    main()
