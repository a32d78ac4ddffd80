"""Every layer and every kind of composition, here and on the archived library: is anything slower here?

    make bench-sweep                                    # the networks below, and reference cases with all layers
    make bench-sweep BENCH_ARGS="--every 1"             # all reference cases
    make bench-sweep BENCH_ARGS="imdb norm-0090"        # some of them

One process per library, side by side on the same cores, network after network; what was compiled for one network is
dropped before the next. Float64, NNGP and NTK of two batches. For each network four times, in seconds:

* the first call without jit: building the network, tracing, compilation and the computation;
* later calls without jit, the median;
* the first call of the jitted function, with everything that it needs;
* later calls of it, the median.

Prints the networks with both times and their ratio (the archived library's time over ours), and how many are slower
here: by more than 5 % and 0.2 ms.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
FIGURES = ("first", "later", "jitted first", "jitted later")
LATER_CALLS, LATER_S = 50, 0.5  # so many later calls, or as many as take so long
NOISE_S = 2e-4  # of a call; less is what a call costs beside its arithmetic, see calls.py


def layer(name, *args, **kwargs):
    """Returns the description of a layer, as in tests/networks.py."""
    return {"layer": name, "args": list(args), "kwargs": kwargs}


def conv(window=(3, 3), **kwargs):
    """Returns the description of a convolution."""
    return layer("Conv", 8, list(window), W_std=1.2, b_std=0.3, **({"padding": "SAME"} | kwargs))


RELU, DENSE, AVERAGE, FLATTEN = layer("Relu"), layer("Dense", 1, 1.2, 0.3), layer("GlobalAvgPool"), layer("Flatten")
IMAGES, TEXT = (4, 8, 8, 3), (4, 500, 50)
# Description, shape of a batch, and the share of positions at the end of samples that are masked.
NETWORKS = {
    "imdb": ([conv([9]), RELU, conv([9]), RELU, AVERAGE, DENSE], TEXT, 0.5),
    "attention, masks": ([conv(), layer("GlobalSelfAttention", 8, 8, 8, 2), AVERAGE, DENSE], IMAGES, 0.5),
    "resize": ([conv(), RELU, layer("ImageResize", [-1, 4, 6, -1], "linear"), conv(), RELU, AVERAGE], IMAGES, 0),
    "rectified": ([conv(), layer("RectifiedMonomial", 2), FLATTEN, DENSE], IMAGES, 0),
    "circular": ([conv(padding="CIRCULAR"), RELU, conv(padding="CIRCULAR"), RELU, AVERAGE], IMAGES, 0),
    "three axes": ([conv((2, 2, 2)), RELU, conv((2, 2, 2)), RELU, AVERAGE], (4, 4, 4, 4, 3), 0),
    "deep": ([conv(), RELU] * 20 + [AVERAGE, DENSE], IMAGES, 0),
    "deep dense": ([DENSE, RELU] * 20, (100, 300), 0),
    "normalized": ([conv(), layer("LayerNorm", [1, 2, -1]), RELU] * 3 + [AVERAGE], IMAGES, 0),
    "standard": ([conv(parameterization="standard", s=[1, 2]), RELU, AVERAGE], IMAGES, 0),
}


def problems(chosen, every):
    """Returns the networks to measure by name: what a worker needs of each."""
    made = {
        name: {"net": {"serial": layers}, "shape": shape, "masked": masked}
        for name, (layers, shape, masked) in NETWORKS.items()
    }
    cases = json.loads((TESTS / "data" / "reference_layers.json").read_text())
    kept = cases[::every] if every else covering(cases)
    if chosen:
        by_name = made | {case["id"]: {"case": case} for case in cases}
        return {name: by_name[name] for name in chosen}
    return made | {case["id"]: {"case": case} for case in kept}


def covering(cases):
    """Returns the first cases that have, between them, every layer and both parameterizations of each family."""
    sys.path.insert(0, str(TESTS))
    from networks import layer_names

    seen, kept = set(), []
    for case in cases:
        features = {(name, "standard" in json.dumps(case["net"])) for name in layer_names(case["net"])}
        features.add(case["family"])
        if features - seen:
            seen |= features
            kept.append(case)
    return kept


def serve():
    """Answers each line on stdin, a network, with its four times."""
    os.environ["JAX_ENABLE_X64"] = "1"
    sys.path.insert(0, str(TESTS))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not a reply
    import jax
    import numpy as np
    from networks import build

    jax.config.update("jax_enable_x64", True)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.float32(0)))  # the start of the backend is not the library's time
    stored = np.load(TESTS / "data" / "reference_layers.npz")

    def arguments(problem):
        if "case" not in problem:
            x1, x2 = (np.random.default_rng(i).normal(size=problem["shape"]) for i in (1, 2))
            for x in (x1, x2):
                for i, sample in enumerate(x):  # of different lengths, the first one whole
                    sample[len(sample) - int(len(sample) * problem["masked"] * i / len(x)) :] = 10.0
            return x1, x2, {"mask_constant": 10.0} if problem["masked"] else {}
        case = problem["case"]
        kwargs = {} if case["mask_constant"] is None else {"mask_constant": case["mask_constant"]}
        if f"{case['id']}/pattern1" in stored:
            kwargs["pattern"] = tuple(stored[f"{case['id']}/pattern{n}"] for n in (1, 2))
        return *(stored[f"{case['id']}/{name}"] for name in ("x1", "x2")), kwargs

    def seconds(fn, *args):
        start = time.perf_counter()
        jax.block_until_ready(tuple(fn(*args)))
        return time.perf_counter() - start

    def times(problem):
        x1, x2, kwargs = arguments(problem)
        x1, x2 = jax.device_put((x1, x2))

        def network():
            kernel_fn = build((problem.get("case") or problem)["net"])[2]
            return lambda x1, x2: kernel_fn(x1, x2, ("nngp", "ntk"), **kwargs)

        for wrapped in (lambda fn: fn, jax.jit):
            jax.clear_caches()
            kept = []

            def first(x1, x2, wrapped=wrapped, kept=kept):
                kept.append(wrapped(network()))
                return kept[0](x1, x2)

            yield seconds(first, x1, x2)
            later = []
            while len(later) < LATER_CALLS and sum(later) < LATER_S:
                later.append(seconds(kept[0], x1, x2))
            yield statistics.median(later)

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(list(times(json.loads(line)))), file=replies, flush=True)


class Worker:
    """A process with one library."""

    def __init__(self, python):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, lives as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log, "text": True}
        self._process = subprocess.Popen(
            [python, "-W", "ignore", __file__, "--serve"], env=os.environ | {"JAX_PLATFORMS": "cpu"}, **pipes
        )
        self._reply()

    def _reply(self):
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}:\n{self._log.read()}")
        return line

    def times(self, problem):
        """Returns the four times of a network."""
        print(json.dumps(problem), file=self._process.stdin, flush=True)
        return json.loads(self._reply())

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def main():
    """Measures the networks on both libraries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="only these")
    parser.add_argument("--every", type=int, default=0, help="take one reference case of so many, not a cover")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()

    from peer import LIBRARIES, make_peer_environment

    make_peer_environment()
    workers = {name: Worker(python) for name, python in LIBRARIES.items()}
    rows = []
    print(f"{'network':18}" + "".join(f"{figure:>28}" for figure in FIGURES))
    for name, problem in problems(options.networks, options.every).items():
        ours, peer = (workers[library].times(problem) for library in ("ours", "peer"))
        ratios = [b / a for a, b in zip(ours, peer, strict=True)]
        rows.append((ratios, [a > 1.05 * b and a > b + NOISE_S for a, b in zip(ours, peer, strict=True)]))
        cells = (f"{a:10.4f} {b:10.4f} {r:6.2f}" for a, b, r in zip(ours, peer, ratios, strict=True))
        print(f"{name:18}" + "".join(cells), flush=True)
    for worker in workers.values():
        worker.close()

    for i, figure in enumerate(FIGURES):
        slower = sum(is_slower[i] for _, is_slower in rows)
        median = statistics.median(ratios[i] for ratios, _ in rows)
        print(f"{figure}: median ratio {median:.2f}, {slower} of {len(rows)} slower here")


if __name__ == "__main__":
    main()
