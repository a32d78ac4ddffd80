"""The examples do what they say, at small sizes."""

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_evidence_improves_the_likelihood_of_others():
    evidence = example("evidence")
    (x, y), (x_test, y_test) = evidence.patients()
    train, test = (x[:60], y[:60]), (x_test[:60], y_test[:60])
    start = {name: jnp.log(value) for name, value in evidence.START.items()}
    end, values = evidence.improve(start, *train, 20)
    assert values[-1] > values[0] + 0.1
    assert evidence.held_out(end, *train, *test) > evidence.held_out(start, *train, *test) + 0.1


def test_cross_entropy_learns_digits():
    digits = example("cross_entropy")
    train, (x_test, y_test) = digits.digits(60, 100)
    on_train, on_test = digits.logits((0.0, 1000.0), train, x_test)
    np.testing.assert_allclose(digits.cross_entropy(on_train[0], train[1]), np.log(10), rtol=1e-6)
    assert digits.cross_entropy(on_train[1], train[1]) < 0.5
    assert digits.accuracy(on_test[1], y_test) > 0.7


def test_distilled_images_predict_better(tmp_path):
    distillation = example("distillation")
    images, labels, mean = (x[:40] if np.ndim(x) else x for x in distillation.digits())
    kernel_fn, start = distillation.myrtle5()[2], distillation.draw(images, labels, 1, 0)
    assert start.images.shape == (10, 10, 10, 1)
    np.testing.assert_array_equal(start.labels.argmax(1), range(10))
    end = distillation.distil(kernel_fn, start, images, labels, 5)
    before, after = (distillation.squared_error(kernel_fn, s, images, labels) for s in (start, end))
    assert after < 0.8 * before
    distillation.draw_figure(figure := tmp_path / "images.png", start, end, mean, ("real", "distilled"))
    assert figure.stat().st_size > 1000
