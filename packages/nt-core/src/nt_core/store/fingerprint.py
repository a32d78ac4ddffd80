"""What a store is of: all that its numbers depend on, in a form that can be stored and compared."""

import hashlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nt_core
from nt_core.cells import Call
from nt_core.explain import explain
from nt_core.keywords import is_array
from nt_core.layer import is_of_layer
from nt_core.trees import nt_tree_map

# So many bytes of an array are hashed at a time: of a file that is mapped, no more is in memory.
_BLOCK = 2**26
# Numbers of a kernel that are kept to know its function by.
_N_PROBES = 16


def fingerprint(
    kernel_fn: Callable[..., Any], call: Call, x1: Any, x2: Any, get: tuple[str, ...], probe: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Returns what identifies a kernel matrix.

    A network is known by its layers and their coefficients. Of any kernel function some values are compared too, since
    of one that is not a network nothing else is known.

    Args:
      kernel_fn: the kernel function.
      call: its arguments, sorted.
      x1, x2: the two batches.
      get: which covariances.
      probe: the covariances of the first sample of `x1` with the last of `x2`.
    """
    network = None
    if is_of_layer(kernel_fn):
        shape1, shape2 = (None if x is None else nt_tree_map(lambda a: _one_sample(a, call), x) for x in (x1, x2))
        # By the backend that takes everything: the description does not depend on the machine.
        network = explain(inspect.unwrap(kernel_fn), shape1, shape2, get, implementation="xla")
    return {
        "version": nt_core.__version__,
        "network": network,
        "get": list(get),
        "samples": [call.n1, call.n2],
        "symmetric": call.symmetric,
        "x1": digest(call.first.tree),
        "x2": None if call.symmetric else digest(call.second.tree),
        "arguments": digest([call.common.tree[name] for name in ("named", "extra", "keywords", "keys")]),
        "dtype": {name: str(value.dtype) for name, value in probe.items()},
        "values": {name: _some(value) for name, value in probe.items()},
    }


def digest(tree: Any) -> str:
    """Returns a hash of the arrays in a tree, with their places, shapes and types, and of plain values in it."""
    total = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        total.update(jax.tree_util.keystr(path).encode())
        if is_array(leaf):
            array = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            total.update(f"{array.dtype} {array.shape}".encode())
            for block in _blocks(array):
                total.update(np.ascontiguousarray(block).data)
        elif leaf is None or isinstance(leaf, bool | int | float | complex | str | bytes):
            total.update(repr(leaf).encode())
    return total.hexdigest()


def differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Returns in words what is different."""
    found = []
    for name in stored:
        if name == "values":
            found.extend(_differing_values(stored["values"], given["values"], stored["dtype"]))
        elif stored[name] != given.get(name):
            found.append(f"{name}: the store has {stored[name]}, given was {given.get(name)}")
    return found


def _differing_values(stored: dict[str, Any], given: dict[str, Any], dtypes: dict[str, str]) -> list[str]:
    found = []
    for name in set(stored) & set(given):
        expected, actual = np.array(stored[name]), np.array(given[name])
        # Other machines and versions of JAX round differently.
        tolerance = math.sqrt(float(np.finfo(dtypes[name]).eps))
        if expected.shape != actual.shape or not np.allclose(actual, expected, rtol=tolerance, atol=0, equal_nan=True):
            found.append(f"the kernel function: {name} of two samples is {actual[:3]}, and {expected[:3]} in the store")
    return found


def _blocks(array: Any) -> Any:
    if array.ndim == 0:
        return [np.asarray(array).reshape(1)]
    rows = max(1, _BLOCK // max(1, array.nbytes // max(1, array.shape[0])))
    return (np.asarray(array[i : i + rows]) for i in range(0, array.shape[0], rows))


def _one_sample(array: Any, call: Call) -> tuple[int, ...]:
    """The shape of a batch of one sample."""
    axis = call.common.tree["batch_axis"]
    return (*array.shape[:axis], 1, *array.shape[axis + 1 :])


def _some(value: np.ndarray) -> list[float]:
    """A few of the numbers of an array, from all over it."""
    flat = value.reshape(-1)
    return [float(x) for x in flat[:: max(1, flat.size // _N_PROBES)][:_N_PROBES]]
