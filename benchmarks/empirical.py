"""Empirical NTKs: every implementation, here and in the archived neural-tangents 0.6.5, in one run.

    make bench-empirical                                    # all networks
    make bench-empirical BENCH_ARGS="cnn-pool transformer"  # some of them
    make bench-empirical BENCH_ARGS=--memory  # 1,000 x 1,000 kernels of 10^7 parameters, in under 4 GB

Each network, library and implementation has a fresh process (empirical_worker.py): two batches, a mean over outputs,
`vmap_axes=0`, jitted, float32, the fastest of twenty calls, and the memory that was needed beyond that of the idle
process. The kernels of all are compared. Prints a table, and writes it to benchmarks/results/empirical.md.

`--memory` needs no archived library. It gives each implementation a bound, `max_bytes`, prints the most memory
that its process had, all included, and fails if that is more than 4 GB, or kernels differ. It takes some minutes.
"""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
from empirical_networks import LARGE, NETWORKS
from peer import HERE, LIBRARIES, machine, make_peer_environment

IMPLEMENTATIONS = {"AUTO": 0, "JACOBIAN_CONTRACTION": 1, "NTK_VECTOR_PRODUCTS": 2, "STRUCTURED_DERIVATIVES": 3}
SHORT = {"AUTO": "AUTO", "JACOBIAN_CONTRACTION": "Jacobians", "NTK_VECTOR_PRODUCTS": "columns"}
SHORT["STRUCTURED_DERIVATIVES"] = "structured"


MAX_BYTES, ALLOWED = 3 * 2**30, 4 * 10**9


def measure(library, network, implementation, *bound):
    """Returns the figures of one process, or None if it failed, as for want of memory."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or library == "ours"}
    done = subprocess.run(
        [
            LIBRARIES[library],
            "-W",
            "ignore",
            HERE / "empirical_worker.py",
            network,
            str(IMPLEMENTATIONS[implementation]),
            *map(str, bound),
        ],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(f"{library}, {network}, {implementation}:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def compare(network):
    """Returns the figures of a network: those of all implementations here, and of the best there."""
    ours = {name: measure("ours", network, name) for name in IMPLEMENTATIONS}
    theirs = {name: measure("peer", network, name) for name in IMPLEMENTATIONS if name != "AUTO"}
    theirs = {name: figures for name, figures in theirs.items() if figures}
    best = min(theirs, key=lambda name: theirs[name]["call_s"])
    expected = np.array(theirs[best]["kernel"])
    difference = max(np.max(np.abs(np.array(figures["kernel"]) - expected)) for figures in ours.values() if figures)
    return ours, (best, theirs[best]), difference / np.max(np.abs(expected))


def row(network, ours, best, difference):
    """Returns a line of the table."""

    def cell(figures):
        return f"{1e3 * figures['call_s']:.3g}, {figures['peak_bytes'] / 1e6:.0f}" if figures else "-"

    name, theirs = best
    ratio = theirs["call_s"] / ours["AUTO"]["call_s"]
    cells = [network, *map(cell, ours.values()), f"{SHORT[name]}: {cell(theirs)}", f"{ratio:.3g}", f"{difference:.0e}"]
    return "| " + " | ".join(cells) + " |"


def memory():
    """Prints the memory of large kernels within a bound."""
    print("| network | implementation | s | MB of the process |\n|---|---|---|---|", flush=True)
    for network in LARGE:
        kernels = []
        # Column by column the kernel takes a pass through the network for each of its entries.
        for name in ("AUTO", "JACOBIAN_CONTRACTION", "STRUCTURED_DERIVATIVES"):
            figures = measure("ours", network, name, MAX_BYTES)
            if figures is None:
                sys.exit(f"{network}, {name}: the process failed.")
            seconds, peak = figures["call_s"], figures["peak_bytes"]
            print(f"| {network} | {SHORT[name]} | {seconds:.3g} | {peak / 1e6:.0f} |", flush=True)
            if peak > ALLOWED:
                sys.exit(f"{network}, {name}: {peak:,} bytes, more than {ALLOWED:,}.")
            kernels.append(np.array(figures["kernel"]))
        if any(np.max(np.abs(k - kernels[0])) > 1e-4 * np.max(np.abs(k)) for k in kernels):
            sys.exit(f"The kernels of {network} differ.")


def main():
    """Measures the networks that were asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"one of {', '.join(NETWORKS)}")
    parser.add_argument("--memory", action="store_true", help="large kernels within a bound on memory, and no others")
    arguments = parser.parse_args()
    if arguments.memory:
        memory()
        return
    chosen = arguments.networks or list(NETWORKS)
    if unknown := set(chosen) - set(NETWORKS):
        parser.error(f"no network {', '.join(sorted(unknown))}; there are {', '.join(NETWORKS)}")
    make_peer_environment()
    head = ["network", *(f"{SHORT[name]}, ms, MB" for name in IMPLEMENTATIONS), "0.6.5, the fastest, ms, MB"]
    head += ["0.6.5 over AUTO", "difference"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    print("\n".join(lines), flush=True)
    differences = {}
    for network in chosen:
        *figures, differences[network] = compare(network)
        lines.append(row(network, *figures, differences[network]))
        print(lines[-1], flush=True)
    where = machine()
    text = "\n".join(lines) + f"\n\nOn {where['cores']} cores ({where['cpu']}), float32, the fastest of twenty calls.\n"
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "empirical.md").write_text(text)
    if wrong := [network for network, difference in differences.items() if not difference < 1e-4]:
        sys.exit(f"The two libraries disagree on {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
