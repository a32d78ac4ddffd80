"""Predictions of ensembles of networks: values of neural_tangents 0.6.5, in float64."""

import json
import pathlib

import jax
import neural_tangents as nt
import numpy as np
import pytest

DATA = pathlib.Path(__file__).parent / "data"
CASES = json.loads((DATA / "predict_ensemble_reference.json").read_text())
VALUES = np.load(DATA / "predict_ensemble_reference.npz")
TIMES = {"t1": 1.7, "tvec": np.array([0.0, 0.3, 2.0, 50.0]), "inf": None}


def network(description):
    """Returns the layers of `{"serial": [...]}` or `{"layer": name, "args": [...], "kwargs": {...}}`."""
    if "serial" in description:
        return nt.stax.serial(*map(network, description["serial"]))
    return getattr(nt.stax, description["layer"])(*description["args"], **description["kwargs"])


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in CASES])
def test_ensemble(case):
    values = {name.split("/", 1)[1]: VALUES[name] for name in VALUES if name.startswith(case["id"] + "/")}
    with jax.enable_x64(True):
        _, _, kernel_fn = network(case["net"])
        predict_fn = nt.predict.gradient_descent_mse_ensemble(
            kernel_fn,
            values["x_train"],
            values["y_train"],
            case["learning_rate"],
            diag_reg=case["diag_reg"],
            diag_reg_absolute_scale=case["diag_reg_absolute_scale"],
            trace_axes=tuple(case["trace_axes"]),
        )
        for name, time in TIMES.items():
            for get in ("nngp", "ntk"):
                gaussian = predict_fn(time, values["x_test"], get, compute_cov=True)
                for part, actual in (("mean", gaussian.mean), ("cov", gaussian.covariance)):
                    expected = values[f"out/{name}_{get}_{part}"]
                    assert actual.shape == expected.shape
                    tolerance = 1e-8 * np.abs(expected).max()
                    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=f"{name} {get} {part}")
