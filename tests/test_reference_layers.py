"""Kernels of many networks against values of the archived neural-tangents 0.6.5 (float64, JAX 0.4.25)."""

import json
import pathlib
import warnings

import jax
import numpy as np
import pytest
from networks import build, layer_names
from neural_tangents import stax

DATA = pathlib.Path(__file__).parent / "data"
TOLERANCE = {"float64": 1e-7, "float32": 2e-5}


def load(name):
    """The cases all of whose layers there are, and all arrays."""
    cases = json.loads((DATA / f"reference_{name}.json").read_text())
    arrays = np.load(DATA / f"reference_{name}.npz")
    return [(case, arrays) for case in cases if layer_names(case["net"]) <= set(stax.__all__)]


HEADLINE, LAYERS = load("headline"), load("layers")
CASES = HEADLINE + LAYERS


def test_every_layer_is_in_a_case():
    covered = set().union(*(layer_names(case["net"]) for case, _ in CASES))
    layers = {name for name in stax.__all__ if callable(getattr(stax, name)) and name[0].isupper()}
    no_layers = {"AttentionMechanism", "Bool", "Diagonal", "MaskedArray", "Padding", "PositionalEmbedding"}
    functions_as_arguments = {"Elementwise", "ElementwiseNumerical"}  # these have no description in the data
    assert layers - no_layers - functions_as_arguments <= covered
    assert len(CASES) >= 100


@pytest.mark.parametrize("case, arrays", CASES, ids=[case["id"] for case, _ in CASES])
def test_float64(case, arrays):
    check(case, arrays, "float64")


@pytest.mark.parametrize("case, arrays", HEADLINE, ids=[case["id"] for case, _ in HEADLINE])
def test_headline_float32(case, arrays):
    check(case, arrays, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("case, arrays", LAYERS, ids=[case["id"] for case, _ in LAYERS])
def test_layers_float32(case, arrays):
    check(case, arrays, "float32")


def check(case, arrays, dtype):
    x1, x2 = (arrays[f"{case['id']}/{name}"].astype(dtype) for name in ("x1", "x2"))
    kwargs = {} if case["mask_constant"] is None else {"mask_constant": case["mask_constant"]}
    with jax.enable_x64(dtype == "float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # layers that state their assumptions
        _, _, kernel_fn = build(case["net"])
        pair = kernel_fn(x1, x2, ("nngp", "ntk"), **kwargs)
        own = kernel_fn(x1, None, ("nngp", "ntk"), **kwargs)
    kernels = {"nngp": pair.nngp, "ntk": pair.ntk, "nngp_self": own.nngp, "ntk_self": own.ntk}
    for name, kernel in kernels.items():
        expected = arrays[f"{case['id']}/{name}"]
        assert kernel.dtype == dtype
        assert kernel.shape == expected.shape
        np.testing.assert_allclose(
            kernel, expected, rtol=0, atol=TOLERANCE[dtype] * np.abs(expected).max(), err_msg=name
        )
