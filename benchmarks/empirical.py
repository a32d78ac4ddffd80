"""Empirical NTKs: every implementation, here and in the archived neural-tangents 0.6.5, in one run.

    make bench-empirical                                    # all networks
    make bench-empirical BENCH_ARGS="cnn-pool transformer"  # some of them

Each network, library and implementation has a fresh process (empirical_worker.py): two batches, a mean over outputs,
`vmap_axes=0`, jitted, float32, the fastest of five calls, and the memory that was needed beyond that of the idle
process. The kernels of all are compared. Prints a table, and writes it to benchmarks/results/empirical.md.
"""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
from empirical_networks import NETWORKS
from peer import HERE, LIBRARIES, machine, make_peer_environment

IMPLEMENTATIONS = {"AUTO": 0, "JACOBIAN_CONTRACTION": 1, "NTK_VECTOR_PRODUCTS": 2, "STRUCTURED_DERIVATIVES": 3}
SHORT = {"AUTO": "AUTO", "JACOBIAN_CONTRACTION": "Jacobians", "NTK_VECTOR_PRODUCTS": "columns"}
SHORT["STRUCTURED_DERIVATIVES"] = "structured"


def measure(library, network, implementation):
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


def main():
    """Measures the networks that were asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"one of {', '.join(NETWORKS)}")
    chosen = parser.parse_args().networks or list(NETWORKS)
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
    text = "\n".join(lines) + f"\n\nOn {where['cores']} cores ({where['cpu']}), float32, the fastest of five calls.\n"
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "empirical.md").write_text(text)
    if wrong := [network for network, difference in differences.items() if not difference < 1e-4]:
        sys.exit(f"The two libraries disagree on {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
