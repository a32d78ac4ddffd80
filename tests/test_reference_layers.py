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
# Where the archived library is wrong, and of which other network its kernels are. ConvLocal takes no notice of s[1]:
# the next layer has the wrong fan-in. A nested ExpNormalized, which has no finite network, hides its 8 channels: the
# tangent kernel of the next layer in the 'standard' parameterization is that of the 6 channels of the inputs.
WRONG = {
    "local-0489": lambda layers: layers[2]["kwargs"].update(s=[3, 1]),
    "concat-0570": lambda layers: layers[0]["serial"][0].update(args=[6]),
}


def load(name):
    """The cases all of whose layers there are, and all arrays."""
    cases = json.loads((DATA / f"reference_{name}.json").read_text())
    arrays = np.load(DATA / f"reference_{name}.npz")
    return [
        (case, arrays) for case in cases if layer_names(case["net"]) <= set(stax.__all__) and case["id"] not in WRONG
    ]


HEADLINE, LAYERS = load("headline"), load("layers")
CASES = HEADLINE + LAYERS
# Whose tangent kernel cannot keep the tolerance in float32, and after how many layers its deficits are rounded most:
# inputs with one channel after a normalisation, so that correlations are 1 or -1, where the factor of Relu has infinite
# slope, that of a square root.
ROUNDED = {"norm-0285": 2}
N_ROUNDINGS = 4  # on the way there, of about the same size
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


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_there(name):
    """Right are `test_fault_5_local_convolution_scales_its_width` and `test_channels_behind_a_nested_layer`."""
    cases = json.loads((DATA / "reference_layers.json").read_text())
    case = next(case for case in cases if case["id"] == name)
    WRONG[name](case["net"]["serial"])
    check(case, LAYERS[0][1], "float64")


@pytest.mark.parametrize("case, arrays", HEADLINE, ids=[case["id"] for case, _ in HEADLINE])
def test_headline_float32(case, arrays):
    check(case, arrays, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("case, arrays", LAYERS, ids=[case["id"] for case, _ in LAYERS])
def test_layers_float32(case, arrays):
    check(case, arrays, "float32", change_by_roundings(case, arrays) if case["id"] in ROUNDED else None)


@pytest.mark.parametrize("case, arrays", [case for case in LAYERS if case[0]["id"] in ROUNDED])
def test_a_few_roundings_take_the_whole_tolerance(case, arrays):
    assert TOLERANCE["float32"] < change_by_roundings(case, arrays) < 1e-4


def change_by_roundings(case, arrays):
    """The change of the tangent kernel by a few roundings of deficits, relative to its largest entry.

    Deficits are rounded to float32 once, after the layers that `ROUNDED` counts, and nothing else is.
    """
    layers, n = case["net"]["serial"], ROUNDED[case["id"]]
    with jax.enable_x64(True):
        x1, x2 = (arrays[f"{case['id']}/{name}"] for name in ("x1", "x2"))
        kernel = build({"serial": layers[:n]})[2](x1, x2, diagonal_spatial=False)
        rest = build({"serial": layers[n:]})[2]
        exact, changed = (rest(k, None, "ntk", implementation="xla") for k in (kernel, rounded(kernel)))
    return N_ROUNDINGS**0.5 * np.abs(changed - exact).max() / np.abs(exact).max()


def rounded(kernel):
    """The kernel whose deficits `(var1 + var2) / 2 - K` are rounded to float32."""
    pairs = kernel.matrices()
    first, second = (np.diagonal(cov, axis1=1, axis2=2) for cov in (pairs.cov1, pairs.cov2))
    mean = (first[:, None, :, None] + second[None, :, None, :]) / 2
    deficits = (mean - pairs.nngp).astype("float32").astype("float64")
    return kernel.from_matrices(pairs.replace(nngp=mean - deficits))


def patterns(case, arrays):
    """The graphs of both batches, None where there are none."""
    names = (f"{case['id']}/pattern{n}" for n in (1, 2))
    return tuple(arrays.get(name) for name in names)


def check(case, arrays, dtype, ntk_tolerance=None):
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
    tolerances = {name: ntk_tolerance if ntk_tolerance and "ntk" in name else TOLERANCE[dtype] for name in kernels}
    for name, kernel in kernels.items():
        expected = arrays[f"{case['id']}/{name}"]
        assert kernel.dtype == dtype
        assert kernel.shape == expected.shape
        atol = tolerances[name] * np.abs(expected).max()
        np.testing.assert_allclose(kernel, expected, rtol=0, atol=atol, err_msg=name)
