"""`make gpu-check`: are the Pallas kernels right on the GPU (or TPU) of this machine, and how fast are they?

First the programs of the conformance suite and the benchmarked networks, in float32 on the device by the Pallas kernels
and by the `xla` backend, against float64 on the CPU. Then medians of synchronised timings, against the `xla` backend
and a layer-by-layer baseline (layer_by_layer.py) on the same device.

`check` or `measure` behind the command (BENCH_ARGS) does one of the two alone.

With --rehearse the kernels of one backend are interpreted on the CPU, on tiny images: this shows that the script works,
and measures nothing.
"""

import argparse
import pathlib
import statistics
import sys
import time
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import layer_by_layer
import nt_stax
import numpy as np
from networks import NETWORKS
from nt_core import Request, activations, backends
from nt_core.backends.mosaic.backend import MosaicGpuBackend, MosaicTpuBackend

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "packages" / "nt-core" / "tests"))
import conformance

TOLERANCE = 1e-6
PAIRS = Request(ntk=True, covariances=False)
MYRTLE = ["conv", "relu"] * 2 + ["pool"] + (["conv", "relu"] * 3 + ["pool"]) * 2 + ["pool", "pool", "flatten"]
NONLINEARITIES = (
    *(activations.Erf(1.0, 0.8, 0.1), activations.Gelu(), activations.Step(-1.0, 1.0, 0.0)),
    *(activations.RectifiedMonomial(2), activations.Monomial(3), activations.Polynomial((0.1, 0.2, 0.3))),
    *(activations.Hermite(3), activations.Exp(0.5, 0.4), activations.ExpNormalized(0.7, 0.2), activations.Gabor()),
    *(activations.Gaussian(0.8, -0.6), activations.Rbf(0.4), activations.Sin(1.0, 0.7, 0.2)),
    *(activations.Clip(1.0, -1.0, 1.0, 0.0), activations.ClipGate(1 / 6, 3.0, 0.5)),
    *(activations.ElementwiseNumerical(fn, None, 50) for fn in (jnp.tanh, jax.nn.silu)),
)
# Network, layers of the baseline if it has them all (its W_std is 1 for the CNNs), variance of its weights, and samples
# of a block: the baseline takes the fewest, as its covariances must fit into memory, and `xla` all but the most.
TIMED = (
    ("cnn21-pool", ["conv", "relu"] * 21 + ["global pool"], 1.0, (8, 64, 256)),
    ("cnn21-flatten", ["conv", "relu"] * 21 + ["flatten"], 1.0, (64, 512, 1024)),
    ("myrtle10", MYRTLE, 2.0, (8, 16, 128)),
    ("wide-resnet", None, None, (32, 64)),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["check", "measure"], default=["check", "measure"])
    parser.add_argument("--rehearse", choices=["mosaic_gpu", "mosaic_tpu"])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.rehearse:
        cls = {"mosaic_gpu": MosaicGpuBackend, "mosaic_tpu": MosaicTpuBackend}[arguments.rehearse]
        name = cls.name
        backends._BACKENDS[name] = cls(interpret=True)
        print(f"A rehearsal: the kernels of {name} are interpreted on the CPU. The times mean nothing.")
    else:
        name = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(jax.default_backend(), "")
        if not name:
            sys.exit(
                f"There is no GPU (or TPU) here: JAX {jax.__version__} runs on {jax.default_backend()}. Nothing was "
                "checked and nothing was measured. For a GPU: make gpu-check VENV=.venv-gpu JAX='jax[cuda13]'."
            )
    device = jax.devices()[0]
    print(f"{name} on {device.device_kind}, JAX {jax.__version__}, float32")
    wrong = check(name, arguments.rehearse is not None) if "check" in arguments.parts else []
    if "measure" in arguments.parts:
        measure(name, arguments)
    if wrong:
        sys.exit(f"WRONG: {', '.join(wrong)}")


def check(name, rehearse):
    """Prints the largest errors, relative to the largest entry, and returns the names of inaccurate cases."""
    backends = (name,) if rehearse else (name, "xla")
    print(f"\n| error of NNGP and NTK | {' | '.join(backends)} |\n|{'---|' * (1 + len(backends))}")
    wrong = []
    for case, (kernel, x1, x2) in cases(rehearse).items():
        with jax.default_device(jax.devices("cpu")[0]), jax.enable_x64(True):
            wide = (np.asarray(x1, "float64"), None if x2 is None else np.asarray(x2, "float64"))
            expected = kernel(*wide, ("cpu", "xla"))
        cells = []
        for backend in backends:
            try:
                actual = kernel(x1, x2, backend)
            except NotImplementedError as refused:
                cells.append(str(refused))
                continue
            except Exception:  # a kernel that cannot be compiled or run: the other cases still count
                traceback.print_exc()
                cells.append("failed")
                wrong.append(f"{case} ({backend})")
                continue
            errors = [relative_error(getattr(actual, k), getattr(expected, k)) for k in ("nngp", "ntk")]
            if not max(errors) < TOLERANCE:  # NaN is wrong too
                wrong.append(f"{case} ({backend})")
            cells.append(" and ".join(f"{error:.1e}" for error in errors))
        print(f"| {case} | {' | '.join(cells)} |", flush=True)
    return wrong


def cases(rehearse):
    """Kernels, functions of two batches and a backend, and the batches."""
    found = programs(rehearse)
    return {name: (of_program(program), x1, x2) for name, (program, x1, x2) in found.items()} | networks(rehearse)


def of_program(program):
    return lambda x1, x2, backend: conformance.run(program, x1, x2, PAIRS, backend)


def networks(rehearse):
    """The benchmarked networks, on blocks for which one group of threads computes many planes, and few."""
    found = {}
    for network in () if rehearse else ("cnn21-pool", "cnn21-flatten", "wide-resnet", "myrtle10"):
        kernel_fn = NETWORKS[network](nt_stax)[2]

        def kernel(x1, x2, backend, kernel_fn=kernel_fn):
            return kernel_fn(x1, x2, ("nngp", "ntk"), implementation=backend)

        for n in (2, 16):
            found[f"{network}, {n} x {n}"] = kernel, *conformance.inputs((32, 32), n, n, "float32")
    return found


def programs(rehearse):
    """Programs and their inputs."""
    found = {}
    for case, (space, layers) in conformance.CHAINS.items():
        if not rehearse or case in ("dense", "valid", "global pool"):
            x1, x2 = conformance.inputs((3, 3) if case == "global pool" and rehearse else space, 3, 2, "float32")
            found[case] = conformance.chain(conformance.spec_of(x1, x2), layers), x1, x2
    if rehearse:
        return found
    x1, x2 = conformance.inputs((8, 8), 3, 2, "float32")
    for activation in NONLINEARITIES:
        dual, normalize = conformance.steps.Dual(activation), conformance.steps.Normalize(1e-3, ())
        layers = [conformance.conv(), dual, normalize, conformance.conv(), dual, conformance.steps.Flatten()]
        name = type(activation).__name__
        if isinstance(activation, activations.ElementwiseNumerical):
            name = f"{name} of {activation.fn.__name__}"
        found[name] = conformance.chain(conformance.spec_of(x1, x2), layers), x1, x2
    found["residual"] = conformance.residual(conformance.spec_of(x1, x2)), x1, x2
    deep = [layer for _ in range(21) for layer in (conformance.conv(), conformance.RELU)]
    deep += [conformance.steps.GlobalPool(conformance.MEAN), conformance.dense()]
    x1, other = conformance.inputs((32, 32), 3, 3, "float32")
    for noise in (0.0, 1e-4, 1e-2, 1.0):
        x2 = (x1 + noise * other).astype("float32")
        found[f"21 layers, noise {noise:g}"] = conformance.chain(conformance.spec_of(x1, x2), deep), x1, x2
    found["21 layers, symmetric"] = conformance.chain(conformance.spec_of(x1, x1), deep), x1, None
    return found


def measure(name, arguments):
    """Prints medians of synchronised times."""
    print(
        "\n| network | what | block | ms per NTK entry | first call, s | NTK, against xla |\n|---|---|---|---|---|---|"
    )
    for network, layers, w_var, samples in TIMED:
        space, repeats = (32, 32), arguments.repeats
        if arguments.rehearse:
            if network != "cnn21-flatten":
                continue
            space, repeats, samples = (2, 2), 1, (2, 3)
        kernel_fn = NETWORKS[network](nt_stax)[2]

        def library(x1, x2, implementation, kernel_fn=kernel_fn):
            return kernel_fn(x1, x2, "ntk", implementation=implementation)

        def baseline(x1, x2, layers=layers, w_var=w_var, network=network):
            ntk = layer_by_layer.kernel(layers, x1, x2, w_var)[1]
            if network != "myrtle10":
                return ntk
            nngp = layer_by_layer.kernel(layers, x1, x2, w_var)[0]
            return 2 * (ntk + nngp)  # its dense layer, with W_std^2 = 2

        rows = [("xla", partial(library, implementation="xla"), n) for n in samples[:-1]]
        rows += [("layer by layer", jax.jit(baseline), samples[0])] if layers else []
        rows += [(name, partial(library, implementation=name), n) for n in samples]
        expected = {}  # by the number of samples, of `xla`
        for what, function, n in rows:
            x1, x2 = (jnp.asarray(x) for x in conformance.inputs(space, n, n, "float32"))
            try:
                first, seconds, result = timed(function, x1, x2, repeats)
            except Exception as error:  # out of memory, for instance: the other rows still count
                print(f"| {network} | {what} | {n} x {n} | {type(error).__name__}: {str(error)[:80]} | | |", flush=True)
                continue
            error = f"{relative_error(result, expected.setdefault(n, result)):.1e}" if n < samples[-1] else ""
            print(
                f"| {network} | {what} | {n} x {n} | {1e3 * seconds / n**2:.3g} | {first:.1f} | {error} |", flush=True
            )


def timed(function, x1, x2, repeats):
    """Returns seconds of the first call, the median of later ones, and the result."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(function(x1, x2))
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:]), np.asarray(result)


def relative_error(actual, expected):
    """The largest error, relative to the largest entry, which is 0 for the tangent kernel of a function with jumps."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1.0))


if __name__ == "__main__":
    main()
