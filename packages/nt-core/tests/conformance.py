"""What every backend must do. A backend's test file subclasses `Conformance` and names the backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nt_core import Builder, Inputs, Request, Spec, activations, definition, propagate, steps
from nt_core.layouts import reverse_zipped, zip_axes, zipped_diagonal

RELU = steps.Dual(activations.ABRelu(0.0, 1.0))
ABS = steps.Dual(activations.ABRelu(-1.0, 0.5))
MEAN, SUM = True, False
GATHER = steps.Gather(((-1, 0, 3, 3, -1, 1), (2, -1, 0, 1)))  # of an image of 4 x 3
EVERYTHING = Request()


def conv(window=(3, 3), strides=(1, 1), padding="SAME", dilation=(1, 1), b_var=0.1, **kwargs):
    return steps.Conv(1.7, b_var, 16, window, strides, padding, dilation, **kwargs)


def dense(b_var=0.2, **kwargs):
    return steps.Dense(1.4, b_var, 16, **kwargs)


def pool(window=(2, 2), strides=(2, 2), padding="VALID", mean=MEAN, normalize_edges=False):
    return steps.Pool(window, strides, padding, mean, normalize_edges)


CHAINS = {
    "dense": ((1, 1), [dense(), RELU, dense(None), ABS, dense(parameterization="standard", s=(2, 3)), steps.Flatten()]),
    "full output": ((3, 4), [conv(), RELU]),
    "full output of two": ((4, 3), [conv(), RELU, conv((3, 2), (2, 1)), RELU]),
    "valid": ((5, 4), [conv(padding="VALID"), RELU, conv((2, 2), padding="VALID"), steps.Flatten(), dense()]),
    "dilated": ((5, 4), [conv(dilation=(2, 1)), RELU, conv((3, 1), padding="VALID"), RELU, steps.GlobalPool(MEAN)]),
    "explicit padding": ((4, 4), [conv(padding=((2, 0), (1, 1))), RELU, steps.GlobalPool(MEAN)]),
    "standard": (
        (4, 4),
        [conv(parameterization="standard"), RELU, conv(b_var=None), RELU, steps.GlobalPool(MEAN), dense()],
    ),
    "global pool": ((6, 6), [conv(), RELU, conv(), RELU, steps.GlobalPool(MEAN)]),
    "after global pool": (
        (6, 6),
        [conv(), RELU, conv(padding="CIRCULAR"), ABS, steps.GlobalPool(SUM), dense(), RELU, dense()],
    ),
    "strides": ((8, 6), [conv(), RELU, conv(strides=(2, 2)), RELU, conv(), steps.GlobalPool(MEAN)]),
    "circular strides": (
        (8, 6),
        [conv(strides=(2, 2), padding="CIRCULAR"), RELU, conv(), RELU, steps.GlobalPool(MEAN)],
    ),
    "circular strides, one column": (
        (4, 2),
        [conv((1, 1), (1, 2), "CIRCULAR"), RELU, conv((2, 2)), RELU, conv((1, 2)), RELU],
    ),
    "pool": ((6, 8), [conv(), RELU, pool(), conv(), RELU, steps.GlobalPool(MEAN)]),
    "strided pool": ((8, 6), [conv(), RELU, pool((3, 3), (2, 2), "SAME"), conv(), RELU, steps.Flatten()]),
    # After Flatten only equal positions count; global pools read what pools leave between different windows too.
    "overlapping pool, global": (
        (6, 6),
        [conv(), RELU, pool((3, 3), (1, 1), "SAME"), conv(), RELU, steps.GlobalPool(MEAN)],
    ),
    "sums, normalised edges": (
        (6, 6),
        [conv(), RELU, pool((3, 3), (2, 2), "SAME", SUM, True), conv(), RELU, steps.GlobalPool(MEAN)],
    ),
    "normalised edges, global": (
        (6, 6),
        [conv(), RELU, pool((3, 3), (2, 2), "SAME", MEAN, True), conv(), RELU, steps.GlobalPool(MEAN)],
    ),
    "circular pool": ((6, 6), [conv(), RELU, pool((3, 2), (2, 1), "CIRCULAR", SUM), conv(), RELU, steps.Flatten()]),
    "pooled output": ((6, 4), [conv(padding="VALID"), RELU, pool((2, 2), (2, 2), "SAME")]),
    "normalised": (
        (4, 4),
        [conv(), steps.Normalize(1e-3, ()), RELU, conv(), RELU, steps.Normalize(0.0, (1,)), steps.GlobalPool(MEAN)],
    ),
    # Windows of three positions in turn along the last axis, with several rows and numbers of what is beside the image.
    "neighbours": (
        (4, 5),
        [
            *(conv((1, 3)), RELU, conv((5, 3)), RELU, conv((2, 3)), ABS),
            *(conv(padding=((2, 0), (1, 1))), RELU, conv(padding=((1, 1), (0, 2))), RELU),
            *(steps.GlobalPool(MEAN), dense(), RELU),
        ],
    ),
    "repeated": ((3, 3), [conv(), RELU] * 5 + [steps.GlobalPool(MEAN), dense(), RELU]),
    "gather": ((4, 3), [conv(), RELU, GATHER, conv((2, 2)), ABS]),
    "gather, global pool": ((4, 3), [conv(), RELU, GATHER, conv((2, 2)), RELU, steps.GlobalPool(MEAN)]),
    "gather, pool": ((4, 3), [GATHER, conv(), ABS, pool(), conv((2, 2)), RELU, steps.GlobalPool(MEAN), dense(), RELU]),
    "gather, circular": (
        (4, 3),
        [conv(padding="CIRCULAR"), RELU, GATHER, conv((2, 2), padding="CIRCULAR"), RELU, steps.GlobalPool(SUM)],
    ),
    "gather, equal positions": ((4, 3), [conv(), RELU, GATHER, conv((2, 2)), ABS, steps.Flatten()]),
    "gather, covariances": ((4, 3), [conv(), RELU, GATHER, conv((2, 2))]),
    "untie": ((4, 3), [conv(), steps.Untie(), ABS, conv((2, 2)), RELU, steps.GlobalPool(MEAN)]),
    "untie, pool": ((4, 6), [conv(), steps.Untie(), ABS, pool(), conv((2, 2)), RELU, steps.GlobalPool(MEAN)]),
    "untie, covariances": ((4, 3), [conv(), RELU, conv(), steps.Untie(is_reversed=True)]),
    "untie, equal positions": ((4, 3), [conv(), RELU, conv(), steps.Untie(), ABS, steps.Flatten()]),
    "large image": ((12, 8), [conv((1, 3)), RELU, pool((4, 4), (4, 4)), conv(), RELU, steps.GlobalPool(MEAN)]),
}
# Whose kernels of a batch with itself are computed as well: one of each kind of output, with pools and without.
WITH_ITSELF = {
    "dense",
    "full output of two",
    "after global pool",
    "pool",
    "pooled output",
    "repeated",
    "gather",
    "gather, pool",
    "untie, pool",
}
SIMPLE = [conv(), RELU, steps.GlobalPool(MEAN), dense(), RELU]


def chain(spec, layers):
    builder = Builder()
    value = builder.source(spec)
    for layer in layers:
        value = builder.add(layer, value)
    return builder.build(value)


def residual(spec):
    """Two residual blocks, one of them strided, and a concatenation of channels."""
    builder = Builder()
    x = builder.add(conv(), builder.source(spec))
    for strides in ((1, 1), (2, 2)):
        branch = builder.add(conv(), builder.add(RELU, builder.add(conv(strides=strides), builder.add(RELU, x))))
        shortcut = builder.add(conv(strides=strides), x) if strides != (1, 1) else x
        x = builder.add(steps.Combine((1.0, 1.0)), branch, shortcut)
    x = builder.add(steps.Combine((0.25, 0.75), concat=True), x, builder.add(conv(), builder.add(RELU, x)))
    return builder.build(builder.add(steps.GlobalPool(MEAN), x))


def random_graph(spec, seed):
    """Some nonlinearities, convolutions that read neighbours, and sums, of values that others read too."""
    random, builder = np.random.default_rng(seed), Builder()
    values = [builder.add(conv(), builder.source(spec))]
    layers = [conv(), conv(), conv((1, 3)), conv((2, 3)), conv((3, 2)), dense()]
    for _ in range(12):
        # The last values are read most: chains between sums.
        x, y = (values[-1 - min(int(random.exponential(1.0)), len(values) - 1)] for _ in range(2))
        if random.integers(4) == 0:
            values.append(builder.add(steps.Combine((0.7, 0.6)), x, y))
            continue
        activated = builder.add(RELU, x)
        for layer in random.choice(len(layers), random.choice([1, 1, 1, 2])):
            values.append(builder.add(layers[layer], activated))
    return builder.build(builder.add(steps.GlobalPool(MEAN), builder.add(steps.Combine((1.0, 1.0, 1.0)), *values[-3:])))


def products(spec):
    """Products of halves of the channels, of two and of three branches, before and after a nonlinearity."""
    builder = Builder()
    x = builder.add(conv(), builder.source(spec))
    gate = builder.add(RELU, builder.add(conv((1, 1)), x))
    x = builder.add(steps.TakeChannels(8), builder.add(conv(), builder.add(steps.Multiply(), x, gate)))
    x = builder.add(conv(), builder.add(steps.Multiply(), x, builder.add(RELU, x)))
    y = builder.add(ABS, x)
    x = builder.add(steps.Multiply(), y, builder.add(RELU, builder.add(dense(), y)), builder.add(conv(b_var=None), y))
    return builder.build(builder.add(dense(), builder.add(steps.GlobalPool(MEAN), x)))


def masked(spec, mask1, mask2):
    """A network with masks as layers emit it: two masked convolutions, a masked normalisation and a masked average."""
    builder = Builder()
    share1, share2 = (
        None if m is None else 1 / m.mean((1, 2), keepdims=True) * np.ones_like(m) for m in (mask1, mask2)
    )
    count1, count2 = (None if m is None else 1 / m.sum((1, 2)) for m in (mask1, mask2))
    x = builder.add(steps.Scale(mask1, mask2), builder.add(conv(), builder.source(spec)))
    x = builder.add(conv(), builder.add(RELU, builder.add(steps.Normalize(0.1, (0, 1), share1, share2), x)))
    x = builder.add(steps.GlobalPool(SUM), builder.add(RELU, builder.add(steps.Scale(mask1, mask2), x)))
    return builder.build(builder.add(dense(), builder.add(steps.Scale(count1, count2), x)))


def masks(space, n1, n2, seed=1):
    """1 where a position counts, 0 where it is masked; some of every sample counts."""
    random = np.random.default_rng(seed)
    counts = [random.uniform(size=(n, *space)) < 0.6 for n in (n1, n2)]
    for count in counts:
        count[:, 0, 0] = True
    return tuple(count.astype(float) for count in counts)


def inputs(space, n1, n2, dtype, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(n1, *space, 3)).astype(dtype), random.normal(size=(n2, *space, 3)).astype(dtype)


def spec_of(x1, x2, **kwargs):
    return Spec(x1.shape, x2.shape, 0, x1.ndim - 1, **kwargs)


def run_all(program, x1, x2, request=EVERYTHING, implementation=None):
    source = Inputs(jnp.asarray(x1), None if x2 is None else jnp.asarray(x2), program.sources[0])
    return propagate(program, [source], request, implementation)


def run(program, x1, x2, request=EVERYTHING, implementation=None):
    (kernel,) = run_all(program, x1, x2, request, implementation)
    return kernel


def as_stored(k, kernel, n_batch):
    """From `(..., H, W, H, W)` to the layout of a kernel."""
    if k.ndim == n_batch:
        return k
    zipped = zip_axes(jnp.asarray(k), n_batch)
    if kernel.diagonal_spatial:
        return zipped_diagonal(zipped, n_batch)
    return reverse_zipped(zipped, n_batch) if kernel.is_reversed else zipped


class Conformance:
    """The suite. `implementation` names the backend."""

    implementation: str

    def agree(self, kernel, expected, tolerance):
        for name, value, n_batch in zip(("nngp", "ntk", "cov1", "cov2"), expected, (2, 2, 1, 1), strict=True):
            actual = getattr(kernel, name)
            if actual is None:
                assert name == "cov2"
                continue
            wanted = as_stored(value, kernel, n_batch)
            assert actual.shape == wanted.shape, name
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max(), err_msg=name)

    @pytest.mark.parametrize("name", CHAINS)
    def test_chain(self, name, x64):
        self.check_chain(name)

    def check_chain(self, name):
        space, layers = CHAINS[name]
        x1, x2 = inputs(space, 3, 2, "float64")
        program = chain(spec_of(x1, x2), layers)
        self.agree(
            run(program, x1, x2, implementation=self.implementation), definition.propagate(program, (x1, x2)), 1e-12
        )
        if name not in WITH_ITSELF:
            return
        program = chain(spec_of(x1, x1), layers)
        own = run(program, x1, None, implementation=self.implementation)
        self.agree(own, definition.propagate(program, (x1, x1)), 1e-7)  # the reference carries correlations: sqrt(eps)
        if own.nngp.ndim == 2:
            np.testing.assert_array_equal(own.nngp, own.nngp.T)
            np.testing.assert_array_equal(own.ntk, own.ntk.T)

    def test_residual(self, x64):
        x1, x2 = inputs((8, 8), 3, 2, "float64")
        program = residual(spec_of(x1, x2))
        self.agree(
            run(program, x1, x2, implementation=self.implementation), definition.propagate(program, (x1, x2)), 1e-12
        )

    def test_products(self, x64):
        x1, x2 = inputs((5, 4), 3, 2, "float64")
        program = products(spec_of(x1, x2))
        expected = definition.propagate(program, (x1, x2))
        self.agree(run(program, x1, x2, implementation=self.implementation), expected, 1e-12)
        own = run(products(spec_of(x1, x1)), x1, None, implementation=self.implementation)
        np.testing.assert_array_equal(own.ntk, own.ntk.T)

    def test_masks(self, x64):
        """Numbers of each sample and position, in programs on planes and on all pairs."""
        for space in ((6, 6), (3, 4)):
            (x1, x2), (mask1, mask2) = inputs(space, 3, 2, "float64"), masks(space, 3, 2)
            program = masked(spec_of(x1, x2), mask1, mask2)
            expected = definition.propagate(program, (x1, x2))
            self.agree(run(program, x1, x2, implementation=self.implementation), expected, 1e-12)
        own = run(masked(spec_of(x1, x1), mask1, None), x1, None, implementation=self.implementation)
        copied = run(masked(spec_of(x1, x1), mask1, mask1), x1, x1.copy(), implementation=self.implementation)
        np.testing.assert_array_equal(own.ntk, own.ntk.T)
        np.testing.assert_allclose(own.ntk, copied.ntk, rtol=1e-12)

    def test_dropout(self, x64):
        x1, x2 = inputs((6, 6), 3, 3, "float64")
        layers = [conv(), steps.Dropout(0.6), conv(), RELU, steps.Dropout(0.8), steps.GlobalPool(MEAN), dense(), RELU]
        for second in (x2, x1.copy()):
            program = chain(spec_of(x1, second), layers)
            expected = definition.propagate(program, (x1, second))
            tolerance = 1e-12 if second is x2 else 1e-7
            self.agree(run(program, x1, second, implementation=self.implementation), expected, tolerance)

    def test_only_what_is_asked_for(self):
        x1, x2 = inputs((6, 6), 3, 2, "float32")
        program = chain(spec_of(x1, x2), SIMPLE)
        kernel = run(program, x1, x2, Request(ntk=False, covariances=False), self.implementation)
        assert kernel.ntk is None and kernel.cov1 is None and kernel.cov2 is None
        whole = run(program, x1, x2, Request(), self.implementation)
        np.testing.assert_allclose(kernel.nngp, whole.nngp, rtol=1e-6)

    @pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2, 1.0])
    def test_float32_keeps_its_digits(self, noise):
        """Equal and nearly equal inputs are where kernels that carry correlations lose theirs."""
        random = np.random.default_rng(0)
        x1 = random.normal(size=(3, 6, 6, 3))
        x2 = x1 + noise * random.normal(size=x1.shape)
        layers = [conv(), RELU] * 12 + [steps.GlobalPool(MEAN), dense()]
        kernels = {}
        for dtype in ("float32", "float64"):
            with jax.enable_x64(dtype == "float64"):
                a, b = x1.astype("float32").astype(dtype), x2.astype("float32").astype(dtype)
                kernels[dtype] = run(chain(spec_of(a, b), layers), a, b, Request(True, False), self.implementation)
        for name in ("nngp", "ntk"):
            expected = np.asarray(getattr(kernels["float64"], name))
            actual = np.asarray(getattr(kernels["float32"], name), np.float64)
            assert np.abs(actual - expected).max() < 2e-6 * np.abs(expected).max()

    def test_many_samples(self):
        """More samples than one block holds, in numbers that blocks do not divide."""
        x1, x2 = inputs((6, 6), 37, 41, "float32")
        layers = SIMPLE
        whole = run(chain(spec_of(x1, x2), layers), x1, x2, Request(), self.implementation)
        part1, part2 = x1[30:], x2[:3]
        part = run(chain(spec_of(part1, part2), layers), part1, part2, Request(), self.implementation)
        np.testing.assert_allclose(whole.nngp[30:, :3], part.nngp, rtol=2e-6)
        np.testing.assert_allclose(whole.ntk[30:, :3], part.ntk, rtol=2e-6)
        np.testing.assert_allclose(whole.cov1[30:], part.cov1, rtol=2e-6)
        own = run(chain(spec_of(x1, x1), layers), x1, None, Request(), self.implementation)
        other = run(chain(spec_of(x1, x1), layers), x1, x1, Request(), self.implementation)
        np.testing.assert_allclose(own.ntk, other.ntk, rtol=2e-6)
        np.testing.assert_array_equal(own.ntk, own.ntk.T)

    def test_small_inputs_are_told_apart(self):
        """No tolerance decides which samples are equal: inputs scaled by `c` have `c^2` times the kernel."""
        layers = [conv(b_var=None), RELU, pool(), conv(b_var=None), RELU, steps.GlobalPool(MEAN)]
        x1, x2 = inputs((4, 4), 2, 2, "float32")
        scale = np.float32(2.0**-43)
        program = chain(spec_of(x1, x2), layers)
        kernel = run(program, x1, x2, Request(True, False), self.implementation)
        small = run(program, scale * x1, scale * x2, Request(True, False), self.implementation)
        np.testing.assert_allclose(small.ntk / scale**2, kernel.ntk, rtol=1e-6)

    @pytest.mark.parametrize("space_axes", [(), (0, 1)])
    def test_normalization_keeps_zeros(self, space_axes, x64):
        """The same with `eps` and without: 0 / 0 is 0 here."""
        x1, x2 = inputs((4, 4), 2, 3, "float64")
        x1[0], x2[1, :2] = 0, 0
        layers = [conv((1, 1), b_var=None), steps.Normalize(0.0, space_axes), RELU, conv(), RELU]
        program = chain(spec_of(x1, x2), [*layers, steps.GlobalPool(MEAN)])
        kernel = run(program, x1, x2, Request(), self.implementation)
        slightly = chain(
            spec_of(x1, x2), [layers[0], steps.Normalize(1e-20, space_axes), *layers[2:], steps.GlobalPool(MEAN)]
        )
        expected = definition.propagate(slightly, (x1, x2))
        self.agree(kernel, expected, 1e-9)

    def test_zero_inputs_and_gradients(self, x64):
        """Zero patches, equal inputs: finite kernels, finite derivatives."""
        x1, x2 = inputs((4, 4), 3, 2, "float64")
        x1[0, :2], x2[0] = 0, x1[1]
        program = chain(spec_of(x1, x2), [conv(b_var=None), RELU, conv(b_var=None), RELU, steps.GlobalPool(MEAN)])

        def total(x1):
            kernel = run(program, x1, x2, Request(True, False), self.implementation)
            return jnp.sum(kernel.nngp) + jnp.sum(kernel.ntk)

        gradient = jax.grad(total)(jnp.asarray(x1))
        assert np.isfinite(gradient).all()
        direction = np.random.default_rng(1).normal(size=x1.shape)
        direction[:2] = 0  # away from where the derivative is one by definition
        step = 1e-6
        difference = (total(x1 + step * direction) - total(x1 - step * direction)) / (2 * step)
        np.testing.assert_allclose(jnp.sum(gradient * direction), difference, rtol=1e-5)

    def test_transformations(self):
        x1, x2 = inputs((6, 6), 3, 2, "float32")
        layers = CHAINS["global pool"][1]
        program = chain(spec_of(x1, x2), layers)

        def kernel(x1, x2):
            return run(program, x1, x2, Request(True, False), self.implementation).ntk

        expected = kernel(x1, x2)
        np.testing.assert_allclose(jax.jit(kernel)(x1, x2), expected, rtol=1e-6)
        batches = jax.vmap(kernel)(np.stack([x1, 2 * x1]), np.stack([x2, x2]))
        np.testing.assert_allclose(batches[0], expected, rtol=1e-6)
        np.testing.assert_allclose(batches[1], kernel(2 * x1, x2), rtol=1e-6)
