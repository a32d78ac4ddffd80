"""`nt_core.compare`: a backend that is wrong at one step is found out at that step."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from nt_core import Rule, activations, backends, compare, make_kernel_fn, step_rule, steps
from nt_core.backends.xla import XlaBackend

RELU = steps.Dual(activations.ABRelu(0.0, 1.0))
NETWORK = (steps.Dense(1.0, None, 8), RELU, steps.Dense(2.0, 0.1, 8), RELU, steps.Dense(3.0, None, 8))
X1, X2 = (jnp.asarray(np.random.default_rng(0).normal(size=(n, 3)), jnp.float32) for n in (2, 1))


class Wrong(XlaBackend):
    """Scales the result of the layer of weight variance 2: value %3 of `NETWORK`."""

    def __init__(self, factor):
        self.factor = factor
        self.name = f"wrong by {factor}"  # compiled programs are told apart by the names of backends

    def propagate(self, program, sources, request):
        nodes = tuple(self._broken(node) for node in program.nodes)
        return super().propagate(dataclasses.replace(program, nodes=nodes), sources, request)

    def _broken(self, node):
        if not isinstance(node.step, steps.Dense) or node.step.b_var is None:
            return node
        step = dataclasses.replace(node.step, w_var=node.step.w_var * self.factor, b_var=node.step.b_var * self.factor)
        return dataclasses.replace(node, step=step)


class Refusing(XlaBackend):
    """Takes no bias."""

    name = "refusing"

    def refusal(self, program, *args):
        biased = any(getattr(node.step, "b_var", None) is not None for node in program.nodes)
        return "a bias" if biased else None


def network(monkeypatch, backend):
    monkeypatch.setitem(backends._BACKENDS, backend.name, backend)
    return make_kernel_fn(tuple(step_rule(step) for step in NETWORK))


def test_the_first_value_that_differs(monkeypatch):
    kernel_fn = network(monkeypatch, Wrong(1.01))
    found = compare(kernel_fn, X1, X2, ("wrong by 1.01", "xla"))
    difference = found.difference
    assert (difference.program, difference.value, found.n_values) == (1, 3, 4)
    assert "%3 = Dense(w_var=" in difference.step
    kernel = make_kernel_fn(tuple(step_rule(step) for step in NETWORK[:3]))(X1, X2, implementation="xla")
    right = float(getattr(kernel, difference.field)[difference.index])
    assert difference.entries[1] == pytest.approx(right, rel=1e-6)
    assert difference.entries[0] == pytest.approx(1.01 * right, rel=1e-5)
    assert difference.relative == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert str(found).startswith("wrong by 1.01 and xla differ first in program 1, at %3 = Dense(")
    assert compare(kernel_fn, X1, X2, ("wrong by 1.01", "xla"), tolerance=0.1).difference is None


def test_values_that_are_not_numbers_differ(monkeypatch):
    found = compare(network(monkeypatch, Wrong(jnp.nan)), X1, None, ("wrong by nan", "xla"), get="nngp")
    assert found.difference.value == 3 and found.difference.relative == np.inf


def test_backends_that_agree(monkeypatch):
    found = compare(network(monkeypatch, Wrong(1.0)), X1, None, ("wrong by 1.0", "xla"))
    assert found.difference is None
    assert str(found) == "wrong by 1.0 and xla: no difference above 1e-05 in 6 values"


def test_a_backend_that_refuses(monkeypatch):
    found = compare(network(monkeypatch, Refusing()), X1, None, ("refusing", "xla"))
    assert str(found).splitlines() == [
        "refusing and xla: no difference above 1e-05 in 3 values",
        "  (No backend takes this program. refusing: a bias)",
    ]


def test_masked_inputs(monkeypatch):
    class Seeing(XlaBackend):
        name = "seeing"
        masks: ClassVar = []

        def propagate(self, program, sources, request):
            self.masks.append(sources[0].mask1)
            return super().propagate(program, sources, request)

    kernel_fn = network(monkeypatch, Seeing())
    assert compare(kernel_fn, X1.at[0].set(9.0), None, ("seeing", "xla"), mask_constant=9.0).difference is None
    assert len(Seeing.masks) == 6 and all(mask is not None for mask in Seeing.masks)


def test_functions_of_kernels_part_the_programs(monkeypatch):
    network(monkeypatch, Wrong(1.01))
    rules = [step_rule(step) for step in NETWORK]
    double = Rule("double", function=lambda kernel, run: kernel * 2.0)
    difference = compare(
        make_kernel_fn((*rules[:2], double, *rules[2:])), X1, None, ("wrong by 1.01", "xla")
    ).difference
    assert (difference.program, difference.value) == (3, 1)
