"""How long a newcomer waits: the first call of `kernel_fn` on the networks of the reference cases, here and there.

    .venv/bin/python benchmarks/first_calls.py             # every eighth case, about three minutes
    .venv/bin/python benchmarks/first_calls.py --every 1   # all

One process per library, side by side on the same cores, case after case; what was compiled for one case is dropped
before the next. Float64, NNGP and NTK without jit, masks and patterns as the case has them: building the network,
tracing, compilation and the computation. Prints the cases in the order of the ratio, and the median.
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


def serve():
    """Answers each line on stdin, the name of a case, with the seconds that its first call takes."""
    os.environ["JAX_ENABLE_X64"] = "1"
    sys.path.insert(0, str(TESTS))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not a reply
    import jax
    import numpy as np
    from networks import build

    jax.config.update("jax_enable_x64", True)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.float32(0)))  # the start of the backend is not the library's time
    cases = {case["id"]: case for case in json.loads((TESTS / "data" / "reference_layers.json").read_text())}
    arrays = np.load(TESTS / "data" / "reference_layers.npz")
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        case = cases[line.strip()]
        x1, x2 = (arrays[f"{case['id']}/{name}"] for name in ("x1", "x2"))
        kwargs = {} if case["mask_constant"] is None else {"mask_constant": case["mask_constant"]}
        if f"{case['id']}/pattern1" in arrays:
            kwargs["pattern"] = tuple(arrays[f"{case['id']}/pattern{n}"] for n in (1, 2))
        jax.clear_caches()
        start = time.perf_counter()
        jax.block_until_ready(tuple(build(case["net"])[2](x1, x2, ("nngp", "ntk"), **kwargs)))
        print(time.perf_counter() - start, file=replies, flush=True)


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

    def seconds(self, case):
        """Returns how long the first call takes."""
        print(case, file=self._process.stdin, flush=True)
        return float(self._reply())

    def close(self):
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def main():
    """Runs the cases on both libraries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=8, help="take one case of so many")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve()

    from peer import LIBRARIES, make_peer_environment

    make_peer_environment()
    cases = json.loads((TESTS / "data" / "reference_layers.json").read_text())[:: arguments.every]
    workers = {name: Worker(python) for name, python in LIBRARIES.items()}
    rows = []
    for case in cases:
        seconds = {name: worker.seconds(case["id"]) for name, worker in workers.items()}
        rows.append((seconds["peer"] / seconds["ours"], case["id"], seconds))
        print(f"{case['id']} ...", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()

    print(f"{'case':16} {'ours, s':>8} {'0.6.5, s':>9} {'ratio':>7}")
    for ratio, case, seconds in sorted(rows):
        print(f"{case:16} {seconds['ours']:8.2f} {seconds['peer']:9.2f} {ratio:7.2f}")
    ratios = [row[0] for row in rows]
    print(f"{len(rows)} cases, median ratio {statistics.median(ratios):.2f}, {sum(r < 1 for r in ratios)} slower here")


if __name__ == "__main__":
    main()
