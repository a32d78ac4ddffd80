"""The native module: fully connected networks, and what happens without it."""

import pathlib
import re
import types
import warnings

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from conformance import ABS, RELU, chain, dense, run, spec_of
from nt_core import Builder, Request, _native, backends, propagate, steps
from nt_core.activations import polynomials
from nt_core.backends import choose
from nt_core.backends.cpu import native
from nt_core.sources import Inputs

LAYERS = [dense(), RELU, dense(None), ABS, dense(parameterization="standard", s=(2, 3)), RELU, dense()]


def pair(n1, n2, features, dtype="float32"):
    random = np.random.default_rng(0)
    return random.normal(size=(n1, features)).astype(dtype), random.normal(size=(n2, features)).astype(dtype)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def level(request):
    _native.choose_level(request.param)
    yield
    _native.choose_level("")


@pytest.fixture
def fresh():
    """The module is loaded anew, and what was decided before is forgotten."""

    def forget():
        native.refusal.cache_clear()
        backends._choose.cache_clear()

    forget()
    yield
    forget()


def test_where_the_arrays_are_decides(monkeypatch):
    """On a machine whose default device is a GPU."""
    cpu = jax.local_devices(backend="cpu")[0]

    class Gpu:
        platform, device_kind = "gpu", "a GPU"

    gpu = Gpu()
    monkeypatch.setattr(jax, "local_devices", lambda *, backend=None: [gpu if backend is None else cpu])

    def backend(x):
        program = chain(spec_of(x, x), LAYERS)
        return choose(program, (Inputs(x, x, program.sources[0]),), Request())[0].name

    x = jnp.ones((2, 3))
    assert backend(x) == "xla"
    assert backend(jax.device_put(x, cpu)) == "cpu"
    for default in ("cpu", cpu):
        with jax.default_device(default):
            assert backend(x) == "cpu"
    traced = []
    jax.eval_shape(lambda x: traced.append(backend(x)), x)
    assert traced == ["xla"]


def test_it_is_the_default():
    assert native.refusal() is None
    x1, x2 = pair(3, 2, 5)
    program = chain(spec_of(x1, x2), LAYERS)
    backend, refusals = choose(program, (Inputs(jnp.asarray(x1), jnp.asarray(x2), program.sources[0]),), Request())
    assert backend.name == "cpu" and not refusals


@pytest.mark.sample(5)
@pytest.mark.parametrize("n1, n2, features", [(1, 1, 1), (3, 2, 7), (65, 130, 128), (64, 64, 129), (200, 3, 300)])
def test_agrees_with_xla(n1, n2, features, level, dtype):
    x1, x2 = pair(n1, n2, features, dtype)
    tolerance = 1e-13 if dtype == "float64" else 2e-6
    for second in (x2, None):
        program = chain(spec_of(x1, x1 if second is None else second), LAYERS)
        kernel, expected = (run(program, x1, second, Request(), name) for name in ("cpu", "xla"))
        for name in ("nngp", "ntk", "cov1", "cov2"):
            actual, wanted = getattr(kernel, name), getattr(expected, name)
            if wanted is None:
                assert actual is None
                continue
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
        if second is None:
            np.testing.assert_array_equal(kernel.ntk, kernel.ntk.T)


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_float32_keeps_its_digits(noise):
    random = np.random.default_rng(0)
    x1 = random.normal(size=(40, 300)).astype("float32")
    x2 = (x1 + noise * random.normal(size=x1.shape)).astype("float32")
    layers = [dense(), RELU] * 20 + [dense()]
    actual = run(chain(spec_of(x1, x2), layers), x1, x2, Request(), "cpu")
    with jax.enable_x64(True):
        a, b = x1.astype("float64"), x2.astype("float64")
        expected = run(chain(spec_of(a, b), layers), a, b, Request(), "xla")
    for name in ("nngp", "ntk"):
        wanted = np.asarray(getattr(expected, name))
        np.testing.assert_allclose(getattr(actual, name), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


def test_results_do_not_depend_on_the_batch():
    x1, x2 = pair(150, 70, 33)
    whole = run(chain(spec_of(x1, x2), LAYERS), x1, x2, Request(), "cpu")
    part = run(chain(spec_of(x1[100:107], x2[66:]), LAYERS), x1[100:107], x2[66:], Request(), "cpu")
    np.testing.assert_array_equal(whole.ntk[100:107, 66:], part.ntk)
    np.testing.assert_array_equal(whole.nngp[100:107, 66:], part.nngp)


def test_transformations_and_derivatives(x64):
    x1, x2 = pair(4, 3, 6, "float64")
    program = chain(spec_of(x1, x2), LAYERS)

    def kernel(x, implementation="cpu"):
        return run(program, x, x2, Request(True, False), implementation).ntk

    expected = kernel(x1, "xla")
    np.testing.assert_allclose(jax.jit(kernel)(x1), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(kernel)(np.stack([x1, x1]))[1], expected, rtol=1e-12)
    for derivative in (jax.jacrev, jax.jacfwd):
        actual, wanted = (derivative(kernel)(jnp.asarray(x1)), derivative(lambda x: kernel(x, "xla"))(jnp.asarray(x1)))
        np.testing.assert_allclose(actual, wanted, rtol=1e-12)


def test_nan_and_inf_stay_with_their_samples():
    x1, x2 = pair(5, 4, 6)
    x1[1, 2], x2[3, 0] = np.nan, np.inf
    ntk = np.array(run(chain(spec_of(x1, x2), LAYERS), x1, x2, Request(), "cpu").ntk)
    assert not np.isfinite(ntk[1]).any() and not np.isfinite(ntk[:, 3]).any()
    assert np.isfinite(np.delete(np.delete(ntk, 1, 0), 3, 1)).all()


@pytest.mark.parametrize("n1, n2", [(0, 3), (3, 0), (0, 0)])
def test_no_samples(n1, n2):
    x1, x2 = pair(n1, n2, 6)
    kernel = run(chain(spec_of(x1, x2), LAYERS), x1, x2)
    assert kernel.nngp.shape == kernel.ntk.shape == (n1, n2)


def test_without_the_module(fresh, monkeypatch):
    monkeypatch.setattr(native, "_MODULE", "nt_core._there_is_no_such_module")
    x1, x2 = pair(3, 2, 5)
    with pytest.warns(UserWarning, match="without a C\\+\\+ compiler"):
        kernel = run(chain(spec_of(x1, x2), LAYERS), x1, x2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run(chain(spec_of(x1, x2), LAYERS), x1, x2)  # said once
    np.testing.assert_array_equal(kernel.ntk, again.ntk)
    with pytest.raises(NotImplementedError, match="native module"):
        run(chain(spec_of(x1, x2), LAYERS), x1, x2, Request(), "cpu")


def test_a_module_too_new_for_jaxlib(fresh, monkeypatch):
    major, minor = native.runtime_ffi_version()
    module = types.SimpleNamespace(
        ffi_api_version=lambda: (major, minor + 1), registrations=lambda: pytest.fail("registered")
    )
    monkeypatch.setattr(native.importlib, "import_module", lambda name: module)
    x1, x2 = pair(3, 2, 5)
    with pytest.warns(UserWarning, match="install a newer jaxlib"):
        kernel = run(chain(spec_of(x1, x2), LAYERS), x1, x2)
    assert np.isfinite(kernel.ntk).all()


def test_polynomials_are_those_of_the_activation():
    header = pathlib.Path(__file__).parents[3] / "csrc" / "relu_polynomials.h"
    numbers = [float(x) for x in re.findall(r"^ +(-?[0-9.e-]+)f?,$", header.read_text(), re.MULTILINE)]
    tables = (polynomials.P_FLOAT32, polynomials.Q_FLOAT32, polynomials.P_FLOAT64, polynomials.Q_FLOAT64)
    assert numbers == [x for table in tables for x in table]


@pytest.mark.parametrize(("scalar", "tolerance"), [("float", 1.5e-7), ("double", 1.2e-16)])
def test_polynomials_of_error_functions_are_angles_over_sines(scalar, tolerance):
    header = (pathlib.Path(__file__).parents[3] / "csrc" / "arc_polynomials.h").read_text()
    tables = {
        name: [mp.mpf(float(x)) for x in re.findall(r"-?[0-9.]+(?:e-?[0-9]+)?", numbers)]
        for name, numbers in re.findall(rf"constexpr {scalar} (\w+)\[\] = {{(.*?)}}", header, re.DOTALL)
    }
    assert set(tables) == {"turn", "arcsine"}

    def value(name, x):
        return sum(c * x**k for k, c in enumerate(tables[name]))

    with mp.workdps(30):
        for angle in mp.linspace(0, mp.pi / 2, 40)[1:]:
            far = 1 - mp.cos(angle)
            assert abs((1 + far * value("turn", far)) / (angle / mp.sin(angle)) - 1) < tolerance
            near, square = angle / 2, mp.sin(angle / 2) ** 2
            assert abs(value("arcsine", square) / (near / mp.sin(near)) - 1) < tolerance


def test_warnings_as_errors_do_not_keep_it_from_falling_back(fresh, monkeypatch):
    monkeypatch.setattr(native, "_MODULE", "nt_core._there_is_no_such_module")
    x1, x2 = pair(3, 2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel = run(chain(spec_of(x1, x2), LAYERS), x1, x2)
    assert np.isfinite(kernel.ntk).all()


def test_a_jaxlib_without_headers(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    with pytest.warns(UserWarning, match="the installed jaxlib has 0.0"):
        assert native.refusal() is not None


def test_an_unknown_instruction_set_is_an_error(fresh, monkeypatch):
    monkeypatch.setenv("NT_CPU_LEVEL", "mmx")
    with pytest.raises(ValueError, match="NT_CPU_LEVEL should be baseline, avx2 or avx512, not mmx"):
        native.refusal()


def kernel_of(x1, x2):
    """The kernel after one layer."""
    return run(chain(spec_of(x1, x1 if x2 is None else x2), [dense()]), x1, x2)


@pytest.mark.parametrize("shape", [(3, 2), (3, 3)])
def test_from_a_kernel_without_variances_where_none_are_read(shape):
    x1, x2 = pair(*shape, 5)
    kernel = kernel_of(x1, x2).replace(cov1=None, cov2=None)
    program = chain(kernel.spec, [dense()])
    (after,) = propagate(program, [kernel], Request(ntk=True, covariances=False), "cpu")
    np.testing.assert_allclose(after.nngp, 1.4 * kernel.nngp + 0.2, rtol=1e-6)
    np.testing.assert_allclose(after.ntk, after.nngp + 1.4 * kernel.ntk, rtol=1e-6)


def test_one_kernel_of_a_batch_with_itself_and_one_of_two_batches():
    x, _ = pair(3, 2, 5)
    sources = [kernel_of(x, None), kernel_of(x, x.copy())]
    builder = Builder()
    total = builder.add(steps.Combine((1.0, 1.0)), *(builder.source(kernel.spec) for kernel in sources))
    program = builder.build(builder.add(dense(), builder.add(RELU, total)))
    after, expected = (propagate(program, sources, Request(), name)[0] for name in ("cpu", "xla"))
    for name in ("nngp", "ntk", "cov1"):
        np.testing.assert_allclose(getattr(after, name), getattr(expected, name), rtol=1e-5)
