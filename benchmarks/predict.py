"""Predictions by conjugate gradients: against Cholesky, at sizes that are not factored, and in which precision.

    python benchmarks/predict.py cholesky --sizes 500 1000 2000 4000
    python benchmarks/predict.py large --n 50000
    python benchmarks/predict.py tiles --n 2000
    python benchmarks/predict.py kept --n 2000
    python benchmarks/predict.py precision --n 2000

The kernel is the NTK of a network of three ReLU layers in float32, the labels are ten outputs of a smooth function with
noise. Seconds are those of the clock, and in brackets those of all cores.
"""

import argparse
import contextlib
import resource
import time
import warnings

import jax
import jax.numpy as jnp
import neural_tangents as nt
import nt_core.products
import nt_predict._tiles
import numpy as np
from neural_tangents import stax
from nt_core.grid import Grid, evenly

FEATURES, OUTPUTS = 64, 10


def network():
    hidden = [stax.Dense(512, 2**0.5, 0.1), stax.Relu()]
    return stax.serial(*hidden, *hidden, *hidden, stax.Dense(OUTPUTS))[2]


def data(n: int, n_test: int = 100):
    random = np.random.default_rng(0)
    x = random.normal(size=(n + n_test, FEATURES)).astype(np.float32)
    y = np.sin(x @ random.normal(size=(FEATURES, OUTPUTS)) / FEATURES**0.5) + 0.1 * random.normal(
        size=(len(x), OUTPUTS)
    )
    return x[:n], y[:n].astype(np.float32), x[n:]


@contextlib.contextmanager
def timed(seconds: dict, name: str):
    start = time.perf_counter(), time.process_time()
    yield
    seconds[name] = time.perf_counter() - start[0], time.process_time() - start[1]


def shown(seconds) -> str:
    return "{:.2f} ({:.2f})".format(*seconds)


def cholesky(args) -> None:
    """PCG against Cholesky, whose predictions in double precision are the ones to reach."""
    print("| n | kernel, s | Cholesky, s | PCG, held, s | passes | rank | PCG's error | Cholesky's in float32 |")
    print("|---|---|---|---|---|---|---|---|")
    for n in args.sizes:
        x, y, x_test = data(n)
        kernel_fn, seconds = network(), {}
        for _ in range(2):  # the first one compiles
            with timed(seconds, "kernel"):
                kernel = jax.block_until_ready(kernel_fn(x, None, "ntk"))
            test_train = kernel_fn(x_test, x, "ntk")
            with timed(seconds, "cholesky"):
                gram = nt.predict.Gram(kernel, diag_reg=args.diag_reg)
                in_single = np.asarray(nt.predict.fit(gram, y, nt.predict.Cholesky()).mean(test_train))
            with timed(seconds, "pcg"):
                iterated = nt.predict.fit(gram, y, nt.predict.PCG())
                actual, stats = np.asarray(iterated.mean(test_train)), iterated.stats
                del gram, iterated
        with jax.enable_x64(True):
            gram = nt.predict.Gram(jnp.asarray(kernel, jnp.float64), diag_reg=args.diag_reg)
            del kernel  # the next ones take all memory at n = 20,000
            fitted = nt.predict.fit(gram, y, nt.predict.Cholesky())
            exact = np.asarray(fitted.mean(jnp.asarray(test_train, jnp.float64)))
            del gram, fitted
        errors = " | ".join(f"{np.abs(mean - exact).max():.1e}" for mean in (actual, in_single))
        times = " | ".join(shown(seconds[name]) for name in ("kernel", "cholesky", "pcg"))
        print(f"| {n} | {times} | {stats.passes} | {stats.rank} | {errors} |", flush=True)


def large(args) -> None:
    """A matrix that is computed again in every pass."""
    x, y, x_test = data(args.n)
    kernel_fn, seconds = network(), {}
    in_single = jax.jit(lambda a, b: kernel_fn(a, b, "ntk"))
    size = evenly(args.n, nt_predict._tiles._TILE)
    grid = Grid(args.n, args.n, size, size, symmetric=True)
    for cell in ((0, 0), (0, grid.shape[1] - 1), (grid.shape[0] - 1, grid.shape[1] - 1)):  # compiles
        i, j = grid.samples(cell)
        jax.block_until_ready(in_single(x[i], x[j]))
    with timed(seconds, "kernel"):
        for i, j in (grid.samples(cell) for cell in grid.cells()):
            jax.block_until_ready(in_single(x[i], x[j]))
    solver = nt.predict.PCG(rank=args.rank, hold=False)
    with timed(seconds, "all"):
        fitted = nt.predict.fit(nt.predict.Gram(kernel_fn, x, "ntk", args.diag_reg), y, solver)
    fitted.mean(x_test)
    passes = fitted.stats.passes
    tiles = fitted._tiles
    with timed(seconds, "pass"):
        tiles.multiply(np.ones((args.n, OUTPUTS)))
    print(f"n = {args.n}: {fitted.stats.status} after {passes} passes, rank {fitted.stats.rank}")
    print(f"largest true relative residual {fitted.stats.residuals.max():.1e}")
    print(f"kernel {shown(seconds['kernel'])} s, a pass {shown(seconds['pass'])} s, all {shown(seconds['all'])} s")
    print(
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB, of which the matrix would "
        f"be {args.n**2 * 4 / 2**30:.2f}"
    )


def tiles(args) -> None:
    """A tile times vectors, and its transpose: as on CPU, and by XLA alone."""
    random, seconds = np.random.default_rng(0), {}
    tile = jnp.asarray(random.normal(size=(args.n, args.n)), jnp.float32)
    ways = {"native": jax.jit(nt_core.products.products), "XLA": jax.jit(nt_core.products._by_xla)}
    with jax.enable_x64(True):
        vectors = jnp.asarray(random.normal(size=(args.n, OUTPUTS)))
        for _ in range(30):
            for name, multiply in ways.items():
                start = time.perf_counter()
                jax.block_until_ready(multiply(tile, vectors, vectors))
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name}: median {1e3 * np.median(times):.2f} ms, quartiles {1e3 * np.quantile(times, [0.25, 0.75])}")


def kept(args) -> None:
    """Where `PCG(hold=None)` keeps kernels that do not fit in memory, as if these did not."""
    nt_predict._tiles.fits_in_memory = lambda *args, **kwargs: False
    layers = [layer for _ in range(5) for layer in (stax.Conv(1, (3, 3), padding="SAME"), stax.Relu())]
    pooled = stax.serial(*layers, stax.GlobalAvgPool(), stax.Dense(1))[2]
    x, y, _ = data(args.n)
    images = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype(np.float32)
    for name, kernel_fn, inputs in (("fully connected", network(), x), ("pooled", pooled, images)):
        fitted = nt.predict.fit(nt.predict.Gram(kernel_fn, inputs, "ntk", 1e-1), y[: len(inputs)], nt.predict.PCG())
        print(f"{name}, {len(inputs)} points: {fitted.stats.kept}, {fitted.stats.status}")


def precision(args) -> None:
    """The residual that is reached with products of tiles in double and in single precision."""
    x, y, _ = data(args.n)
    kernel = np.asarray(network()(x, None, "ntk"))
    double = nt_predict._tiles._products
    single = jax.jit(lambda tile, right, left: (tile @ right.astype(tile.dtype), tile.T @ left.astype(tile.dtype)))
    for diag_reg in (1e-1, 1e-2, 1e-3, 1e-4):
        for name, products in (("double", double), ("single", single)):
            nt_predict._tiles._products = products
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fitted = nt.predict.fit(nt.predict.Gram(kernel, diag_reg=diag_reg), y, nt.predict.PCG())
            weights, shift = fitted._weights, diag_reg * kernel.diagonal().mean(dtype=np.float64)
            errors = y - kernel.astype(np.float64) @ weights - shift * weights
            residual = (np.linalg.norm(errors, axis=0) / np.linalg.norm(y, axis=0)).max()
            print(
                f"diag_reg {diag_reg:g}, {name}: {fitted.stats.status}, residual {residual:.1e} after "
                f"{fitted.stats.passes} passes",
                flush=True,
            )
    nt_predict._tiles._products = double


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in (cholesky, large, tiles, kept, precision):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(run=command)
        sub.add_argument("--diag-reg", type=float, default=1e-3)
        if command is cholesky:
            sub.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000, 4000])
        else:
            sub.add_argument("--n", type=int, default=2000)
        if command is large:
            sub.add_argument("--rank", type=int)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
