"""One library in one process, on one network: answers every line on stdin, a list of sizes, with the seconds it took.

Started by peer.py, once with this library and once with the archived one: `neural_tangents` of either environment.
"""

import functools
import json
import os
import resource
import sys
import time

import jax
import numpy as np
from networks import NETWORKS
from neural_tangents import stax

MASKED = 10.0


def images(seed, n, shape):
    """The same inputs in both libraries; fewer of them are the first of more."""
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def shortened(x):
    """Masks the ends of sentences, such that their lengths lie between a tenth and all of the words."""
    lengths = np.random.default_rng(0).integers(x.shape[1] // 10, x.shape[1] + 1, len(x))
    return np.where(np.arange(x.shape[1])[:, None] < lengths[:, None, None], x, np.float32(MASKED))


def main():
    """Builds the network, says so, and serves requests [n1, n2] until stdin ends."""
    network, shape, jitted, masked = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "jit", sys.argv[4] == "masked"
    kwargs = {"mask_constant": MASKED} if masked else {}
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not a reply

    def reply(**values):
        print(json.dumps(values), file=replies, flush=True)

    kernel_fn = functools.partial(NETWORKS[network](stax)[2], **kwargs)
    if jitted:
        kernel_fn = jax.jit(kernel_fn, static_argnames="get")
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.float32(0)))  # the start of the backend is not the library's time
    reply(jax=jax.__version__, python=sys.version.split()[0])

    for line in sys.stdin:
        n1, n2 = json.loads(line)
        x1, x2 = images(1, n1, shape), images(2, n2, shape)
        if masked:
            x1, x2 = shortened(x1), shortened(x2)
        x1, x2 = jax.device_put((x1, x2))
        start = time.perf_counter()
        ntk = jax.block_until_ready(kernel_fn(x1, x2, "ntk"))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        reply(seconds=seconds, peak_bytes=peak, corner=np.asarray(ntk)[:2, :2].astype(float).tolist())


if __name__ == "__main__":
    main()
