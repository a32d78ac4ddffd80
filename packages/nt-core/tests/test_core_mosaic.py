"""The Mosaic backends without their hardware: interpreted on CPU, lowered for GPU and TPU, and what they refuse.

The TPU kernels are interpreted by XLA, which is fast enough for the conformance suite: it covers all that both backends
share. Those of the GPU run in Mosaic's own interpreter, which simulates every load and detects races, on the smallest
images there are; some of those of the TPU do so as well.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import nt_core.backends as backends
import numpy as np
import pytest
from conformance import (
    ABS,
    CHAINS,
    MEAN,
    RELU,
    SUM,
    Conformance,
    chain,
    conv,
    dense,
    inputs,
    masked,
    masks,
    pool,
    products,
    residual,
    run,
    spec_of,
)
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from nt_core import Builder, Request, Spec, activations, definition, steps
from nt_core.backends.mosaic.backend import MosaicGpuBackend, MosaicTpuBackend, is_streamed, kept_rows, tpu_bytes
from nt_core.backends.mosaic.plan import lower_for_planes, make_plan
from nt_core.sources import Inputs
from test_core_derivatives import in_process

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason=f"the Mosaic backends need JAX 0.11.2 or newer, this is {jax.__version__}"
)
TOLERANCE = 1e-6
PAIRS = Request(ntk=True, covariances=False)

REFUSED = {
    "full output": "its output holds positions",
    "full output of two": "its output holds positions",
    "pooled output": "its output holds positions",
    "dilated": "without dilation",
    "after global pool": "CIRCULAR convolutions beside padding",
    "circular strides": "CIRCULAR convolutions beside padding",
    "circular pool": "pools with CIRCULAR padding",
    "circular strides, one column": "its output holds positions",
    "gather": "its output holds positions",
    "gather, global pool": "does not know the primitive Gather",
    "gather, pool": "does not know the primitive Gather",
    "gather, circular": "does not know the primitive Gather",
    "gather, equal positions": "does not know the primitive Gather",
    "gather, covariances": "its output holds positions",
    "untie": "does not know the primitive Untie",
    "untie, pool": "does not know the primitive Untie",
    "untie, covariances": "its output holds positions",
    "untie, equal positions": "does not know the primitive Untie",
    "normalised": "a normalisation over positions",
}
SLOW = (
    "exponentials",
    "overlapping pool",
    "strided pool",
    "normalised edges",
    "large image",
    "pool of odd images",
    "gelu",
    "hermite coefficients",
)

ERF = steps.Dual(activations.Erf(1.0, 0.8, 0.1))
GELU = steps.Dual(activations.Gelu())
TANH = steps.Dual(activations.ElementwiseNumerical(jnp.tanh, None, 20))
SELU = steps.Dual(activations.ElementwiseNumerical(jax.nn.selu, None, 10))  # with a kink, so that there is a rest
CLIP = steps.Dual(activations.Clip(1.0, -1.0, 0.5, 0.1))
GATE = steps.Dual(activations.ClipGate(1 / 6, 3.0, 0.5))


POOLED = [conv(), RELU, steps.GlobalPool(MEAN)]


def conv1(window):
    return steps.Conv(1.7, 0.1, 16, (window,), (1,), "SAME", (1,))


# What the suite lacks, or has in one program with what is refused.
MORE = {
    "circular": (
        (4, 6),
        [conv(padding="CIRCULAR"), RELU, conv((3, 2), padding="CIRCULAR"), ABS, steps.GlobalPool(SUM)],
    ),
    "circular strides": (
        (4, 4),
        [conv(strides=(2, 2), padding="CIRCULAR"), RELU, conv(padding="CIRCULAR"), RELU, steps.GlobalPool(MEAN)],
    ),
    "circular, then pool": ((4, 4), [conv(padding="CIRCULAR"), RELU, pool(), dense(), RELU, steps.GlobalPool(MEAN)]),
    "layer norm": (
        (4, 4),
        [conv(), steps.Normalize(1e-3, ()), RELU, conv(), steps.Normalize(0.0, ()), steps.Flatten()],
    ),
    "layer norm and pool": ((3, 3), [conv(), steps.Normalize(1e-3, ()), RELU, steps.GlobalPool(MEAN), dense(), RELU]),
    "erf": ((3, 3), [conv(), ERF, conv(), ERF, steps.GlobalPool(MEAN), dense(), ERF]),
    "gelu": ((3, 3), [conv(), GELU, conv(), GELU, steps.Flatten(), dense()]),
    "polynomials": ((3, 3), [conv(), steps.Dual(activations.Polynomial((0.1, 0.2, 0.3))), steps.GlobalPool(MEAN)]),
    "rectified powers": ((3, 3), [conv(), steps.Dual(activations.RectifiedMonomial(2)), steps.GlobalPool(MEAN)]),
    "jumps": ((3, 3), [conv(), steps.Dual(activations.Step(-1.0, 1.0, 0.0)), steps.GlobalPool(MEAN)]),
    "exponentials": (
        (3, 3),
        [
            *(conv(), steps.Dual(activations.Exp(0.5, 0.4)), conv(), steps.Dual(activations.Gabor())),
            *(conv(), steps.Dual(activations.Sin(1.0, 0.7, 0.2)), steps.GlobalPool(MEAN)),
        ],
    ),
    "hermite coefficients": ((3, 3), [conv(), TANH, conv(), SELU, steps.GlobalPool(MEAN), dense(), TANH]),
    "hermite coefficients, repeated": ((2, 2), [conv(), TANH] * 4 + [steps.GlobalPool(MEAN)]),
    "clip": ((3, 3), [conv(), CLIP, conv(), GATE, steps.Flatten(), dense()]),
    "5 x 5": ((4, 4), [conv((5, 5)), RELU, conv((5, 4), (2, 1)), RELU, steps.GlobalPool(MEAN)]),
    "one axis": (
        (6,),
        [conv1(3), RELU, conv1(2), RELU, steps.Pool((2,), (2,), "VALID", MEAN), dense(), RELU, steps.GlobalPool(MEAN)],
    ),
    "odd strides": ((5, 5), [conv(), RELU, conv(strides=(2, 3)), RELU, steps.GlobalPool(MEAN)]),
    "pool of odd images": ((5, 4), [conv(), RELU, pool(), dense(), RELU, steps.GlobalPool(SUM)]),
    "overlapping pool": ((3, 3), [conv(), RELU, pool((2, 2), (1, 1), "SAME"), conv(), RELU, steps.GlobalPool(MEAN)]),
    "normalised edges": (
        (4, 3),
        [conv(), RELU, pool((2, 2), (2, 2), "SAME", MEAN, True), conv(), RELU, steps.Flatten()],
    ),
    "sum pool": ((4, 4), [conv(), RELU, pool(mean=SUM), conv(), RELU, steps.GlobalPool(MEAN), dense(), RELU]),
    "standard strides": (
        (4, 4),
        [conv((3, 3), (2, 2), parameterization="standard", s=(2, 3)), RELU, steps.GlobalPool(SUM)],
    ),
    "linear": ((4, 4), [conv(), conv(parameterization="standard"), steps.GlobalPool(MEAN)]),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    for backend in (MosaicGpuBackend(interpret=True), MosaicTpuBackend(interpret=True)):
        monkeypatch.setitem(backends._BACKENDS, backend.name, backend)


def check(layers, space, implementation, n1, n2, symmetric=False, tolerance=TOLERANCE):
    """Compares with `xla` in float64, on the same inputs: two batches, or the first with itself."""
    x1, x2 = inputs(space, n1, n2, "float32")
    if symmetric:
        x2 = None
    build = layers if callable(layers) else lambda spec: chain(spec, layers)
    program = build(spec_of(x1, x1 if x2 is None else x2))
    kernel = run(program, x1, x2, PAIRS, implementation)
    with jax.enable_x64(True):
        wide = [None if x is None else np.asarray(x, "float64") for x in (x1, x2)]
        expected = run(program, *wide, PAIRS, "xla")
        for name in ("nngp", "ntk"):
            actual, wanted = np.asarray(getattr(kernel, name), "float64"), getattr(expected, name)
            assert actual.shape == wanted.shape
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max(), err_msg=name)
    if symmetric:
        np.testing.assert_array_equal(kernel.nngp, kernel.nngp.T)
        np.testing.assert_array_equal(kernel.ntk, kernel.ntk.T)


@needs_mosaic
class TestMosaicTpu(Conformance):
    """In float32, the only type that it takes."""

    implementation = ("mosaic_tpu", "xla")  # float64, to compare with, goes to xla

    @pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CHAINS])
    def test_chain(self, name, x64):
        if name not in REFUSED:
            return self.check_chain(name)
        space, layers = CHAINS[name]
        x1, x2 = inputs(space, 3, 2, "float32")
        with pytest.raises(NotImplementedError, match=REFUSED[name]):
            run(chain(spec_of(x1, x2), layers), x1, x2, implementation="mosaic_tpu")

    def check_chain(self, name):
        space, layers = CHAINS[name]
        x1, x2 = inputs(space, 3, 2, "float32")
        program = chain(spec_of(x1, x2), layers)
        expected = definition.propagate(program, (x1.astype("float64"), x2.astype("float64")))
        self.agree(run(program, x1, x2, implementation="mosaic_tpu"), expected, TOLERANCE)

    @pytest.mark.slow
    def test_residual(self, x64):
        x1, x2 = inputs((8, 8), 3, 2, "float32")
        program = residual(spec_of(x1, x2))
        expected = definition.propagate(program, (x1.astype("float64"), x2.astype("float64")))
        self.agree(run(program, x1, x2, implementation="mosaic_tpu"), expected, TOLERANCE)

    def test_products(self):
        x1, x2 = inputs((5, 4), 3, 2, "float32")
        with pytest.raises(NotImplementedError, match="does not know the primitive Product"):
            run(products(spec_of(x1, x2)), x1, x2, PAIRS, "mosaic_tpu")

    def test_masks(self):
        (x1, x2), (mask1, mask2) = inputs((4, 4), 3, 2, "float32"), masks((4, 4), 3, 2)
        with pytest.raises(NotImplementedError, match="does not know the primitive Scale"):
            run(masked(spec_of(x1, x2), mask1, mask2), x1, x2, PAIRS, "mosaic_tpu")

    def test_dropout(self):
        x1, x2 = inputs((4, 4), 3, 2, "float32")
        layers = [conv(), steps.Dropout(0.6), conv(), RELU, steps.GlobalPool(MEAN)]
        with pytest.raises(NotImplementedError, match="does not know the primitive Dropout"):
            run(chain(spec_of(x1, x2), layers), x1, x2, PAIRS, "mosaic_tpu")

    @pytest.mark.parametrize("space_axes", [()])
    def test_normalization_keeps_zeros(self, space_axes):
        x1, x2 = inputs((4, 4), 2, 3, "float32")
        x1[0] = 0
        layers = [conv(b_var=None), steps.Normalize(0.0, space_axes), RELU, conv(), RELU, steps.GlobalPool(MEAN)]
        program = chain(spec_of(x1, x2), layers)
        expected = run(program, x1, x2, implementation="xla")
        kernel = run(program, x1, x2, implementation="mosaic_tpu")
        np.testing.assert_allclose(kernel.ntk, expected.ntk, rtol=1e-5)

    def test_only_what_is_asked_for(self):
        space, layers = SMALL["pool"]
        x1, x2 = inputs(space, 3, 2, "float32")
        program = chain(spec_of(x1, x2), layers)
        kernel = run(program, x1, x2, Request(ntk=False, covariances=False), "mosaic_tpu")
        assert kernel.ntk is None and kernel.cov1 is None and kernel.cov2 is None
        whole = run(program, x1, x2, Request(), "mosaic_tpu")
        np.testing.assert_allclose(kernel.nngp, whole.nngp, rtol=1e-6)

    def test_many_samples(self, monkeypatch):
        """More samples than one block holds, in numbers that blocks do not divide."""
        monkeypatch.setattr("nt_core.backends.mosaic.run._MAX_SAMPLES", 4)
        for_2_x_4_pairs = MosaicTpuBackend.hardware._replace(numbers=256)
        monkeypatch.setattr(MosaicTpuBackend, "hardware", for_2_x_4_pairs)
        jax.clear_caches()
        x1, x2 = inputs((3, 3), 7, 9, "float32")
        layers = [conv(), RELU, conv(), RELU, steps.GlobalPool(MEAN), dense(), RELU]
        whole = run(chain(spec_of(x1, x2), layers), x1, x2, Request(), "mosaic_tpu")
        part = run(chain(spec_of(x1[5:], x2[:3]), layers), x1[5:], x2[:3], Request(), "mosaic_tpu")
        np.testing.assert_allclose(whole.nngp[5:, :3], part.nngp, rtol=TOLERANCE)
        np.testing.assert_allclose(whole.ntk[5:, :3], part.ntk, rtol=TOLERANCE)
        np.testing.assert_allclose(whole.cov1[5:], part.cov1, rtol=TOLERANCE)
        own = run(chain(spec_of(x1, x1), layers), x1, None, Request(), "mosaic_tpu")
        other = run(chain(spec_of(x1, x1), layers), x1, x1, Request(), "mosaic_tpu")
        np.testing.assert_allclose(own.ntk, other.ntk, rtol=TOLERANCE)
        np.testing.assert_array_equal(own.ntk, own.ntk.T)
        jax.clear_caches()

    def test_zero_inputs_and_gradients(self):
        """Zero patches, equal inputs: finite kernels, and the derivatives of `xla`."""
        x1, x2 = inputs((3, 3), 3, 2, "float32")
        x1[0, :2], x2[0] = 0, x1[1]
        program = chain(spec_of(x1, x2), [conv(b_var=None), RELU, conv(b_var=None), RELU, steps.GlobalPool(MEAN)])

        def total(x1, implementation):
            kernel = run(program, x1, x2, PAIRS, implementation)
            return jnp.sum(kernel.nngp) + jnp.sum(kernel.ntk)

        value, gradient = jax.value_and_grad(total)(jnp.asarray(x1), "mosaic_tpu")
        wanted_value, wanted = jax.value_and_grad(total)(jnp.asarray(x1), "xla")
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(value, wanted_value, rtol=TOLERANCE)
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@needs_mosaic
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MORE])
def test_more_programs(name):
    space, layers = MORE[name]
    check(layers, space, "mosaic_tpu", 3, 2)


@needs_mosaic
@pytest.mark.parametrize("name", ["circular", "sum pool"])
def test_a_batch_with_itself(name):
    space, layers = MORE[name]
    check(layers, space, "mosaic_tpu", 3, 1, symmetric=True)


@needs_mosaic
def test_a_residual_network():
    check(residual, (4, 4), "mosaic_tpu", 2, 2)


@needs_mosaic
def test_branches_with_pools_of_their_own():
    def program(spec):
        builder = Builder()
        x = builder.add(RELU, builder.add(conv(), builder.source(spec)))
        branches = [builder.add(conv(), builder.add(pool(), y)) for y in (x, builder.add(conv(), x))]
        y = builder.add(steps.Combine((0.5, 2.0)), *branches)
        return builder.build(builder.add(steps.GlobalPool(MEAN), builder.add(RELU, y)))

    check(program, (4, 4), "mosaic_tpu", 2, 2)


@needs_mosaic
def test_vmap():
    """Over inputs and over what is written into the steps."""
    batches = np.stack([inputs((2, 3), 2, 1, "float32")[0] * scale for scale in (1, 0.5)])

    def kernel(x, w_var):
        layers = [
            steps.Conv(w_var, 0.1, 16, (3, 3), (1, 1), "SAME", (1, 1)),
            RELU,
            pool(),
            conv(),
            RELU,
            steps.Flatten(),
        ]
        return run(chain(spec_of(x, x), layers), x, None, PAIRS, "mosaic_tpu").ntk

    w_vars = jnp.array([1.5, 2.0], jnp.float32)
    expected = [kernel(x, w_var) for x, w_var in zip(batches, w_vars, strict=True)]
    np.testing.assert_allclose(jax.vmap(kernel)(jnp.asarray(batches), w_vars), expected, rtol=TOLERANCE)


@needs_mosaic
def test_equal_inputs_have_no_deficit():
    """The same image in both batches has, to the last bit, the kernel that its variance says."""
    x1, _ = inputs((4, 4), 2, 2, "float32")
    layers = [conv(), RELU, pool(), conv(), RELU, steps.Flatten()]
    kernel = run(chain(spec_of(x1, x1), layers), x1, x1.copy(), Request(), "mosaic_tpu")
    np.testing.assert_allclose(np.diag(kernel.nngp), kernel.cov1, rtol=TOLERANCE)


SMALL = {
    "global pool": ((3, 3), [conv(), RELU, conv(), ABS, steps.GlobalPool(MEAN), dense(), RELU]),
    "repeated": ((2, 2), [conv(), RELU] * 4 + [steps.GlobalPool(MEAN)]),
    "flatten": ((4, 4), [conv(), RELU, conv(strides=(2, 2)), RELU, steps.Flatten(), dense()]),
    "circular": ((2, 3), [conv((3, 2), padding="CIRCULAR"), RELU, steps.GlobalPool(MEAN)]),
    "pool": ((2, 4), [conv(), RELU, pool(), dense(), RELU, steps.GlobalPool(MEAN)]),
    "erf and layer norm": ((2, 2), [conv(), steps.Normalize(1e-3, ()), ERF, conv(), GELU, steps.GlobalPool(MEAN)]),
    "sums": ((2, 2), [conv(), TANH, conv(), CLIP, steps.GlobalPool(MEAN)]),
    # Planes of several pieces
    "pieces": ((12, 10), [conv(), RELU, conv((3, 2)), ABS, steps.Flatten(), dense()]),
    "pieces, repeated": ((12, 10), [conv(), RELU] * 4 + [steps.Flatten()]),
    "pieces, strides": ((24, 22), [conv(strides=(2, 2)), RELU, conv(), RELU, steps.Flatten()]),
    "pieces, global pool": ((12, 10), [conv(), RELU, conv(), steps.GlobalPool(MEAN), dense(), RELU]),
}


@pytest.fixture
def simulated(capsys, caplog):
    """Runs a function in Mosaic's own interpreters, which simulate memory, and returns what they say of races.

    Programs of a grid on a GPU are concurrent, and so are the warpgroups of one; within a warpgroup all is in order.
    On a TPU, copies are concurrent with the program until they are waited for.
    """

    def simulate(hardware, function, *args, **kwargs):
        options = {"detect_races": True}
        if jax.__version_info__ >= (0, 12):
            options["on_race"] = "warn"  # as before: after an exception the interpreters are of no use any more
        if hardware == "gpu":
            mode = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**options))
        else:  # eager: what nobody waits for is copied nevertheless
            mode = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(**options, dma_execution_mode="eager"))
        with mode:
            jax.block_until_ready(function(*args, **kwargs))
        said = capsys.readouterr().out + caplog.text
        return said[said.index("RACE") :] if "RACE" in said else ""

    return simulate


@needs_mosaic
@pytest.mark.parametrize("name", SMALL)
def test_gpu_kernels_interpreted(name, simulated):
    space, layers = SMALL[name]
    # One pair, over one window of a large image: 1.3e-6 off, more than the goal.
    tolerance = 2 * TOLERANCE if name == "pieces, global pool" else TOLERANCE
    assert simulated("gpu", check, layers, space, "mosaic_gpu", 1, 1, tolerance=tolerance) == ""


@needs_mosaic
def test_the_upper_triangle_on_gpu(simulated):
    space, layers = SMALL["flatten"]
    assert simulated("gpu", check, layers, space, "mosaic_gpu", 3, 1, symmetric=True) == ""


@pytest.fixture(params=[RELU, pytest.param(TANH, marks=pytest.mark.slow)], ids=["relu", "hermite coefficients"])
def streamed(request, monkeypatch):
    """Layers: the tables of one iteration fit into the vector memory of a TPU, those of all of them do not."""
    layers = [conv(), request.param] * 4 + [conv(), steps.Normalize(1e-3, ()), steps.GlobalPool(MEAN)]
    spec = Spec((2, 3, 3, 3), (2, 3, 3, 3), 0, 3)
    sources = (Inputs(None, None, spec),)
    lowered = lower_for_planes(chain(spec, layers), sources, ntk=True)
    (stage,) = make_plan(lowered, sources, MosaicTpuBackend.hardware)
    assert len(stage.tables) == 2
    monkeypatch.setattr("nt_core.backends.mosaic.backend.VECTOR_MEMORY", tpu_bytes(stage, kept_rows(stage)))
    assert is_streamed(stage)
    jax.clear_caches()
    yield layers
    jax.clear_caches()


@needs_mosaic
def test_tables_of_repeated_layers_are_fetched_in_turn(streamed):
    check(streamed, (3, 3), "mosaic_tpu", 2, 3)


@needs_mosaic
def test_tables_are_fetched_before_they_are_read(streamed, simulated):
    assert simulated("tpu", check, streamed, (3, 3), "mosaic_tpu", 1, 1) == ""


@needs_mosaic
@pytest.mark.parametrize("name", ["global pool", "repeated", "flatten", "pool", "sums"])
def test_tpu_kernels_simulated(name, simulated):
    space, layers = SMALL[name]
    assert simulated("tpu", check, layers, space, "mosaic_tpu", 1, 1) == ""


@needs_mosaic
@pytest.mark.parametrize(
    "programs", [{"grid": (2,), "grid_names": ("program",)}, {"num_threads": 2, "thread_name": "warpgroup"}]
)
def test_races_on_gpu_are_detected(programs, simulated):
    """Two programs, or two warpgroups, that write the same numbers."""

    def write(out_ref):
        out_ref[...] = jnp.zeros((128,), jnp.float32)

    kernel = plgpu.kernel(write, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), **programs)
    assert "write" in simulated("gpu", kernel)


@needs_mosaic
def test_races_on_tpu_are_detected(simulated, monkeypatch):
    """The backend's own kernel, if it would not wait for its copies."""
    copy = pltpu.make_async_copy
    monkeypatch.setattr(pltpu, "make_async_copy", lambda *args: NotWaitedFor(copy(*args)))
    x1, x2 = inputs((2, 2), 1, 1, "float32")
    program = chain(spec_of(x1, x2), POOLED)
    assert "copy" in simulated("tpu", run, program, x1, x2, PAIRS, "mosaic_tpu")


class NotWaitedFor:
    def __init__(self, copy):
        self.start = copy.start

    def wait(self):
        pass


# Lowering: other operations lower than can be interpreted.

LOWERED = {**{n: c for n, c in CHAINS.items() if n not in REFUSED}, **MORE}


def lowered(layers, space, backend, platform, monkeypatch):
    """The program of a backend for its own platform, as text for another machine's compiler."""
    monkeypatch.setattr(type(backend), "hardware_refusal", lambda self, device: None)
    monkeypatch.setitem(backends._BACKENDS, backend.name, backend)
    x = jax.ShapeDtypeStruct((2, *space, 3), jnp.float32)
    spec = Spec(x.shape, x.shape, 0, len(space) + 1)
    program = layers(spec) if callable(layers) else chain(spec, layers)

    def kernel(x1, x2):
        (kernel,) = backends.propagate(program, [Inputs(x1, x2, spec)], PAIRS, backend.name)
        return kernel.nngp, kernel.ntk

    jax.clear_caches()  # of what was interpreted
    text = exported(kernel, platform, x, x).mlir_module()
    jax.clear_caches()
    return text


def exported(function, platform, *args):
    custom_call = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    return jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=[custom_call])(*args)


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize("name", LOWERED)
def test_gpu_kernels_on_the_whole_suite(name, simulated):
    space, layers = LOWERED[name]
    assert simulated("gpu", check, layers, space, "mosaic_gpu", 1, 1) == ""


LOWERED_NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in LOWERED]


@needs_mosaic
@pytest.mark.parametrize("name", LOWERED_NAMES)
def test_lowering_for_cuda(name, monkeypatch):
    space, layers = LOWERED[name]
    assert "mosaic_gpu_v2" in lowered(layers, space, MosaicGpuBackend(), "cuda", monkeypatch)


@needs_mosaic
@pytest.mark.parametrize("name", LOWERED_NAMES)
def test_lowering_for_tpu(name, monkeypatch):
    space, layers = LOWERED[name]
    assert "tpu_custom_call" in lowered(layers, space, MosaicTpuBackend(), "tpu", monkeypatch)


@needs_mosaic
@pytest.mark.parametrize("backend, platform", [(MosaicGpuBackend(), "cuda"), (MosaicTpuBackend(), "tpu")])
def test_repeated_layers_are_lowered_once(backend, platform, monkeypatch):
    def size(depth):
        """Of the kernel, which is one line."""
        text = lowered([conv(), RELU] * depth + [steps.GlobalPool(MEAN)], (8, 8), backend, platform, monkeypatch)
        return max(map(len, text.splitlines()))

    assert size(84) < 1.01 * size(21)


SHARDED = """
import contextlib, sys
import jax, jax.numpy as jnp, numpy as np
import nt_core.backends as backends
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec as P
from nt_core.backends.mosaic.backend import MosaicGpuBackend, MosaicTpuBackend
from conformance import chain, inputs, run, spec_of
from test_core_mosaic import PAIRS, POOLED, exported

platform = sys.argv[1]
backend = {"cuda": MosaicGpuBackend, "tpu": MosaicTpuBackend}[platform]
x1, x2 = map(jnp.asarray, inputs((2, 2), 2, 1, "float32"))

def kernel(x1, x2, name=backend.name):
    return run(chain(spec_of(x1, x2), POOLED), x1, x2, PAIRS, name).ntk

mesh = Mesh(jax.devices(), "rows")
sharded = jax.shard_map(kernel, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows"))

def gradient(x1, x2):
    return jax.grad(lambda x2: jnp.sum(sharded(x1, x2)))(x2)

backends._BACKENDS[backend.name] = backend(interpret=True)
with pltpu.force_tpu_interpret_mode() if platform == "tpu" else contextlib.nullcontext():
    np.testing.assert_allclose(jax.jit(sharded)(x1, x2), kernel(x1, x2, "xla"), rtol=1e-6)
    assert np.isfinite(jax.jit(gradient)(x1, x2)).all()

backends._BACKENDS[backend.name] = backend()
backend.hardware_refusal = lambda self, device: None
jax.clear_caches()
print(exported(sharded, platform, x1, x2).nr_devices)
"""


@needs_mosaic
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_shard_map(platform):
    """JAX checks over which axes results vary, which XLA's interpreter of Pallas cannot take: Mosaic's does."""
    flags = "--xla_force_host_platform_device_count=2"
    assert in_process(SHARDED, platform, XLA_FLAGS=flags).strip() == "2"


# Selection


def refusal(backend, layers=POOLED, space=(4, 4), dtype="float32", n_channels=3, device=None):
    x = jnp.zeros((2, *space, n_channels), dtype)
    program = chain(spec_of(x, x), layers)
    return backend.refusal(program, (Inputs(x, x, program.sources[0]),), Request(), device or jax.devices()[0])


@pytest.mark.parametrize("backend", [MosaicGpuBackend(), MosaicTpuBackend()])
def test_only_on_the_hardware_they_are_for(backend, monkeypatch):
    assert "the device is a cpu" in refusal(backend)
    x1, x2 = inputs((4, 4), 2, 2, "float32")
    monkeypatch.setitem(backends._BACKENDS, backend.name, backend)
    with pytest.raises(NotImplementedError, match="the device is a cpu"):
        run(chain(spec_of(x1, x2), POOLED), x1, x2, PAIRS, backend.name)


class FakeDevice:
    def __init__(self, compute_capability, kind="NVIDIA A100", platform="gpu"):
        self.compute_capability, self.device_kind, self.platform = compute_capability, kind, platform


def test_which_gpus(monkeypatch):
    backend = MosaicGpuBackend()
    monkeypatch.setattr(jax, "__version__", "0.11.2")
    assert "this is NVIDIA A100" in refusal(backend, device=FakeDevice("8.0"))
    assert "this is AMD Instinct MI250" in refusal(backend, device=FakeDevice("gfx90a", "AMD Instinct MI250"))
    assert refusal(backend, device=FakeDevice("9.0")) is None
    assert refusal(backend, device=FakeDevice("10.0")) is None
    monkeypatch.setattr(jax, "__version__", "0.11.1")
    assert "needs JAX 0.11.2 or newer, this is 0.11.1" in refusal(backend, device=FakeDevice("9.0"))
    assert "not a GPU" in refusal(backend, device=FakeDevice("9.0", platform="tpu"))


def test_what_is_refused(monkeypatch):
    backend = MosaicGpuBackend(interpret=True)
    with jax.enable_x64(True):
        assert "float32, not in float64" in refusal(backend, dtype="float64")
    assert "one or two spatial axes" in refusal(backend, [dense(), RELU], ())
    elementwise = steps.Dual(activations.Elementwise(lambda cov12, var1, var2: cov12))
    assert "dual of Elementwise" in refusal(backend, [conv(), elementwise, steps.GlobalPool(MEAN)])
    assert "up to 5 x 5" in refusal(backend, [conv((6, 6)), steps.GlobalPool(MEAN)], (8, 8))
    assert "up to 64 x 64" in refusal(backend, space=(65, 4))
    assert "up to 16 channels" in refusal(backend, n_channels=17)
    assert "overlap too much" in refusal(backend, [conv(), pool((5, 5), (1, 1)), steps.GlobalPool(MEAN)], (8, 8))
    monkeypatch.setattr("nt_core.backends.mosaic.backend.VECTOR_MEMORY", 1000)
    assert "of vector memory it uses 1,000" in refusal(MosaicTpuBackend(interpret=True))
    monkeypatch.setattr("nt_core.backends.mosaic.backend.SHARED_MEMORY", 1000)
    assert "shared memory holds 1,000" in refusal(backend)


@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_to_decide_computes_nothing(name):
    compiled = []
    x = jnp.zeros((2, 8, 8, 3))
    layers = [steps.Conv(1.0 + 0.1 * i, 0.3, 4, (3, 3), (1, 1), "SAME", (1, 1)) for i in range(5)]
    program = chain(spec_of(x, x), [s for conv in layers for s in (conv, RELU)] + [steps.GlobalPool(MEAN)])
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **kwargs: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    backend, refusals = backends.choose(program, (Inputs(x, x, program.sources[0]),), Request(), (name, "xla"))
    assert backend.name == name and not refusals and not compiled
    jax.jit(lambda x: x + 1)(x)
    assert len(compiled) == 1


@pytest.mark.parametrize("backend", [MosaicGpuBackend(interpret=True), MosaicTpuBackend(interpret=True)])
def test_networks_of_any_depth_are_taken(backend):
    assert refusal(backend, [conv(), RELU] * 500 + [steps.GlobalPool(MEAN)], (32, 32)) is None


def test_explain_says_why(monkeypatch):
    monkeypatch.setitem(backends._BACKENDS, "mosaic_gpu", MosaicGpuBackend())
    x = jnp.zeros((2, 4, 4, 3))
    program = chain(spec_of(x, x), POOLED)
    backend, refusals = backends.choose(program, (Inputs(x, x, program.sources[0]),), Request(), ("mosaic_gpu", "xla"))
    assert backend.name == "xla"
    assert refusals == {"mosaic_gpu": "the device is a cpu, not a GPU"}


def test_without_a_gpu_no_gpu_code_is_imported():
    code = """
import sys, jax.numpy as jnp
from nt_core import Builder, definition, Inputs, Spec, propagate, steps, activations
builder = Builder()
x = builder.add(steps.Dense(2.0, None, 16), builder.source(Spec((2, 3), (2, 3), batch_axis=0, channel_axis=1)))
program = builder.build(builder.add(steps.Dual(activations.Rbf(1.0)), x))
propagate(program, [Inputs(jnp.eye(2, 3), None, program.sources[0])])
print([name for name in sys.modules if "pallas" in name or "mosaic.gpu" in name or "mosaic.tpu" in name])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
