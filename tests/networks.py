"""Networks from their descriptions in the reference data.

A description is `{"layer": NAME, "args": [...], "kwargs": {...}}`, `{"serial": [...]}`, `{"parallel": [...]}` or
`{"repeat": description, "n": N}`. Lists inside arguments stand for tuples, `{"ellipsis": true}`, `{"slice": [a, b, c]}`
and `{"array": [...]}` for these.
"""

import numpy as np
from neural_tangents import stax


def build(net):
    """Returns the layer `(init_fn, apply_fn, kernel_fn)` that is described."""
    if "repeat" in net:
        return stax.repeat(build(net["repeat"]), net["n"])
    for combinator in ("serial", "parallel"):
        if combinator in net:
            return getattr(stax, combinator)(*map(build, net[combinator]))
    kwargs = {name: argument(value) for name, value in net.get("kwargs", {}).items()}
    return getattr(stax, net["layer"])(*map(argument, net.get("args", [])), **kwargs)


def argument(value):
    match value:
        case list():
            return tuple(map(argument, value))
        case {"ellipsis": _}:
            return ...
        case {"slice": bounds}:
            return slice(*bounds)
        case {"array": numbers}:
            return np.array(numbers)
    return value


def layer_names(net):
    """Returns the names of all layers and combinators of a description."""
    if "layer" in net:
        return {net["layer"]}
    if "repeat" in net:
        return {"repeat"} | layer_names(net["repeat"])
    (combinator,) = net.keys() & {"serial", "parallel"}
    return {combinator}.union(*map(layer_names, net[combinator]))
