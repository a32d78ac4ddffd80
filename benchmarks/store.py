"""Kernels on disk: what the store costs, how two processes scale, and what a full CIFAR-10 would take.

    .venv/bin/python benchmarks/store.py            # all
    .venv/bin/python benchmarks/store.py overhead   # or `scaling`, `memory`, `rehearsal`

overhead   A network on images of 3 x 3 in tiles of 512 x 512, 1 MB in single precision: `compute` against
           `nt.batch` with the same cells, which keeps them in memory.
scaling    A convolutional network by one process, then by two, each on a core of its own.
memory     The peak of a process that computes a matrix of 1.5 GB from inputs in a file. By itself: earlier parts count.
rehearsal  What `nt_core.store.plan` says of Myrtle-10 on 1000 images of 32 x 32 and on 60,000 from a small tile, and
           with --images N the time that the kernel of N images takes.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import neural_tangents as nt
import numpy as np
from networks import NETWORKS
from neural_tangents import stax
from nt_core.store import plan

CORES = sorted(os.sched_getaffinity(0))


def normal(*shape):
    """Random inputs in single precision."""
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def pooled_cnn(depth):
    """Convolutions with ReLU, and a pool over all positions."""
    layers = [layer for _ in range(depth) for layer in (stax.Conv(1, (3, 3), padding="SAME"), stax.Relu())]
    return stax.serial(*layers, stax.GlobalAvgPool())[2]


def seconds(function):
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def overhead(folder, n=2048, tile=512, rounds=15):
    """Prints the time of a tile in a store and in memory, which take turns, without compilation."""
    kernel_fn, x = pooled_cnn(depth=3), normal(n, 3, 3, 3)
    batched = nt.batch(kernel_fn, tile, 1, store_on_device=False)
    batched(x[: 2 * tile], None, "ntk")  # compiles
    in_memory, on_disk = [], []
    for number in range(rounds):
        store = nt.KernelStore.create(folder / f"overhead-{number}", kernel_fn, x, get="ntk", tile=tile)
        tiles = store.missing()
        store.write_tiles(tiles[:2])  # compiles both kinds
        in_memory.append(seconds(lambda: batched(x, None, "ntk")) / len(tiles))
        on_disk.append(seconds(lambda store=store: store.compute(device_count=1, progress=False)) / (len(tiles) - 2))
        shutil.rmtree(store.path)
    ratios = np.array(on_disk) / np.array(in_memory)
    print(f"overhead: tiles of {tile} x {tile}, medians of {rounds} turns")
    print(f"  in memory {np.median(in_memory):.3f} s, on disk {np.median(on_disk):.3f} s")
    low, median, high = 100 * (np.percentile(ratios, [25, 50, 75]) - 1)
    print(f"  the store adds {median:+.1f} % (quartiles of the turns {low:+.1f} and {high:+.1f} %)")


def work(path, process, of):
    """One process of `scaling`: says that it has compiled, and after a line of input how long its work has taken."""
    os.sched_setaffinity(0, {CORES[int(process)]})
    store = nt.KernelStore.create(path, pooled_cnn(depth=5), normal(128, 32, 32, 3), get="ntk", tile=8)
    store.write_tiles(store.grid.cells()[:2])
    print("ready", flush=True)
    input()
    print(seconds(lambda: store.compute(process=int(process), of=int(of), device_count=1)), flush=True)


def scaling(folder):
    """Prints the time that one process takes, and two."""
    times = {}
    for of in (1, 2):
        command = [sys.executable, "-W", "ignore", __file__, "work", str(folder / f"scaling-{of}")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen([*command, str(i), str(of)], **pipes) for i in range(of)]
        for process in processes:
            process.stdout.readline()
        for process in processes:
            print(file=process.stdin, flush=True)
        times[of] = max(float(process.communicate()[0]) for process in processes)
        print(f"scaling: {of} process{'es' * (of > 1)}, each on one core: {times[of]:.1f} s")
    print(f"  two are {times[1] / times[2]:.2f} times as fast")


def memory(folder, n=20_000):
    """Prints the peak memory of a process that computes a matrix, and the size of that."""
    before = peak_gigabytes()
    np.save(folder / "x.npy", normal(n, 100))
    kernel_fn = stax.serial(stax.Dense(1), stax.Relu(), stax.Dense(1))[2]
    store = nt.KernelStore.create(folder / "memory", kernel_fn, np.load(folder / "x.npy", mmap_mode="r"), get="ntk")
    store.compute()
    print(f"memory: {n} x {n} in tiles of {store.grid.rows}, {store.status()}")
    print(f"  peak of the process {peak_gigabytes():.2f} GB, {before:.2f} before it; the matrix {n**2 * 4 / 2**30:.2f}")


def peak_gigabytes():
    """The largest memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rehearsal(folder, images):
    """Prints plans for Myrtle-10, and the time of the whole for some images."""
    kernel_fn, x = NETWORKS["myrtle10"](stax)[2], normal(max(images, 32), 32, 32, 3)
    for n in (1000, 60_000):
        print(f"rehearsal, Myrtle-10:\n{plan(kernel_fn, x[:64], n1=n, tile=512)}")
    if images:
        store = nt.KernelStore.create(folder / "rehearsal", kernel_fn, x[:images], tile=64)
        took, pairs = seconds(store.compute), images * (images + 1) / 2
        print(f"{images} images: {took:.1f} s, {1e3 * took / pairs:.3g} ms for each of {pairs:,.0f} pairs")


def main():
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["memory", "overhead", "scaling", "rehearsal"])
    parser.add_argument("--images", type=int, default=0)
    options = parser.parse_args()
    if options.parts[0] == "work":
        return work(*options.parts[1:])
    with tempfile.TemporaryDirectory() as folder:
        for part in options.parts:
            if part == "rehearsal":
                rehearsal(Path(folder), options.images)
            else:
                {"memory": memory, "overhead": overhead, "scaling": scaling}[part](Path(folder))


if __name__ == "__main__":
    main()
