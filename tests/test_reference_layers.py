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
# Where the archived library is wrong: ConvLocal takes no notice of s[1], and the next layer has the wrong fan-in; a
# nested ExpNormalized, which has no finite network, hides its 8 channels, and the tangent kernel of the next layer in
# the 'standard' parameterization is that of the 6 channels of the inputs.
WRONG = {"local-0489", "concat-0570"}


def load(name):
    """The cases all of whose layers there are, and all arrays."""
    cases = json.loads((DATA / f"reference_{name}.json").read_text())
    arrays = np.load(DATA / f"reference_{name}.npz")
    return [
        (case, arrays) for case in cases if layer_names(case["net"]) <= set(stax.__all__) and case["id"] not in WRONG
    ]


HEADLINE, LAYERS = load("headline"), load("layers")
CASES = HEADLINE + LAYERS
# Take 15 s and more to compile, of layers that the others have as well.
SLOW = {f"deepnet-{n}" for n in ("0057", "0096", "0174", "0213", "0252", "0291", "0330", "0447", "0525")}


NEW_MODULES = ("nt_stax.smooth", "nt_stax.kinked", "nt_stax.gated", "nt_stax.embedding")


def test_every_layer_is_in_a_case():
    covered = set().union(*(layer_names(case["net"]) for case, _ in CASES if case["id"] not in SLOW))
    layers = {name for name in stax.__all__ if callable(getattr(stax, name)) and name[0].isupper()}
    enums = {"AggregateImplementation", "AttentionMechanism", "Padding", "PositionalEmbedding"}
    no_layers = {"Bool", "Diagonal", "MaskedArray"} | enums
    # Functions as arguments have no description in the data, and kernels of equal inputs were NaN.
    not_in_data = {"Elementwise", "ElementwiseNumerical", "RectifiedMonomial", "ImageResize"}
    # The archived library does not have them: they have tests of their own.
    new = {name for name in layers if getattr(stax, name).__module__ in NEW_MODULES}
    new |= {"RMSNorm", "Scale"}
    assert layers - no_layers - not_in_data - new <= covered
    assert len(CASES) >= 100


def marked(case, arrays):
    return pytest.param(case, arrays, id=case["id"], marks=pytest.mark.slow if case["id"] in SLOW else ())


@pytest.mark.parametrize("case, arrays", [marked(*case) for case in CASES])
def test_float64(case, arrays):
    check(case, arrays, "float64")


@pytest.mark.parametrize("case, arrays", HEADLINE, ids=[case["id"] for case, _ in HEADLINE])
def test_headline_float32(case, arrays):
    check(case, arrays, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("case, arrays", LAYERS, ids=[case["id"] for case, _ in LAYERS])
def test_layers_float32(case, arrays):
    check(case, arrays, "float32", float32_tolerance(case, arrays))


def test_few_cases_cannot_keep_the_tolerance_in_float32():
    tolerances = [float32_tolerance(case, arrays) for case, arrays in LAYERS]
    assert sum(tolerance > TOLERANCE["float32"] for tolerance in tolerances) <= 5


def float32_tolerance(case, arrays):
    """Returns a larger tolerance where one rounding in the first layer takes most of the usual one.

    With one channel and one position in the first layer, all correlations are 1 or -1. There the factor of the tangent
    kernel, `arccos(-c) / pi` for Relu, has infinite slope, and `n` roundings of `c` change it by `sqrt(2 n eps) / pi`.
    """
    if all_are_parallel(case, arrays) and change_by_one_rounding(case, arrays) > 0.75 * TOLERANCE["float32"]:
        n_roundings = 4 * max(1, largest_ratio(arrays[f"{case['id']}/x1"], arrays[f"{case['id']}/x2"]) / 2)
        return (2 * n_roundings * np.finfo("float32").eps) ** 0.5 / np.pi
    return TOLERANCE["float32"]


def all_are_parallel(case, arrays):
    if "serial" not in case["net"] or arrays[f"{case['id']}/x1"].shape[-1] > 1:
        return False
    first = case["net"]["serial"][0]
    one_position = first.get("layer") == "Dense" or (first.get("layer") == "Conv" and set(first["args"][1]) == {1})
    return one_position and first["kwargs"].get("b_std") is None


def largest_ratio(x1, x2):
    """Of standard deviations at one position: half of it is how many times a correlation is rounded in a deficit."""
    sizes = np.log(np.abs(np.concatenate([x1, x2])))
    return np.exp(np.max(sizes.max(axis=0) - sizes.min(axis=0)))


def change_by_one_rounding(case, arrays):
    """Rounds the covariances after the first layer to float32, and nothing else. Returns the change of the NTK."""
    with jax.enable_x64(True):
        layers = case["net"]["serial"]
        kernel = build(layers[0])[2](arrays[f"{case['id']}/x1"], arrays[f"{case['id']}/x2"])
        rounded = kernel.replace(nngp=kernel.nngp.astype("float32").astype("float64"))
        rest = build({"serial": layers[1:]})[2]
        kwargs = {"implementation": "xla", "pattern": patterns(case, arrays)}
        exact, changed = (np.asarray(rest(k, None, "ntk", **kwargs)) for k in (kernel, rounded))
    return np.abs(changed - exact).max() / np.abs(exact).max()


def patterns(case, arrays):
    """The graphs of both batches, None where there are none."""
    names = (f"{case['id']}/pattern{n}" for n in (1, 2))
    return tuple(arrays.get(name) for name in names)


def check(case, arrays, dtype, tolerance=None):
    x1, x2 = (arrays[f"{case['id']}/{name}"].astype(dtype) for name in ("x1", "x2"))
    # By name: whatever is a step runs in the native engine, or this fails.
    kwargs = {"implementation": "cpu"}
    if case["mask_constant"] is not None:
        kwargs["mask_constant"] = case["mask_constant"]
    pattern1, pattern2 = patterns(case, arrays)
    with jax.enable_x64(dtype == "float64"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # layers that state their assumptions
        _, _, kernel_fn = build(case["net"])
        pair = kernel_fn(x1, x2, ("nngp", "ntk"), pattern=(pattern1, pattern2), **kwargs)
        own = kernel_fn(x1, None, ("nngp", "ntk"), pattern=(pattern1, pattern1), **kwargs)
    kernels = {"nngp": pair.nngp, "ntk": pair.ntk, "nngp_self": own.nngp, "ntk_self": own.ntk}
    tolerance = tolerance or TOLERANCE[dtype]
    for name, kernel in kernels.items():
        expected = arrays[f"{case['id']}/{name}"]
        assert kernel.dtype == dtype
        assert kernel.shape == expected.shape
        np.testing.assert_allclose(kernel, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)
