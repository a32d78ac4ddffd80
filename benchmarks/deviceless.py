"""Compiles the Pallas kernels of the benchmarked networks for a device that is not there.

`make gpu-assembly`: for an H100, by NVIDIA's own assembler. Prints seconds of compilation and, for each kernel,
registers, spills, and the instructions of each loop. `make tpu-compile`: for a TPU v5e, by libtpu. Both print the
memory between kernels. They show that kernels compile, and what they execute; neither that they are right nor how fast
they run.

    make gpu-assembly PYTHON=python3.12 [BENCH_ARGS="cnn21-pool --size 64"]
"""

import argparse
import collections
import os
import pathlib
import re
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import nt_stax
from jax.experimental import topologies
from networks import NETWORKS, cnn
from nt_core.backends.mosaic.backend import MosaicGpuBackend, MosaicTpuBackend

DUMP = pathlib.Path(tempfile.mkdtemp())
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048  core_count: 132
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_core_limit: 65536  registers_per_block_limit: 65536  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KINDS = {
    "arithmetic": ("FFMA", "FMUL", "FADD", "FMNMX", "FSETP", "FSEL", "MUFU", "FCHK"),
    "shared": ("LDS", "STS"),
    "global": ("LDG", "STG"),
    "spilled": ("LDL", "STL"),
    "barriers": ("BAR", "MEMBAR", "FENCE"),
}


# CNNs beside those of the other benchmarks: of great depth, and with nonlinearities that are sums in a loop.
OTHERS = {
    "cnn100-pool": ("GlobalAvgPool", 100),
    "silu21-pool": ("GlobalAvgPool", 21, "Silu"),
    "hard-tanh21-pool": ("GlobalAvgPool", 21, "HardTanh"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "networks", nargs="*", default=["cnn21-pool", "cnn21-flatten", "wide-resnet", "myrtle10", *OTHERS]
    )
    parser.add_argument("--device", choices=["h100", "v5e"], default="h100")
    parser.add_argument("--size", type=int, default=32, help="of the images")
    parser.add_argument("--samples", type=int, default=130, help="of each batch")
    arguments = parser.parse_args()
    backend = {"h100": MosaicGpuBackend, "v5e": MosaicTpuBackend}[arguments.device]
    backend.hardware_refusal = lambda self, device: None  # the default device is a CPU
    device = h100() if arguments.device == "h100" else v5e()
    shape = (arguments.samples, arguments.size, arguments.size, 3)
    print(f"For {device.device_kind}, JAX {jax.__version__}; two batches of images, {shape}")
    for network in arguments.networks:
        compile_network(network, shape, device, backend.name)
        report_assembly()


def h100():
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver whose version could be checked
    os.environ.update(MOSAIC_GPU_DUMP_TO=str(DUMP), MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_SASS="1")
    for root in map(pathlib.Path, sys.path):  # where the assembler is
        for found in root.glob("nvidia/cu*/bin"):
            os.environ["PATH"] = f"{found}{os.pathsep}{os.environ['PATH']}"
            os.environ.setdefault("CUDA_ROOT", str(found.parent))
    return topologies.get_topology_desc("h100", "cuda", topology="1x1x1", target_config=H100).devices[0]


def v5e():
    return topologies.get_topology_desc("v5e:2x2", "tpu").devices[0]


def compile_network(network, shape, device, implementation):
    layers = cnn(nt_stax, *OTHERS[network]) if network in OTHERS else NETWORKS[network](nt_stax)
    sharding, x = jax.sharding.SingleDeviceSharding(device), jax.ShapeDtypeStruct(shape, jnp.float32)

    def ntk(x1, x2):
        return layers[2](x1, x2, "ntk", implementation=implementation)

    start = time.perf_counter()
    try:
        lowered = jax.jit(ntk, in_shardings=sharding, out_shardings=sharding).lower(x, x)
    except NotImplementedError as refused:
        print(f"\n{network}: {refused}", flush=True)
        return
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory = compiled.memory_analysis().temp_size_in_bytes / 1e9
    print(
        f"\n{network}: lowered in {middle - start:.1f} s, compiled in {end - middle:.1f} s, {memory:.1f} GB", flush=True
    )


def report_assembly():
    """Prints what the assembler has said of each kernel, and removes it."""
    for sass in sorted(DUMP.glob("*.sass*")):
        log = sass.with_suffix(".ptxas").read_text(errors="replace")
        registers = max(map(int, re.findall(r"[Uu]sed (\d+) registers", log)))
        spills = max(sum(map(int, s)) for s in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log))
        lines = instructions(sass.read_text())
        print(f"  {sass.stem}: {registers} registers, {spills} bytes spilled, {len(lines[0])} instructions")
        for depth, kinds in loops(*lines):
            print(f"    {'  ' * depth}loop of {sum(kinds.values())}: {summary(kinds)}")
    for old in DUMP.iterdir():
        old.unlink()


def instructions(text):
    """Returns the instructions of a listing, and the index at which each label stands."""
    found, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(\S.*)$", line):
            found.append(instruction[1])
    return found, labels


def loops(found, labels):
    """Yields the depth of each loop and how often it has each instruction, without the loops inside."""
    ranges = []
    for end, instruction in enumerate(found):
        target = re.search(r"BRA.*(\.L_x_\d+)", instruction)
        if target and labels[target[1]] < end:
            ranges.append((labels[target[1]], end))
    for start, end in sorted(ranges, key=lambda r: (r[0], -r[1])):
        inner = [r for r in ranges if start <= r[0] and r[1] <= end and r != (start, end)]
        own = [i for i in range(start, end + 1) if not any(a <= i <= b for a, b in inner)]
        depth = sum(r[0] <= start and end <= r[1] for r in ranges) - 1
        yield depth, collections.Counter(operation(found[i]) for i in own)


def operation(instruction):
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def summary(kinds):
    counts = {kind: sum(kinds[name] for name in names) for kind, names in KINDS.items()}
    counts["others"] = sum(kinds.values()) - sum(counts.values())
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


if __name__ == "__main__":
    main()
