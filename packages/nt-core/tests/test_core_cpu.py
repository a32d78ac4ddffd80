"""The native backend: the conformance suite, instruction sets, and what it refuses."""

import concurrent.futures
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import (
    ABS,
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
    random_graph,
    residual,
    run,
    run_all,
    spec_of,
)
from nt_core import Builder, Request, Spec, _native, activations, definition, propagate, steps
from nt_core.backends.cpu.encode import encode
from nt_core.lowering.primitives import Pool
from nt_core.lowering.windows import Window, counts
from nt_core.sources import Inputs

pytestmark = pytest.mark.unoptimised

LEVELS = ["baseline", "avx2", "avx512"]
POOLED = [conv(), RELU, pool((3, 3), (2, 2), "SAME"), conv(), ABS, steps.GlobalPool(MEAN), dense(), RELU]


class TestCpu(Conformance):
    implementation = "cpu"


def agree(actual, expected, tolerance):
    for name in ("nngp", "ntk", "cov1", "cov2"):
        value, wanted = getattr(actual, name), getattr(expected, name)
        if wanted is None:
            assert value is None
        else:
            assert value.shape == wanted.shape
            np.testing.assert_allclose(value, wanted, rtol=0, atol=tolerance * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_of_convolutions(seed, x64):
    """Which rows may be overwritten depends on who reads them later."""
    x1, x2 = inputs((5, 4), 2, 1, "float64")
    program = random_graph(spec_of(x1, x2), seed)
    TestCpu().agree(run(program, x1, x2, Request(), "cpu"), definition.propagate(program, (x1, x2)), 1e-12)


def test_convolutions_fused_with_gelu(x64):
    """Also across a mask that leaves some samples as they are; more samples than a vector has lanes."""
    gelu = steps.Dual(activations.Gelu())
    x1, x2 = inputs((4, 3), 3, 19, "float64")
    numbers1, numbers2 = masks((4, 3), 3, 19)
    numbers1[0], numbers2[:9] = 1, 1

    def program(second, numbers):
        builder = Builder()
        x = builder.add(gelu, builder.add(conv(), builder.source(spec_of(x1, second))))
        x = builder.add(gelu, builder.add(steps.Scale(numbers1, numbers), builder.add(conv(), x)))
        x = builder.add(gelu, builder.add(conv(strides=(2, 1)), x))
        return builder.build(builder.add(steps.GlobalPool(MEAN), x))

    for second, numbers in ((x2, numbers2), (None, None)):
        same = second is None
        of = program(x1 if same else second, numbers)
        expected = definition.propagate(program(x1, numbers1) if same else of, (x1, x1 if same else second))
        kernel = run(of, x1, second, Request(), "cpu")
        TestCpu().agree(kernel, expected, 1e-12)
        without = run(of, x1, second, Request(ntk=False), "cpu")
        np.testing.assert_allclose(without.nngp, kernel.nngp, rtol=1e-13)


@pytest.mark.parametrize("level", LEVELS)
def test_instruction_sets(level, dtype):
    """Those that the machine does not have fall back to the best one that it has."""
    x1, x2 = inputs((7, 5), 9, 21, dtype)
    program = chain(spec_of(x1, x2), POOLED)
    expected = run(program, x1, x2, Request(), "cpu")
    _native.choose_level(level)
    try:
        agree(run(program, x1, x2, Request(), "cpu"), expected, 1e-13 if dtype == "float64" else 1e-6)
    finally:
        _native.choose_level("")


@pytest.mark.parametrize("n1, n2", [(1, 1), (3, 40), (33, 17)])
def test_a_kernel_does_not_depend_on_its_neighbours(n1, n2):
    """Bit for bit: whichever lane, tile or thread a pair of samples gets to."""
    x1, x2 = inputs((6, 5), 40, 40, "float32")
    whole = run(chain(spec_of(x1, x2), POOLED), x1, x2, Request(), "cpu")
    part1, part2 = x1[40 - n1 :], x2[:n2]
    part = run(chain(spec_of(part1, part2), POOLED), part1, part2, Request(), "cpu")
    np.testing.assert_array_equal(part.ntk, whole.ntk[40 - n1 :, :n2])
    np.testing.assert_array_equal(part.nngp, whole.nngp[40 - n1 :, :n2])


@pytest.mark.parametrize("n", [1, 16, 35])
def test_one_triangle_is_mirrored(n, x64):
    x, _ = inputs((6, 5), n, 1, "float64")
    program = chain(spec_of(x, x), POOLED)
    own = run(program, x, None, Request(), "cpu")
    np.testing.assert_array_equal(own.ntk, own.ntk.T)
    both = run(program, x, x.copy(), Request(), "cpu")
    agree(own.replace(cov2=both.cov2), both, 1e-14)
    np.testing.assert_allclose(np.diag(own.nngp), own.cov1, rtol=1e-14)


@pytest.mark.parametrize("space", [(9,), (3, 4, 5)])
def test_other_numbers_of_spatial_axes(space, x64):
    x1, x2 = inputs(space, 3, 2, "float64")
    axes = len(space)
    layers = [
        conv((3, 2, 3)[:axes], (1, 2, 1)[:axes], "SAME", (1,) * axes),
        RELU,
        conv((2, 3, 3)[:axes], (1,) * axes, "SAME", (1,) * axes),
        RELU,
        steps.GlobalPool(SUM),
    ]
    program = chain(spec_of(x1, x2), layers)
    agree(run(program, x1, x2, Request(), "cpu"), run(program, x1, x2, Request(), "xla"), 1e-12)


def test_permuted_axes(x64):
    """A layer may order the axes of its output differently; batch and channels may stand anywhere."""
    random = np.random.default_rng(0)
    x1, x2 = random.normal(size=(4, 3, 6, 2)), random.normal(size=(4, 3, 6, 5))
    spec = Spec(x1.shape, x2.shape, batch_axis=3, channel_axis=1)
    permuted = conv((3, 2), axes_out=(1, 2, 3, 0))
    for layers in (
        [permuted, RELU, conv((2, 3))],
        [permuted, RELU, pool((2, 3)), conv((1, 2)), RELU, steps.GlobalPool(MEAN)],
    ):
        kernel, expected = (run(chain(spec, layers), x1, x2, Request(), name) for name in ("cpu", "xla"))
        agree(kernel, expected, 1e-12)


@pytest.mark.parametrize("split", [1, 3, 4])
def test_from_a_materialised_kernel(split, x64):
    """A program may be cut anywhere."""
    x1, x2 = inputs((6, 5), 3, 18, "float64")
    whole = run(chain(spec_of(x1, x2), POOLED), x1, x2, Request(), "cpu")
    first = run(chain(spec_of(x1, x2), POOLED[:split]), x1, x2, Request(), "cpu")
    (second,) = propagate(chain(first.spec, POOLED[split:]), [first], Request(), "cpu")
    agree(second, whole, 1e-12)


@pytest.mark.parametrize("covariances", [False, True])
def test_a_materialised_kernel_is_flattened_without_its_own_covariances(covariances, x64):
    x1, x2 = inputs((4, 3), 3, 2, "float64")
    first = run(chain(spec_of(x1, x2), [conv(), RELU, conv()]), x1, x2, Request(), "xla")
    program = chain(first.spec, [RELU, steps.Flatten(), dense(), RELU])
    request = Request(covariances=covariances)
    (kernel,), (expected,) = (propagate(program, [first], request, name) for name in ("cpu", "xla"))
    agree(kernel, expected, 1e-12)


def test_only_same_positions(x64):
    x1, x2 = inputs((4, 5), 3, 2, "float64")
    program = chain(spec_of(x1, x2, diagonal_spatial=True), [conv(padding="CIRCULAR"), RELU, conv(strides=(2, 1))])
    kernel, expected = (run(program, x1, x2, Request(), name) for name in ("cpu", "xla"))
    agree(kernel, expected, 1e-12)


@pytest.mark.parametrize("layers", [POOLED, [conv(), RELU, steps.Flatten(), dense()]])
def test_nan_and_inf_stay_with_their_samples(layers):
    x1, x2 = inputs((6, 5), 5, 20, "float32")
    x1[1, 2, 2, 0], x2[3, 0, 0, 1] = np.nan, np.inf
    ntk = np.array(run(chain(spec_of(x1, x2), layers), x1, x2, Request(), "cpu").ntk)
    assert not np.isfinite(ntk[1]).any() and not np.isfinite(ntk[:, 3]).any()
    assert np.isfinite(np.delete(np.delete(ntk, 1, 0), 3, 1)).all()


@pytest.mark.parametrize("n1, n2", [(0, 3), (3, 0), (0, 0)])
def test_no_samples(n1, n2):
    x1, x2 = inputs((6, 5), n1, n2, "float32")
    kernel = run(chain(spec_of(x1, x2), POOLED), x1, x2, Request(), "cpu")
    assert kernel.nngp.shape == kernel.ntk.shape == (n1, n2)


CIRCULAR = {
    "global pool": (
        (6, 5),
        [conv(padding="CIRCULAR"), RELU, conv((2, 3), padding="CIRCULAR"), ABS, steps.GlobalPool(MEAN)],
    ),
    "strides": (
        (4, 6),
        [conv(padding="CIRCULAR"), RELU, conv((3, 3), (2, 2), "CIRCULAR"), RELU, steps.GlobalPool(SUM)],
    ),
    "pool": (
        (4, 4),
        [conv(padding="CIRCULAR"), RELU, pool((3, 3), (2, 2), "SAME"), conv(padding="CIRCULAR"), RELU]
        + [steps.GlobalPool(MEAN)],
    ),
    "after a padded one": ((4, 6), [conv(), RELU, pool(), conv(padding="CIRCULAR"), RELU, conv(padding="CIRCULAR")]),
    "before a padded one": (
        (4, 5),
        [conv(padding="CIRCULAR"), RELU, conv(), RELU, conv(padding="CIRCULAR"), RELU, steps.GlobalPool(MEAN)],
    ),
    "a stride that divides no circle": (
        (5, 4),
        [conv(), RELU, conv((3, 2), (2, 3), "CIRCULAR"), RELU, conv(padding="CIRCULAR"), RELU, steps.GlobalPool(MEAN)],
    ),
    "a circular pool": (
        (5, 4),
        [conv(), RELU, pool((3, 2), (2, 1), "CIRCULAR"), conv(padding="CIRCULAR"), RELU, steps.GlobalPool(MEAN)],
    ),
    "a pool around the image": (
        (3, 4),
        [conv(padding="CIRCULAR"), RELU, pool((5, 3), (1, 2), "CIRCULAR", SUM), dense(), RELU, steps.GlobalPool(MEAN)],
    ),
    "one position": ((1, 1), [conv(), RELU, conv((2, 2), padding="CIRCULAR"), RELU, steps.GlobalPool(MEAN)]),
    "one axis": (
        (5, 4),
        [conv((3, 1), padding="CIRCULAR"), RELU, conv((1, 3)), RELU, conv((3, 1), padding="CIRCULAR")],
    ),
}


@pytest.mark.parametrize("name", CIRCULAR)
def test_circular_convolutions(name, x64):
    space, layers = CIRCULAR[name]
    x1, x2 = inputs(space, 3, 18, "float64")
    program = chain(spec_of(x1, x2), layers)
    TestCpu().agree(run(program, x1, x2, Request(), "cpu"), definition.propagate(program, (x1, x2)), 1e-12)
    program = chain(spec_of(x1, x1), layers)
    own = run(program, x1, None, Request(), "cpu")
    TestCpu().agree(own, definition.propagate(program, (x1, x1)), 1e-7)  # the definition carries correlations


@steps.step
class WindowsPool(steps.Step):
    """A pool with any windows: no step of this library has dilated ones."""

    windows: tuple[Window, ...] = steps.static()
    mean: bool = steps.static(default=True)
    normalize_edges: bool = steps.static(default=False)

    def infer(self, *specs):
        (spec,) = specs
        return spec.with_shape(counts(self.windows), spec.n_channels)

    def primitive(self, spec):
        return Pool(self.windows, self.mean, self.normalize_edges)

    def as_copies(self, n1, n2):
        """The same in steps that the definitions know: copies of what lies under each window, side by side, summed."""
        places = [np.concatenate([np.array(w.positions(k))[:, None] for k in range(w.taps)], 1) for w in self.windows]
        positions = tuple(
            tuple((p % w.size if w.circular else np.where((p >= 0) & (p < w.size), p, -1)).ravel().tolist())
            for w, p in zip(self.windows, places, strict=True)
        )
        taps = tuple(w.taps for w in self.windows)
        share = 1 / np.broadcast_to(
            Pool(self.windows, self.mean, self.normalize_edges).divisors(float), counts(self.windows)
        )
        shares = (np.broadcast_to(share, (n, *share.shape)) for n in (n1, n2))
        return [steps.Gather(positions), steps.Pool(taps, taps, "VALID", SUM), steps.Scale(*shares)]


def window(size, taps, stride, dilation, low, high, circular=False):
    return Window(
        size, (size + low + high - (taps - 1) * dilation - 1) // stride + 1, taps, stride, dilation, low, high, circular
    )


DILATED_POOLS = {
    "a gap": WindowsPool((window(6, 2, 1, 2, 0, 0), window(5, 2, 2, 3, 0, 0))),
    "padded": WindowsPool((window(6, 3, 2, 2, 3, 2), window(5, 2, 1, 1, 1, 0)), SUM),
    "normalised edges": WindowsPool((window(6, 3, 1, 2, 2, 2), window(5, 2, 1, 4, 2, 2)), MEAN, True),
    "circular": WindowsPool((window(6, 3, 2, 5, 4, 5, True), window(5, 2, 1, 2, 1, 1, True))),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", DILATED_POOLS)
def test_dilated_pools(name, x64):
    dilated, before, after = DILATED_POOLS[name], [conv(), RELU], [conv(), ABS, steps.GlobalPool(MEAN)]
    x1, x2 = inputs((6, 5), 3, 18, "float64")
    for rest in ([], after):
        program = chain(spec_of(x1, x2), [*before, dilated, *rest])
        same = chain(spec_of(x1, x2), [*before, *dilated.as_copies(3, 18), *rest])
        TestCpu().agree(run(program, x1, x2, Request(), "cpu"), definition.propagate(same, (x1, x2)), 1e-12)


PADDED = {
    "all pairs": [conv((2, 3), padding=((3, 2), (0, 4))), RELU, conv((1, 1), padding=((0, 9), (0, 0))), RELU],
    "pooled": [conv((2, 2), (2, 1), padding=((4, 5), (1, 1))), RELU, conv(), ABS, steps.GlobalPool(MEAN)],
    "circular along the other axis": [conv(padding="CIRCULAR"), ABS, conv(padding=((9, 0), (2, 2))), steps.Flatten()],
    "cut off on one side": [conv((1, 2), padding=((-1, 7), (0, 1))), RELU, steps.GlobalPool(SUM)],
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_larger_than_the_image(name, x64):
    x1, x2 = inputs((3, 2), 3, 18, "float64")
    program = chain(spec_of(x1, x2), PADDED[name])
    TestCpu().agree(run(program, x1, x2, Request(), "cpu"), definition.propagate(program, (x1, x2)), 1e-12)


def test_padding_larger_than_the_image_in_single_precision():
    x1, x2 = inputs((3, 2), 3, 18, "float32")
    program = chain(spec_of(x1, x2), PADDED["pooled"])
    TestCpu().agree(run(program, x1, x2, Request(), "cpu"), definition.propagate(program, (x1, x2)), 2e-6)


def test_branches_that_order_their_axes_differently(dtype):
    """One of them turns the image, and keeps or loses that before they meet."""
    x1, x2 = inputs((4, 4), 3, 18, dtype)
    turn = conv((3, 2), axes_out=(0, 2, 1, 3))
    builder = Builder()
    x = builder.add(RELU, builder.add(conv((1, 2)), builder.source(spec_of(x1, x2))))
    turned = builder.add(conv((2, 1)), builder.add(RELU, builder.add(turn, x)))
    y = builder.add(ABS, builder.add(steps.Combine((0.5, 2.0)), builder.add(conv((2, 3)), x), turned))
    z = builder.add(steps.Multiply(), turned, builder.add(dense(), y), turned)
    pooled = builder.add(steps.GlobalPool(MEAN), builder.add(RELU, builder.add(conv((1, 3)), y)))
    for output in (y, z, pooled):
        program = builder.build(output)
        expected = definition.propagate(program, (x1, x2))
        TestCpu().agree(run(program, x1, x2, Request(), "cpu"), expected, 1e-12 if dtype == "float64" else 2e-6)


EQUAL_POSITIONS = {
    "normalised edges": [pool((2, 3), (1, 2), "SAME", MEAN, True)],
    "padding larger than the image": [
        pool((3, 2), (2, 1), ((3, 4), (0, 1)), SUM),
        steps.GlobalPool(SUM),
        dense(),
        RELU,
    ],
    "circular": [pool((2, 2), (1, 1), "CIRCULAR"), dense(), RELU, steps.Flatten()],
    "pooled twice": [pool((2, 2), (2, 2)), conv((1, 1)), ABS, steps.GlobalPool(MEAN)],
}


@pytest.mark.parametrize("name", EQUAL_POSITIONS)
def test_pools_of_equal_positions(name, x64):
    """Where only these are stored, a pool takes different positions for independent."""
    x1, x2 = inputs((5, 4), 3, 18, "float64")
    layers = [conv(), RELU, *EQUAL_POSITIONS[name]]
    untied = [part for layer in layers for part in ((layer,) if layer in (RELU, ABS) else (steps.Untie(), layer))]
    kernel = run(chain(spec_of(x1, x2, diagonal_spatial=True), layers), x1, x2, Request(), "cpu")
    TestCpu().agree(kernel, definition.propagate(chain(spec_of(x1, x2), untied), (x1, x2)), 1e-12)


@pytest.mark.parametrize("same", [False, True])
def test_covariances_between_all_samples_of_a_batch(same, x64):
    """With masks, from inputs and from a kernel in the middle of the network."""
    (x1, x2), (mask1, mask2) = inputs((4, 3), 3, 4, "float64"), masks((4, 3), 3, 4)
    if same:
        x2 = mask2 = None
    spec = spec_of(x1, x1 if same else x2, diagonal_batch=False)
    program = masked(spec, mask1, mask2)
    kernel, expected = (run(program, x1, x2, Request(), name) for name in ("cpu", "xla"))
    agree(kernel, expected, 1e-12)
    cut = run(chain(spec, POOLED[:3]), x1, x2, Request(), "cpu")
    (end,) = propagate(chain(cut.spec, POOLED[3:]), [cut], Request(), "cpu")
    agree(end, run(chain(spec, POOLED), x1, x2, Request(), "cpu"), 1e-12)
    own = run(chain(spec_of(x1, x1), POOLED), x1, None, Request(), "cpu")
    np.testing.assert_allclose(end.cov1, own.nngp, rtol=1e-12)


def test_what_is_refused_goes_to_the_next_backend():
    x1, x2 = inputs((4, 4), 3, 2, "float32")
    square = activations.Elementwise(lambda cov12, var1, var2: 2 * cov12**2 + var1 * var2)
    program = chain(spec_of(x1, x2), [conv(), steps.Dual(square), steps.GlobalPool(MEAN)])
    with pytest.raises(NotImplementedError, match="dual of Elementwise is not native"):
        run(program, x1, x2, Request(), "cpu")
    agree(run(program, x1, x2), run(program, x1, x2, Request(), "xla"), 0)


def call(code, *operands, shapes=((3, 2), (3, 2))):
    outputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.block_until_ready(jax.ffi.ffi_call("nt_propagate", outputs)(*operands, code=np.array(code, np.int64)))


def test_batches_are_compared_where_a_step_asks_for_it():
    """Deficits and dropout do; linear networks would compile the comparison for nothing."""
    x, _ = inputs((4, 3), 3, 2, "float32")
    for layers, expected in (
        ([conv(), steps.GlobalPool(MEAN), dense()], [False, False]),
        ([conv(), RELU, steps.GlobalPool(MEAN)], [True, False]),
        ([conv(), RELU, steps.Dropout(0.5), conv()], [True, True]),
    ):
        program = chain(spec_of(x, x), layers)
        source = Inputs(jnp.asarray(x), jnp.asarray(x.copy()), program.sources[0])
        assert [bool(flag) for flag in encode(program, (source,), Request(True, False)).coefficients[:2]] == expected


def test_malformed_calls_are_errors():
    """Whatever reaches the engine: an error that says what is wrong, never a crash."""
    x1, x2 = (jnp.asarray(x) for x in inputs((), 3, 2, "float32"))
    program = chain(spec_of(x1, x2), [dense(), RELU, dense()])
    run(program, x1, x2, Request(), "cpu")  # registers the handler
    source = Inputs(x1, x2, program.sources[0])
    encoded = encode(program, (source,), Request(True, False))
    code, coefficients = encoded.code, jnp.asarray(encoded.coefficients, jnp.float32)
    good = call(code, coefficients, x1, x2)
    np.testing.assert_array_equal(good[1], run(program, x1, x2, Request(True, False), "cpu").ntk)
    for bad, operands, shapes, message in [
        (code[:-1], (coefficients, x1, x2), None, "it ends too early"),
        ([], (coefficients, x1, x2), None, "it ends too early"),
        ([99, *code[1:]], (coefficients, x1, x2), None, "unknown encoding"),
        ([*code[:1], -3, *code[2:]], (coefficients, x1, x2), None, "the size of a batch is -3"),
        (code, (), None, "there are no operands"),
        (code, (coefficients[:-1], x1, x2), None, "coefficients has"),
        (code, (coefficients, x1[:2], x2), None, "x1 has 6 elements"),
        (code, (coefficients, x1), None, "an operand is missing: x2"),
        (code, (coefficients, x1, x2, x2), None, "too many operands"),
        (code, (coefficients, x1.astype(jnp.int32), x2), None, "the wrong type"),
        (code, (coefficients.astype(jnp.int32), x1, x2), None, "float32 and float64 only"),
        (code, (coefficients, x1, x2), ((3, 2), (2, 2)), "ntk has 4 elements"),
        (code, (coefficients, x1, x2), ((3, 2),), "a result is missing: ntk"),
    ]:
        with pytest.raises(Exception, match=message):
            call(bad, *operands, **({} if shapes is None else {"shapes": shapes}))


@pytest.mark.slow
def test_more_entries_than_32_bits_can_count():
    """Some 9 GB of memory."""
    n = 46_400
    random = np.random.default_rng(0)
    x = random.normal(size=(n, 3)).astype("float32")
    program = chain(spec_of(x, x), [dense(), RELU, dense()])
    nngp = run(program, x, x.copy(), Request(False, False), "cpu").nngp
    assert nngp.size > 2**31
    part = run(
        chain(spec_of(x[-5:], x[-7:]), [dense(), RELU, dense()]), x[-5:], x[-7:], Request(False, False), "cpu"
    ).nngp
    np.testing.assert_array_equal(nngp[-5:, -7:], part)


def test_concurrent_calls_never_block_each_other():
    """Sixteen at once from one program, then from eight threads; a watchdog, not a timing, says that they hang."""
    x1, x2 = inputs((6, 5), 20, 35, "float32")
    program = chain(spec_of(x1, x2), POOLED)

    def kernel(scale):
        source = Inputs(scale * jnp.asarray(x1), jnp.asarray(x2), program.sources[0])
        return propagate(program, [source], Request(True, False), "cpu")[0].ntk

    expected = np.asarray(kernel(1.0))
    done = threading.Event()

    def work():
        many = jax.jit(lambda: [kernel(1.0 + 0.0 * i) for i in range(16)])
        results = [np.asarray(k) for k in many()]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results += [np.asarray(k) for k in pool.map(kernel, [1.0] * 32)]
        for result in results:
            np.testing.assert_array_equal(result, expected)
        done.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(300)
    assert done.is_set()


def test_a_residual_network_in_single_precision():
    x1, x2 = inputs((4, 4), 3, 18, "float32")
    program = residual(spec_of(x1, x2))
    kernel, expected = (run(program, x1, x2, Request(), name) for name in ("cpu", "xla"))
    agree(kernel, expected, 2e-6)


def test_branches_with_pools_of_their_own(x64):
    x1, x2 = inputs((4, 4), 3, 2, "float64")
    builder = Builder()
    x = builder.add(RELU, builder.add(conv(), builder.source(spec_of(x1, x2))))
    branches = [builder.add(RELU, builder.add(conv(), builder.add(pool(), y))) for y in (x, builder.add(conv(), x))]
    y = builder.add(steps.Combine((0.5, 2.0)), *branches)
    program = builder.build(builder.add(steps.GlobalPool(MEAN), y))
    agree(run(program, x1, x2, Request(), "cpu"), run(program, x1, x2, Request(), "xla"), 1e-12)


def test_circular_beside_padded_branches(x64):
    """Neither branch mixes both; their sum does."""
    x1, x2 = inputs((4, 3), 3, 2, "float64")
    builder = Builder()
    x = builder.add(RELU, builder.add(conv(), builder.source(spec_of(x1, x2))))
    branches = [builder.add(RELU, builder.add(conv(padding=padding), x)) for padding in ("SAME", "CIRCULAR")]
    y = builder.add(steps.Combine((0.5, 2.0)), *branches)
    y = builder.add(ABS, builder.add(dense(), y))
    program = builder.build(builder.add(steps.GlobalPool(MEAN), y))
    agree(run(program, x1, x2, Request(), "cpu"), run(program, x1, x2, Request(), "xla"), 1e-12)


def test_several_outputs(x64):
    """Before any parameters, between two pools, all pairs of positions, and what is read further."""
    x1, x2 = inputs((4, 4), 3, 18, "float64")
    for second in (x2, None):
        builder = Builder()
        x = builder.source(spec_of(x1, x1 if second is None else second))
        y = builder.add(RELU, builder.add(conv(), x))
        z = builder.add(RELU, builder.add(conv(), builder.add(pool(), y)))
        program = builder.build(x, y, builder.add(steps.Flatten(), z), builder.add(steps.GlobalPool(MEAN), z))
        kernels, expected = (run_all(program, x1, second, Request(), name) for name in ("cpu", "xla"))
        for kernel, wanted in zip(kernels, expected, strict=True):
            agree(kernel, wanted, 1e-12)
