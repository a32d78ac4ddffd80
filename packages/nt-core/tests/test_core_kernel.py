"""`Kernel`: what is done to a kernel is what happens to the covariances when the same is done to the activations.

`kernel_of` writes the covariances of two batches down entry by entry; it is the specification of the layouts. Entries
of the activations are small integers and there are four channels, so that equality is exact.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from nt_core import Kernel, Spec
from nt_core.kernel import combine

N_CHANNELS = 4
LAYOUTS = [
    pytest.param(
        {"diagonal_batch": batch, "diagonal_spatial": spatial, "is_reversed": reverse},
        id=f"{'same-sample' if batch else 'all-samples'}-{'same-position' if spatial else 'all-positions'}"
        f"{'-reversed' if reverse else ''}",
    )
    for batch, spatial, reverse in itertools.product([True, False], [False, True], [False, True])
]
FULL = {"diagonal_batch": False, "diagonal_spatial": False, "is_reversed": False}
# Batch and channel axis of activations with two spatial axes.
AXES = [(0, 3), (3, 0), (1, 0), (2, 1)]


def activations(n, space=(2, 3), batch_axis=0, channel_axis=3, seed=0):
    """Random activations with their axes in the given places."""
    x = np.random.default_rng([seed, n]).integers(-2, 3, (n, N_CHANNELS, *space)).astype(np.float32)
    return np.moveaxis(x, (0, 1), (batch_axis, channel_axis))


def covariance(a, b, layout, same_sample):
    """Covariances of `(n, *space, channels)` activations."""
    space = a.shape[1:-1]
    positions = list(np.ndindex(space))
    pairs = [(p, p) for p in positions] if layout["diagonal_spatial"] else itertools.product(positions, positions)
    samples = [(n, n) for n in range(len(a))] if same_sample else itertools.product(range(len(a)), range(len(b)))
    entries = {}
    for (n1, n2), (p1, p2) in itertools.product(list(samples), list(pairs)):
        pair = [(i,) if layout["diagonal_spatial"] else (i, j) for i, j in zip(p1, p2, strict=True)]
        if layout["is_reversed"] and not layout["diagonal_spatial"]:
            pair.reverse()
        index = ((n1,) if same_sample else (n1, n2)) + tuple(itertools.chain.from_iterable(pair))
        entries[index] = np.mean(a[n1][p1] * b[n2][p2])
    k = np.zeros([max(i) + 1 for i in zip(*entries, strict=True)], np.float32)
    for index, entry in entries.items():
        k[index] = entry
    return k


def kernel_of(x1, x2, layout, batch_axis=0, channel_axis=-1, **fields):
    """The kernel of activations `x1` and `x2` (None: the same as `x1`), with an NTK that is twice the NNGP."""
    batch_axis, channel_axis = batch_axis % x1.ndim, channel_axis % x1.ndim
    a, b = (
        None if x is None else np.moveaxis(x, (batch_axis, channel_axis), (0, -1)).astype(np.float64) for x in (x1, x2)
    )
    nngp = covariance(a, a if b is None else b, layout, same_sample=False)
    return Kernel(
        **{
            "nngp": nngp,
            "ntk": 2 * nngp,
            "cov1": covariance(a, a, layout, layout["diagonal_batch"]),
            "cov2": None if b is None else covariance(b, b, layout, layout["diagonal_batch"]),
            "x1_is_x2": x2 is None,
            "is_gaussian": True,
            "is_input": False,
            **layout,
            "shape1": x1.shape,
            "shape2": x1.shape if x2 is None else x2.shape,
            "batch_axis": batch_axis,
            "channel_axis": channel_axis,
            **fields,
        }
    )


def with_arrays(kernel):
    """The same with arrays of JAX: numpy arrays would hide what only works on them."""
    return jax.tree.map(jnp.asarray, kernel)


def assert_equal(actual, expected):
    for field in dataclasses.fields(Kernel):
        a, b = getattr(actual, field.name), getattr(expected, field.name)
        if a is None or b is None or not field.metadata.get("pytree_node", True):
            assert a == b if not hasattr(a, "shape") else a is b, f"{field.name}: {a} is not {b}"
        else:
            assert jnp.shape(a) == jnp.shape(b), f"{field.name}: {jnp.shape(a)} is not {jnp.shape(b)}"
            np.testing.assert_array_equal(a, b, err_msg=field.name)


def only(kernel, *names):
    """The kernel with nothing but these covariances."""
    return kernel.replace(**{name: None for name in ("nngp", "ntk", "cov1", "cov2") if name not in names})


# ---- a dataclass and a pytree


def test_fields_and_their_roles():
    roles = {f.name: f.metadata.get("pytree_node", True) for f in dataclasses.fields(Kernel)}
    assert list(roles.items()) == [
        ("nngp", True),
        ("ntk", True),
        ("cov1", True),
        ("cov2", True),
        ("x1_is_x2", True),
        ("is_gaussian", False),
        ("is_reversed", False),
        ("is_input", False),
        ("diagonal_batch", False),
        ("diagonal_spatial", False),
        ("shape1", False),
        ("shape2", False),
        ("batch_axis", False),
        ("channel_axis", False),
        ("mask1", True),
        ("mask2", True),
    ]
    required = [f.name for f in dataclasses.fields(Kernel) if f.default is dataclasses.MISSING]
    assert required == list(roles)[:-2]


def test_asdict_astuple_replace():
    kernel = kernel_of(activations(3), activations(2), FULL)
    names = [f.name for f in dataclasses.fields(Kernel)]
    assert list(kernel.asdict()) == names
    assert all(kernel.asdict()[name] is value for name, value in zip(names, kernel.astuple(), strict=True))
    assert_equal(Kernel(**kernel.asdict()), kernel)
    assert_equal(Kernel(*kernel.astuple()), kernel)
    assert kernel.replace(ntk=None).ntk is None
    assert kernel.replace(ntk=None).nngp is kernel.nngp
    with pytest.raises(dataclasses.FrozenInstanceError):
        kernel.ntk = None


def test_spec_and_from_spec():
    spec = Spec((3, 2, 4), (2, 2, 4), 0, 2, is_gaussian=True, is_reversed=True, diagonal_batch=False)
    leaves = {"nngp": jnp.ones((3, 2)), "ntk": None, "cov1": None, "cov2": None, "x1_is_x2": False}
    kernel = Kernel.from_spec(spec, **leaves)
    assert kernel.spec == spec
    assert (kernel.mask1, kernel.mask2) == (None, None)
    mask = jnp.zeros((3, 1, 1), bool)
    assert Kernel.from_spec(spec, **leaves, mask1=mask).mask1 is mask


def test_a_kernel_passes_through_jit_vmap_and_scan():
    kernel = with_arrays(kernel_of(activations(3), activations(2), FULL))
    assert_equal(jax.jit(lambda k: k)(kernel), kernel)
    masked = kernel.replace(ntk=jnp.zeros(()), cov2=None, mask1=jnp.zeros((3, 1, 1, 1), bool))
    assert_equal(jax.jit(lambda k: k)(masked), masked)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), kernel)
    doubled = jax.vmap(lambda k: k * 2)(stacked)
    assert doubled.spec == kernel.spec
    np.testing.assert_array_equal(doubled.nngp, 4 * stacked.nngp)
    carried, _ = lax.scan(lambda k, _: (k * 2, None), kernel, length=3)
    np.testing.assert_array_equal(carried.cov1, 64 * kernel.cov1)


def test_leaves_are_named_by_their_fields():
    kernel = kernel_of(activations(3), None, FULL)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(kernel)]
    assert paths == [".nngp", ".ntk", ".cov1", ".x1_is_x2"]


# ---- arithmetic


@pytest.mark.parametrize("number", [2, -0.5, np.float32(2.0), jnp.float32(2.0)])
def test_multiples_of_activations(number):
    x1, x2 = activations(3), activations(2)
    kernel = with_arrays(kernel_of(x1, x2, FULL))
    expected = kernel_of(float(number) * x1, float(number) * x2, FULL)
    assert_equal(kernel * number, expected)
    assert_equal(number * kernel, expected)
    assert_equal(kernel / (1 / number), expected)
    assert (kernel * number).nngp.dtype == kernel.nngp.dtype


@pytest.mark.parametrize("name", ["nngp", "cov1", "cov2"])
def test_adding_a_number_is_adding_an_independent_bias(name):
    kernel = with_arrays(kernel_of(activations(3), activations(2), FULL))
    for shifted in (kernel + 3.0, kernel - 3.0):
        np.testing.assert_array_equal(getattr(shifted, name), getattr(kernel, name) + 9)
        np.testing.assert_array_equal(shifted.ntk, kernel.ntk)
        assert shifted.spec == kernel.spec


def test_signs():
    kernel = kernel_of(activations(3), None, FULL)
    assert +kernel is kernel
    assert -kernel is kernel


def test_arithmetic_is_differentiable_in_the_number():
    kernel = with_arrays(kernel_of(activations(2), None, FULL))
    assert jax.grad(lambda c: jnp.sum((kernel * c).nngp))(3.0) == 6 * jnp.sum(kernel.nngp)
    assert jax.grad(lambda c: jnp.sum((kernel + c).nngp))(3.0) == 6 * kernel.nngp.size


def test_two_kernels_have_no_arithmetic():
    kernel = kernel_of(activations(2), None, FULL)
    for operation in (
        lambda: kernel * kernel,
        lambda: kernel / kernel,
        lambda: kernel + kernel,
        lambda: kernel - kernel,
    ):
        with pytest.raises(TypeError, match="unsupported operand"):
            operation()


# ---- what is done to samples and positions


@pytest.mark.sample(40)
@pytest.mark.parametrize(("batch_axis", "channel_axis"), AXES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (slice(0, 2), slice(1, 3)),
        (slice(None), slice(None, None, -1)),
        (slice(-1, None), slice(0, None, 2)),
        (slice(1, 1), slice(None)),
    ],
)
def test_slice(layout, batch_axis, channel_axis, rows, columns):
    axes = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    x1, x2 = activations(3, **axes), activations(4, **axes)

    def take(x, samples):
        return x[(slice(None),) * batch_axis + (samples,)]

    sliced = with_arrays(kernel_of(x1, x2, layout, **axes)).slice(rows, columns)
    if rows == slice(1, 1):
        assert sliced.nngp.shape[:2] == (0, 4)
        assert sliced.shape1[batch_axis] == 0
    else:
        assert_equal(sliced, kernel_of(take(x1, rows), take(x2, columns), layout, **axes))
    if rows != slice(1, 1):
        itself = with_arrays(kernel_of(x1, None, layout, **axes)).slice(rows, columns)
        assert_equal(itself, kernel_of(take(x1, rows), take(x1, columns), layout, **axes))


def test_slice_knows_whether_the_samples_are_the_same():
    kernel = kernel_of(activations(4), None, FULL)
    assert kernel.slice(slice(1, 3), slice(1, 3)).x1_is_x2 is True
    assert kernel.slice(slice(2, 4), slice(-2, None)).x1_is_x2 is True
    assert kernel.slice(slice(0, 2), slice(2, 4)).x1_is_x2 is False
    traced = jax.jit(lambda k: k.slice(slice(0, 2), slice(0, 2)))(kernel)
    assert traced.x1_is_x2


def test_slice_of_masks():
    mask1 = jnp.zeros((3, 1, 3, 1), bool).at[1, 0, 2].set(True)
    one_for_all = jnp.ones((1, 2, 1, 1), bool)
    kernel = kernel_of(activations(3), activations(4), FULL, mask1=mask1, mask2=one_for_all)
    sliced = kernel.slice(slice(1, 2), slice(2, 4))
    np.testing.assert_array_equal(sliced.mask1, mask1[1:2])
    np.testing.assert_array_equal(sliced.mask2, one_for_all)
    itself = kernel_of(activations(3), None, FULL, mask1=mask1).slice(slice(1, 2), slice(0, 2))
    np.testing.assert_array_equal(itself.mask2, mask1[0:2])


def test_slice_takes_slices():
    with pytest.raises(TypeError, match=r"takes slices, got 1.*slice\(i, i \+ 1\)"):
        kernel_of(activations(3), None, FULL).slice(1, slice(None))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reverse(layout):
    x1, x2 = activations(2, (2, 3, 1), channel_axis=4), activations(1, (2, 3, 1), channel_axis=4)
    kernel = with_arrays(kernel_of(x1, x2, layout))
    expected = kernel_of(x1, x2, {**layout, "is_reversed": not layout["is_reversed"]})
    assert_equal(kernel.reverse(), expected)
    assert_equal(kernel.reverse().reverse(), kernel)


@pytest.mark.parametrize(("batch_axis", "channel_axis"), [(0, 4), (1, 3), (4, 2)])
@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_transpose(layout, axes, batch_axis, channel_axis):
    place = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    x1, x2 = activations(2, (2, 3, 1), **place), activations(1, (2, 3, 1), **place)
    spatial = [a for a in range(5) if a not in (batch_axis, channel_axis)]
    order = np.arange(5)
    order[spatial] = [spatial[a] for a in axes]
    masks = {"mask1": jnp.asarray(x1[..., :1] > 0), "mask2": None}
    kernel = with_arrays(kernel_of(x1, x2, layout, **place, **masks))
    expected = kernel_of(
        x1.transpose(order), x2.transpose(order), layout, **place, mask1=masks["mask1"].transpose(order)
    )
    assert_equal(kernel.transpose(axes), expected)


def test_transpose_without_axes_is_the_kernel_itself():
    kernel = kernel_of(activations(2), None, FULL)
    assert kernel.transpose() is kernel


@pytest.mark.parametrize("axes", [(0,), (0, 0), (1, 2), (0, 1, 2)])
def test_transpose_refuses_what_is_no_permutation(axes):
    with pytest.raises(ValueError, match=r"permutation of the 2 spatial axes .* shape \(2, 2, 3, 4\), got"):
        kernel_of(activations(2), None, FULL).transpose(axes)


# ---- masks


@pytest.mark.sample(12)
@pytest.mark.parametrize(("batch_axis", "channel_axis"), AXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask(layout, batch_axis, channel_axis):
    axes = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    x1, x2 = activations(3, **axes), activations(2, **axes)
    mask1, mask2 = (np.take(activations(n, **axes, seed=1), [0], channel_axis) > 0 for n in (3, 2))
    masked = with_arrays(kernel_of(x1, x2, layout, **axes)).mask(mask1, mask2)
    assert_equal(masked, kernel_of(x1 * ~mask1, x2 * ~mask2, layout, **axes, mask1=mask1, mask2=mask2))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 1, 1), (1, 2, 1, 1), (1, 1, 3, 1), (3, 1, 3, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_broadcast(layout, shape):
    x1, x2 = activations(3), activations(2)
    mask1 = np.arange(np.prod(shape)).reshape(shape) % 2 == 0
    masked = with_arrays(kernel_of(x1, x2, layout)).mask(mask1, None)
    assert_equal(masked, kernel_of(x1 * ~mask1, x2, layout, mask1=mask1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_of_a_batch_with_itself(layout):
    x = activations(3)
    mask = activations(3, seed=1)[..., :1] > 0
    masked = with_arrays(kernel_of(x, None, layout)).mask(mask, None)
    assert_equal(masked, kernel_of(x * ~mask, None, layout, mask1=mask))


def test_mask_of_the_second_batch_alone():
    x1, x2 = activations(3), activations(2)
    mask2 = activations(2, seed=1)[..., :1] > 0
    masked = with_arrays(kernel_of(x1, x2, FULL)).mask(None, mask2)
    assert_equal(masked, kernel_of(x1, x2 * ~mask2, FULL, mask2=mask2))


def test_masked_entries_are_zero_whatever_they_were():
    mask = np.zeros((2, 2, 3, 1), bool)
    mask[0] = True
    kernel = with_arrays(kernel_of(activations(2), None, FULL))
    kernel = kernel.replace(nngp=kernel.nngp.at[0].set(jnp.nan), cov1=kernel.cov1.at[0].set(jnp.inf))
    masked = kernel.mask(mask, None)
    assert not masked.nngp[0].any() and not masked.cov1[0].any()


def test_no_masks():
    kernel = kernel_of(activations(2), None, FULL, mask1=np.ones((2, 1, 1, 1), bool))
    assert_equal(kernel.mask(None, None), kernel.replace(mask1=None))
    assert kernel._get_mask_prods(None, None) == (None, None, None)


def test_mask_prods_come_in_the_order_cov1_nngp_cov2():
    kernel = kernel_of(activations(3), activations(2), {**FULL, "diagonal_batch": True})
    prods = kernel._get_mask_prods(np.ones((3, 1, 1, 1), bool), np.zeros((2, 1, 1, 1), bool))
    assert [p.shape for p in prods] == [kernel.cov1.shape, kernel.nngp.shape, kernel.cov2.shape]
    assert [bool(p.all()) for p in prods] == [True, True, False]


def test_masks_of_single_channels_are_refused():
    with pytest.raises(
        NotImplementedError, match=r"differ between channels .* shape \(2, 2, 3, 4\) with channel axis 3"
    ):
        kernel_of(activations(2), None, FULL).mask(np.zeros((2, 2, 3, 4), bool), None)


@pytest.mark.parametrize("shape", [(2, 2, 3), (3, 2, 3, 1), (2, 2, 2, 1)])
def test_masks_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"broadcast to the shape \(2, 2, 3, 4\) of the activations, got shape"):
        kernel_of(activations(2), None, FULL).mask(np.zeros(shape, bool), None)


# ---- indexing

INDICES = [
    np.s_[...],
    np.s_[1:],
    np.s_[:, 1],
    np.s_[:, :, -1],
    np.s_[:, np.int64(1), 0:2],
    np.s_[:, ::-1, ::2],
    np.s_[..., -2, :],
    np.s_[:1, ..., :],
    np.s_[:, 0, 0, :],
    np.s_[::-1, :, 1:, 0:4],
]


@pytest.mark.sample(24)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("idx", INDICES, ids=str)
def test_index(layout, idx):
    x1, x2 = activations(3), activations(2)
    masks = [np.zeros((3, 1, 3, 1), bool), activations(2, seed=1)[..., :1] > 0]
    masks[0][1, 0, 2] = True
    kernel = with_arrays(kernel_of(x1, x2, layout, mask1=masks[0], mask2=masks[1]))
    expected1, expected2 = (
        np.broadcast_to(m, (*x.shape[:3], N_CHANNELS))[idx][..., :1] for m, x in zip(masks, (x1, x2), strict=True)
    )
    assert_equal(kernel[idx], kernel_of(x1[idx], x2[idx], layout, mask1=expected1, mask2=expected2))
    itself = with_arrays(kernel_of(x1, None, layout))
    assert_equal(itself[idx], kernel_of(x1[idx], None, layout))


def test_index_moves_batch_and_channel_axes():
    axes = {"batch_axis": 3, "channel_axis": 1}
    x = activations(3, **axes)
    kernel = with_arrays(kernel_of(x, None, FULL, **axes))
    assert_equal(kernel[1], kernel_of(x[1], None, FULL, batch_axis=2, channel_axis=0))
    assert_equal(kernel[1, :, 0], kernel_of(x[1, :, 0], None, FULL, batch_axis=1, channel_axis=0))


def test_index_may_select_nothing():
    kernel = with_arrays(kernel_of(activations(3), None, FULL))[:, 5:]
    assert kernel.nngp.shape == (3, 3, 0, 0, 3, 3)
    assert kernel.shape1 == (3, 0, 3, 4)


@pytest.mark.parametrize(
    ("idx", "error", "message"),
    [
        (np.s_[0], NotImplementedError, "Index 0 would remove batch axis 0"),
        (np.s_[..., 0], NotImplementedError, "Index 0 selects from channel axis 3"),
        (np.s_[..., :2], NotImplementedError, "selects from channel axis 3"),
        (np.s_[..., ::-1], NotImplementedError, "selects from channel axis 3"),
        (np.s_[:, 2], IndexError, "Index 2 is out of bounds for axis 1"),
        (np.s_[:, -3], IndexError, "Index -3 is out of bounds for axis 1"),
        (np.s_[:, :, :, :, :], IndexError, "too many entries"),
        (np.s_[..., 0, ...], IndexError, "two ellipses"),
        (np.s_[:, None], NotImplementedError, "integers, slices and an ellipsis, got None"),
        (np.s_[:, True], NotImplementedError, "integers, slices and an ellipsis, got True"),
        (np.s_[:, [0, 1]], NotImplementedError, r"integers, slices and an ellipsis, got \[0, 1\]"),
        (np.s_[..., np.arange(2), :], NotImplementedError, "integers, slices and an ellipsis, got array"),
        (np.s_[:, 0.5], NotImplementedError, "integers, slices and an ellipsis, got 0.5"),
    ],
)
def test_index_refuses(idx, error, message):
    with pytest.raises(error, match=message):
        kernel_of(activations(3), None, FULL)[idx]


# ---- dot_general: activations have axes (samples, 2, 3, channels)

# Shape of the constant ("n": number of samples), its contracted and shared axes, and theirs in the activations.
CONSTANTS = {
    "a number": ((), (), (), ((), ())),
    "new axes": ((5, 2), (), (), ((), ())),
    "contract the first spatial axis": ((5, 2), (1,), (), ((1,), ())),
    "contract the second": ((3,), (0,), (), ((2,), ())),
    "contract both, crosswise": ((3, 5, 2), (2, 0), (), ((1, 2), ())),
    "share a spatial axis": ((2, 5), (), (0,), ((), (1,))),
    "share both, contract none": ((3, 2), (), (1, 0), ((), (1, 2))),
    "share one, contract the other": ((3, 5, 2), (2,), (0,), ((1,), (2,))),
    "one for each sample": (("n", 2, 5), (1,), (0,), ((1,), (0,))),
    "one for each sample, shared space": (("n", 3, 2), (2,), (1, 0), ((1,), (2, 0))),
}


def dot(other, x, is_lhs, dims):
    operands = (other, x) if is_lhs else (x, other)
    return np.asarray(lax.dot_general(*map(jnp.asarray, operands), dims))


def constants(shape):
    """Different integer constants for both batches."""
    rng = np.random.default_rng(7)
    return [rng.integers(-2, 3, [n if s == "n" else s for s in shape]).astype(np.float32) for n in (3, 2)]


@pytest.mark.sample(40)
@pytest.mark.parametrize("is_lhs", [True, False], ids=["constant on the left", "constant on the right"])
@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dot_general(layout, name, is_lhs):
    shape, contracted, shared, (x_contracted, x_shared) = CONSTANTS[name]
    pairs = ((contracted, x_contracted), (shared, x_shared))
    dims = pairs if is_lhs else tuple((x, other) for other, x in pairs)
    other1, other2 = constants(shape)
    x1, x2 = activations(3), activations(2)
    kernel = with_arrays(kernel_of(x1, x2, layout))
    if layout["diagonal_spatial"] and x_contracted:
        with pytest.raises(ValueError, match="compute the incoming kernel with diagonal_spatial=False"):
            kernel.dot_general(other1, other2, is_lhs, dims)
        return
    y1, y2 = dot(other1, x1, is_lhs, dims), dot(other2, x2, is_lhs, dims)
    # The result of dot_general starts with the shared axes; the free ones of both operands follow, left to right.
    x_free = [a for a in range(4) if a not in x_contracted + x_shared]
    n_new = len(shape) - len(contracted) - len(shared)
    axes_out = [*x_shared, *([None] * n_new + x_free if is_lhs else x_free + [None] * n_new)]
    expected = kernel_of(
        y1, y2, {**layout, "is_reversed": False}, batch_axis=axes_out.index(0), channel_axis=axes_out.index(3)
    )
    assert_equal(kernel.dot_general(other1, other2, is_lhs, dims), expected)


def test_dot_general_of_a_batch_with_itself():
    x, (other, _) = activations(3), constants((5, 2))
    dims = (((1,), (1,)), ((), ()))
    kernel = with_arrays(kernel_of(x, None, FULL)).dot_general(other, other, True, dims)
    assert_equal(kernel, kernel_of(dot(other, x, True, dims), None, FULL, batch_axis=1))


def test_dot_general_with_two_constants_makes_two_batches_of_one():
    x, (other1, other2) = activations(3), constants((5, 2))
    dims = (((1,), (1,)), ((), ()))
    kernel = with_arrays(kernel_of(x, None, FULL)).dot_general(other1, other2, True, dims)
    ys = [dot(other, x, True, dims) for other in (other1, other2)]
    assert_equal(kernel, kernel_of(*ys, FULL, batch_axis=1, x1_is_x2=True))


@pytest.mark.parametrize("is_lhs", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_contracting_the_samples_leaves_covariances_over_all_other_axes(is_lhs, reverse):
    x, (other, _) = activations(3), constants((5, "n"))
    dims = (((1,), (0,)), ((), ())) if is_lhs else (((0,), (1,)), ((), ()))
    kernel = with_arrays(kernel_of(x, None, {**FULL, "is_reversed": reverse})).dot_general(other, other, is_lhs, dims)
    y = dot(other, x, is_lhs, dims)
    channel_axis = y.shape.index(N_CHANNELS)
    assert_equal(kernel, kernel_of(y, None, FULL, batch_axis=0, channel_axis=channel_axis))


def test_contracting_the_samples_of_features():
    x = activations(3, (), channel_axis=1)
    kernel = with_arrays(kernel_of(x, None, FULL)).dot_general(np.ones(3), np.ones(3), True, (((0,), (0,)), ((), ())))
    assert (kernel.shape1, kernel.channel_axis) == ((4,), 0)
    assert kernel.nngp == np.mean(x.sum(0) ** 2)


def test_dot_general_takes_numbers_and_nothing():
    x = activations(3)
    kernel = with_arrays(kernel_of(x, None, FULL))
    no_axes = (((), ()), ((), ()))
    assert_equal(kernel.dot_general(3.0, 3.0, True, no_axes), kernel_of(3 * x, None, FULL))
    assert kernel.dot_general(None, None, True, no_axes) is kernel


def test_dot_general_is_differentiable_and_jittable():
    kernel = with_arrays(kernel_of(activations(3), None, FULL))

    @jax.jit
    def total(other):
        return jnp.sum(kernel.dot_general(other, other, True, (((0,), (1,)), ((), ()))).nngp)

    assert total(jnp.ones(2)) == jnp.sum(kernel.nngp)
    np.testing.assert_array_equal(jax.grad(total)(jnp.ones(2)), 2 * jnp.sum(kernel.nngp, (0, 1, 3, 4, 5)))


@pytest.mark.parametrize("others", [(np.ones((5, 2)), np.ones(2)), (np.ones((5, 2)), None), (None, 1.0)])
def test_dot_general_refuses_constants_of_different_ranks(others):
    with pytest.raises(NotImplementedError, match="two constants of the same rank, got ranks"):
        kernel_of(activations(3), None, FULL).dot_general(*others, True, (((1,), (1,)), ((), ())))


@pytest.mark.parametrize("dims", [(((0,), (3,)), ((), ())), (((), ()), ((0,), (3,)))])
def test_dot_general_refuses_the_channel_axis(dims):
    other = np.ones((N_CHANNELS, 2))
    with pytest.raises(ValueError, match=r"Axis 3 of the activations is the channel axis, which is infinite"):
        kernel_of(activations(3), None, FULL).dot_general(other, other, True, dims)


def test_dot_general_refuses_to_contract_samples_that_are_not_there():
    kernel = kernel_of(activations(3), None, {**FULL, "diagonal_batch": True})
    with pytest.raises(ValueError, match="compute the incoming kernel with diagonal_batch=False"):
        kernel.dot_general(np.ones(3), np.ones(3), True, (((0,), (0,)), ((), ())))


# ---- functions of covariances, whatever the layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_map_with_numbers_of_each_sample(layout):
    x1, x2 = activations(3), activations(2)
    a, b = np.array([1.0, 2.0, -1.0], np.float32), np.array([3.0, 1.0], np.float32)
    kernel = with_arrays(kernel_of(x1, x2, layout))

    def scaled(k, first, second):
        factors = first["a"] * second["a"]
        return k * factors.reshape(factors.shape + (1,) * (k.ndim - factors.ndim))

    mapped = kernel.map(scaled, {"a": a}, {"a": b})
    assert_equal(mapped, kernel_of(x1 * a[:, None, None, None], x2 * b[:, None, None, None], layout))
    assert_equal(kernel.map(lambda k: 4 * k), kernel_of(2 * x1, 2 * x2, layout))


@pytest.mark.parametrize("diagonal_batch", [True, False])
def test_map_keeps_equal_inputs_exactly_equal(diagonal_batch):
    """Sums in another order give other roundings, so `cov1` is not computed a second time."""
    layout = {**FULL, "diagonal_batch": diagonal_batch}
    kernel = with_arrays(kernel_of(activations(3), None, layout)).matrices()
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 6)), jnp.float32)
    mapped = kernel.map(lambda k, a, b: a @ k @ jnp.swapaxes(b, -1, -2), weights)
    own = mapped.nngp[np.arange(3), np.arange(3)] if diagonal_batch else mapped.nngp
    np.testing.assert_array_equal(mapped.cov1, own)
    expected = np.einsum("npq,nmqr,msr->nmps", weights, kernel.nngp, weights)
    np.testing.assert_allclose(mapped.nngp, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_per_sample(layout):
    x1, x2 = activations(3), activations(2)
    mask1 = activations(3, seed=1)[..., :1] > 0
    kernel = with_arrays(kernel_of(x1, x2, layout, mask1=mask1))
    own = {**layout, "diagonal_batch": True}
    (cov1, masked1), (cov2, masked2) = kernel.per_sample(lambda cov, mask: (cov, mask))
    np.testing.assert_array_equal(cov1, kernel_of(x1, None, own).cov1)
    np.testing.assert_array_equal(cov2, kernel_of(x2, None, own).cov1)
    np.testing.assert_array_equal(masked1, mask1[..., 0])
    assert masked2 is None
    first, second = kernel.replace(cov2=None).per_sample(lambda cov, mask: cov)
    assert first is second


def test_per_sample_needs_a_covariance():
    kernel = kernel_of(activations(3), None, FULL, cov1=None)
    with pytest.raises(ValueError, match="has no `cov1`: compute the kernel with get=None"):
        kernel.per_sample(lambda cov, mask: cov)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rescale(layout):
    x1, x2 = activations(3), activations(2)
    scale1, scale2 = (activations(n, seed=2)[..., 0] for n in (3, 2))
    kernel = with_arrays(kernel_of(x1, x2, layout)).rescale(jnp.asarray(scale1), jnp.asarray(scale2))
    assert_equal(kernel, kernel_of(x1 * scale1[..., None], x2 * scale2[..., None], layout))
    kernel = with_arrays(kernel_of(x1, None, layout)).rescale(jnp.asarray(scale1))
    assert_equal(kernel, kernel_of(x1 * scale1[..., None], None, layout))


@pytest.mark.sample(12)
@pytest.mark.parametrize(("batch_axis", "channel_axis"), AXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_and_back(layout, batch_axis, channel_axis):
    axes = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    x1, x2 = activations(3, **axes), activations(2, **axes)
    mask1 = np.take(activations(3, **axes, seed=1), [0], channel_axis) > 0
    kernel = with_arrays(kernel_of(x1, x2, layout, **axes, mask1=mask1))
    in_a_row = [
        np.moveaxis(x, (batch_axis, channel_axis), (0, -1)).reshape(len(k), 6, -1)
        for x, k in ((x1, kernel.nngp), (x2, kernel.nngp[0]), (mask1, kernel.nngp))
    ]
    y1, y2, mask = in_a_row
    matrices = kernel.matrices()
    assert_equal(matrices, kernel_of(y1, y2, {**layout, "is_reversed": False}, mask1=mask))
    assert_equal(kernel.from_matrices(matrices), kernel)


@pytest.mark.parametrize("layout", [FULL, {**FULL, "is_reversed": True}])
def test_matrices_with_other_positions(layout):
    x1, x2 = activations(3), activations(2)
    sums = np.kron(np.ones((1, 2)), np.eye(3, dtype=np.float32))  # over the first spatial axis
    kernel = with_arrays(kernel_of(x1, x2, layout))
    matrices = kernel.matrices().map(lambda k: sums @ k @ sums.T)
    matrices = matrices.replace(shape1=(3, 3, N_CHANNELS), shape2=(2, 3, N_CHANNELS))
    summed = [x.sum(1, keepdims=True) for x in (x1, x2)]
    assert_equal(kernel.from_matrices(matrices, space=(1, 3)), kernel_of(*summed, layout))


@pytest.mark.parametrize("space", [(2, 2), (6,), (1, 2, 3)])
def test_matrices_refuse_other_numbers_of_positions(space):
    kernel = with_arrays(kernel_of(activations(3), None, FULL))
    with pytest.raises(ValueError, match="Expected 2 sizes of spatial axes with 6 positions in all"):
        kernel.from_matrices(kernel.matrices(), space=space)


def test_what_parameters_contribute_to_the_tangent_kernel():
    kernel = with_arrays(kernel_of(activations(3), activations(2), FULL))
    np.testing.assert_array_equal(kernel.add_to_ntk(kernel.nngp).ntk, 3 * kernel.nngp)
    none_yet = kernel.replace(ntk=jnp.zeros(()))
    np.testing.assert_array_equal(none_yet.add_to_ntk(2.0).ntk, np.full(kernel.nngp.shape, 2.0))
    assert none_yet.fill_ntk().ntk.shape == kernel.nngp.shape and not none_yet.fill_ntk().ntk.any()
    assert kernel.replace(ntk=None).add_to_ntk(2.0).ntk is None


def test_combine():
    x1, x2 = activations(3), activations(2)
    kernel = with_arrays(kernel_of(x1, x2, FULL))
    total = combine(lambda a, b: a + b, [kernel, kernel * 2.0])
    assert_equal(total, kernel * 5**0.5)
    assert combine(jnp.add, [kernel, kernel.replace(ntk=None)]).ntk is None
    no_parameters = kernel.replace(ntk=jnp.zeros(()))
    np.testing.assert_array_equal(combine(jnp.add, [no_parameters, kernel]).ntk, kernel.ntk)
    assert combine(jnp.add, [no_parameters, no_parameters]).ntk.shape == ()


# ---- what was not asked for is not there, and a network without parameters has a scalar NTK

OPERATIONS = {
    "slice": lambda k: k.slice(slice(0, 2), slice(1, 2)),
    "reverse": lambda k: k.reverse(),
    "transpose": lambda k: k.transpose((1, 0)),
    "mask": lambda k: k.mask(np.arange(6).reshape(1, 2, 3, 1) > 3, np.arange(6).reshape(1, 2, 3, 1) > 2),
    "multiply": lambda k: k * 2.0,
    "divide": lambda k: k / 2.0,
    "add": lambda k: k + 2.0,
    "index": lambda k: k[:, 1],
    "dot_general": lambda k: k.dot_general(np.arange(2.0), np.arange(2.0), True, (((0,), (1,)), ((), ()))),
    "matrices": lambda k: k.matrices(),
    "from_matrices": lambda k: k.from_matrices(k.matrices() * 2.0),
    "map": lambda k: k.map(lambda cov: 2 * cov),
}
SUBSETS = [("nngp",), ("nngp", "ntk"), ("nngp", "cov1"), ("cov1", "cov2"), ("ntk",)]


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_absent_covariances_stay_absent(operation, names):
    kernel = with_arrays(kernel_of(activations(2), activations(2), FULL))
    expected = only(operation(kernel), *names)
    actual = operation(only(kernel, *names))
    if names == ("nngp", "cov1"):  # cov2 is None: the second batch is the first
        actual = actual.replace(cov2=None)
    assert_equal(actual, expected)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_scalar_ntk_stays_scalar(operation):
    kernel = with_arrays(kernel_of(activations(3), activations(2), FULL, ntk=jnp.zeros(())))
    actual = operation(kernel)
    assert actual.ntk.shape == () and actual.ntk == 0
    np.testing.assert_array_equal(actual.nngp, operation(kernel.replace(ntk=None)).nngp)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_operations_run_under_jit_and_keep_the_precision(operation, dtype):
    with jax.enable_x64(dtype == "float64"):
        kernel = kernel_of(activations(3), activations(2), FULL)
        kernel = kernel.replace(**{n: jnp.asarray(getattr(kernel, n), dtype) for n in ("nngp", "ntk", "cov1", "cov2")})
        compiled = jax.jit(operation)(kernel)
        assert_equal(compiled, operation(kernel))
        if operation is not OPERATIONS["dot_general"]:  # the constants there are of double precision
            assert {k.dtype for k in (compiled.nngp, compiled.ntk, compiled.cov1, compiled.cov2)} == {jnp.dtype(dtype)}
