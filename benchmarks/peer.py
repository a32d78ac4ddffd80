"""This library against the archived neural-tangents 0.6.5, side by side in one run.

    make bench-peer                                       # all cases
    make bench-peer BENCH_ARGS="cnn21-pool fcn5"          # some of them

The archived library gets an environment of its own (.venv-peer; it needs Python 3.11 or 3.12 and JAX 0.4.25). Each
case runs in one fresh process per library, on the same cores, float32, the NTK of two different batches:

* the first result for 2 x 2 inputs: tracing, compilation and the computation, with the backend already started;
* then, after a warm-up at the block's size, the two libraries take turns, and the median counts.

The block is as large as each library takes comfortably: the figure is the time of one entry of the kernel matrix. The
2 x 2 corners of both are compared, so that a fast wrong answer fails. Prints a table, and writes it and the
measurements to benchmarks/results.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
PEER_ENV = HERE.parent / ".venv-peer"
PEER_REQUIREMENTS = ["neural-tangents==0.6.5", "jax==0.4.25", "jaxlib==0.4.25", "numpy<2", "scipy<1.13"]
LIBRARIES = {"ours": sys.executable, "peer": str(PEER_ENV / "bin" / "python")}


@dataclass(frozen=True)
class Case:
    """One row of the table: a network on inputs of one shape, a block of n1 x n2 for each library."""

    name: str
    network: str
    shape: tuple[int, ...]
    ours: tuple[int, int]
    peer: tuple[int, int]
    repeats: int
    jit: bool = True
    masked: bool = False


CASES = [
    Case("cnn21-pool", "cnn21-pool", (32, 32, 3), ours=(4, 16), peer=(2, 2), repeats=3),
    Case("cnn21-flatten", "cnn21-flatten", (32, 32, 3), ours=(128, 128), peer=(128, 128), repeats=5),
    Case("wide-resnet", "wide-resnet", (32, 32, 3), ours=(4, 16), peer=(2, 2), repeats=3),
    Case("myrtle10", "myrtle10", (32, 32, 3), ours=(4, 16), peer=(2, 2), repeats=5),
    Case("fcn5", "fcn5", (784,), ours=(4000, 4000), peer=(4000, 4000), repeats=5),
    # Sentences of up to 500 words in 50 dimensions; what is missing of them is masked.
    Case("imdb", "imdb", (500, 50), ours=(16, 16), peer=(2, 2), repeats=5, masked=True),
    # 2 x 2 pixels and no jit, next to no arithmetic: what a call costs by itself.
    Case("cnn21-call", "cnn21-pool", (2, 2, 3), ours=(2, 2), peer=(2, 2), repeats=9, jit=False),
]


def make_peer_environment():
    """Installs the archived library into its own environment, once."""
    ready = PEER_ENV / ".ready"
    if ready.exists() and ready.read_text() == "\n".join(PEER_REQUIREMENTS):
        return
    for python in (sys.executable, "python3.11", "python3.12"):
        probe = [python, "-c", "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))"]
        try:
            if subprocess.run(probe, capture_output=True).returncode == 0:
                break
        except FileNotFoundError:
            continue
    else:
        sys.exit("The archived library needs Python 3.11 or 3.12, and neither runs here.")
    print(f"Installing neural-tangents 0.6.5 into {PEER_ENV.name} (once; it brings TensorFlow)", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", PEER_ENV], check=True)
    subprocess.run([LIBRARIES["peer"], "-m", "pip", "install", "-q", *PEER_REQUIREMENTS], check=True)
    ready.write_text("\n".join(PEER_REQUIREMENTS))


class Worker:
    """A process with one library and one network."""

    def __init__(self, python, case):
        # TensorFlow is talkative: what a worker says is shown only when it fails.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, lives as long as the process
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or python == LIBRARIES["ours"]}
        environment |= {"JAX_PLATFORMS": "cpu"}
        command = [python, "-W", "ignore", HERE / "worker.py", case.network, json.dumps(case.shape)]
        self._process = subprocess.Popen(
            [*command, "jit" if case.jit else "nojit", "masked" if case.masked else "whole"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.versions = self._reply()

    def _reply(self):
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{self._process.args} ended with {status}:\n{self._log.read()}")
        return json.loads(line)

    def run(self, block):
        """Seconds, peak memory and a corner of the kernel for one call on a block of inputs."""
        print(json.dumps(block), file=self._process.stdin, flush=True)
        return self._reply()

    def close(self):
        """Ends the process and waits for it."""
        self._process.stdin.close()
        self._process.wait()


def measure(case):
    """All figures of one case, for both libraries."""
    workers = {name: Worker(python, case) for name, python in LIBRARIES.items()}
    blocks = {"ours": case.ours, "peer": case.peer}
    try:
        first = {name: worker.run((2, 2)) for name, worker in workers.items()}
        for name, worker in workers.items():
            worker.run(blocks[name])
        rounds = [{name: worker.run(blocks[name]) for name, worker in workers.items()} for _ in range(case.repeats)]
    finally:
        for worker in workers.values():
            worker.close()

    result = {"case": case.name}
    for name, worker in workers.items():
        seconds = [r[name]["seconds"] for r in rounds]
        entries = blocks[name][0] * blocks[name][1]
        result[name] = {
            **worker.versions,
            "block": blocks[name],
            "first_result_s": first[name]["seconds"],
            "call_s": seconds,
            "ms_per_entry": 1e3 * statistics.median(seconds) / entries,
            "peak_gb": rounds[-1][name]["peak_bytes"] / 1e9,
        }
    ours, peer = np.array(rounds[-1]["ours"]["corner"]), np.array(rounds[-1]["peer"]["corner"])
    result["difference"] = float(np.max(np.abs(ours - peer)) / np.max(np.abs(peer)))
    result["ratio"] = result["peer"]["ms_per_entry"] / result["ours"]["ms_per_entry"]
    return result


def table(results):
    """The results as a Markdown table."""
    head = ["network", "ours, ms per entry", "0.6.5, ms per entry", "ratio"]
    head += ["ours, first result, s", "0.6.5, first result, s", "ours, GB", "0.6.5, GB", "difference"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in results:
        ours, peer = r["ours"], r["peer"]
        cells = [r["case"], f"{ours['ms_per_entry']:.3g}", f"{peer['ms_per_entry']:.3g}", f"{r['ratio']:.3g}"]
        cells += [f"{ours['first_result_s']:.2f}", f"{peer['first_result_s']:.2f}"]
        cells += [f"{ours['peak_gb']:.2f}", f"{peer['peak_gb']:.2f}", f"{r['difference']:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine():
    """What the figures depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "architecture": platform.machine()}


def main():
    """Measures the cases that were asked for, all by default."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"one of {', '.join(map(repr, names))}")
    chosen = parser.parse_args().cases or names
    if unknown := set(chosen) - set(names):
        parser.error(f"no case {', '.join(map(repr, sorted(unknown)))}; there are {', '.join(map(repr, names))}")

    make_peer_environment()
    results = []
    for case in CASES:
        if case.name in chosen:
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            results.append(measure(case))

    where = machine()
    ours, peer = results[0]["ours"], results[0]["peer"]
    text = (
        f"{table(results)}\n\nOn {where['cores']} cores ({where['cpu']}, {where['architecture']}), float32, medians. "
        f"Ours: JAX {ours['jax']}, Python {ours['python']}; "
        f"neural-tangents 0.6.5: JAX {peer['jax']}, Python {peer['python']}.\n"
        "First result: 2 x 2 inputs, tracing and compilation included. cnn21-call: 2 x 2 pixels, no jit.\n"
        "GB: peak memory of the process, at its block.\n"
    )
    print(text)
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / "peer.json").write_text(json.dumps({"machine": where, "results": results}, indent=1) + "\n")
    (folder / "peer.md").write_text(text)

    if wrong := [r["case"] for r in results if not r["difference"] < 1e-2]:
        sys.exit(f"The two libraries disagree on {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
