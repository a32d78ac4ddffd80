"""What layers ask of covariances, and how these demands combine."""

import itertools
import types

import pytest
from nt_core import Bool, Diagonal, requires
from nt_core.requirements import DEFAULTS, check, in_parallel, in_series, resolve

DIAGONALS = [Diagonal(i, o) for i, o in itertools.product(Bool, Bool)]
CONV, FLATTEN = Diagonal(Bool.YES, Bool.NO), Diagonal(Bool.YES, Bool.YES)
GLOBAL_POOL, ATTENTION = Diagonal(Bool.MAYBE, Bool.YES), Diagonal(Bool.NO, Bool.NO)
CONV_LOCAL = Diagonal(Bool.YES, Bool.MAYBE)


def test_bool_is_ordered():
    assert Bool.NO < Bool.MAYBE < Bool.YES
    assert [int(b) for b in Bool] == [0, 1, 2]


@pytest.mark.parametrize("a", DIAGONALS)
def test_series_is_associative(a):
    for b, c in itertools.product(DIAGONALS, DIAGONALS):
        assert (a >> b) >> c == a >> (b >> c)


@pytest.mark.parametrize(("a", "b"), list(itertools.product(DIAGONALS, DIAGONALS)))
def test_series_follows_its_definition(a, b):
    if a.output == Bool.YES:  # a reads its inputs' diagonal, and whatever follows sees no positions any more
        expected = a
    elif a.output > Bool.NO and b.input > Bool.NO:
        expected = Diagonal(a.input, b.output)
    elif a.output == Bool.NO and b.input < Bool.YES:
        expected = Diagonal(Bool.NO, b.output)
    else:
        expected = Diagonal(min(a.input, b.input), b.output)
    assert a >> b == expected
    assert isinstance(a >> b, Diagonal)
    assert b << a == a >> b


def test_parallel_is_commutative_associative_and_idempotent():
    for a, b, c in itertools.product(DIAGONALS, DIAGONALS, DIAGONALS):
        assert a & b == b & a == Diagonal(min(a.input, b.input), min(a.output, b.output))
        assert (a & b) & c == a & (b & c)
        assert a & a == a


@pytest.mark.parametrize(
    ("layers", "combined", "diagonal"),
    [
        ([CONV, CONV], CONV, False),
        ([CONV, CONV, FLATTEN], FLATTEN, True),
        ([CONV, CONV, GLOBAL_POOL], Diagonal(Bool.NO, Bool.YES), False),
        ([CONV, CONV, ATTENTION], ATTENTION, False),
        ([CONV, CONV, CONV_LOCAL], CONV_LOCAL, True),
        ([CONV_LOCAL, FLATTEN], FLATTEN, True),
    ],
)
def test_what_networks_need(layers, combined, diagonal):
    requirement = in_series(*({"diagonal_spatial": d} for d in layers))["diagonal_spatial"]
    assert requirement == combined
    assert bool(requirement) is diagonal
    assert resolve({"diagonal_spatial": requirement})["diagonal_spatial"] is diagonal


def test_series_takes_the_axes_of_the_first_layer_that_names_them():
    combined = in_series({}, {"channel_axis": 1}, {"channel_axis": -1, "batch_axis": 0})
    assert dict(combined) == {"channel_axis": 1, "batch_axis": 0}


@pytest.mark.parametrize("combine", [in_series, in_parallel])
@pytest.mark.parametrize(("a", "b"), list(itertools.product([True, False], [True, False])))
def test_one_layer_that_reads_all_samples_is_enough(combine, a, b):
    assert combine({"diagonal_batch": a}, {}, {"diagonal_batch": b})["diagonal_batch"] == (a and b)


@pytest.mark.parametrize("combine", [in_series, in_parallel])
def test_dropout_is_in_one_mode_everywhere(combine):
    assert combine({"use_dropout": True}, {"use_dropout": True})["use_dropout"] is True
    with pytest.raises(ValueError, match="same mode"):
        combine({"use_dropout": True}, {"use_dropout": False})


@pytest.mark.parametrize("combine", [in_series, in_parallel])
def test_unknown_requirements_are_refused(combine):
    with pytest.raises(NotImplementedError, match="diagonal_time"):
        combine({"diagonal_time": True})
    with pytest.raises(NotImplementedError, match="diagonal_time"):
        requires(diagonal_time=True)


def test_parallel_branches_need_what_each_needs():
    combined = in_parallel({"diagonal_spatial": CONV}, {"diagonal_spatial": GLOBAL_POOL})
    assert combined["diagonal_spatial"] == CONV & GLOBAL_POOL


@pytest.mark.parametrize("branch", DIAGONALS)
def test_a_branch_without_demands_lets_positions_through(branch):
    # Flatten beside Identity: the second branch still has positions, which whatever follows may need.
    combined = in_parallel({"diagonal_spatial": branch}, {})
    assert combined["diagonal_spatial"] == Diagonal(branch.input, Bool.NO)


def test_requires_marks_a_kernel_fn():
    @requires(batch_axis=0, diagonal_spatial=CONV)
    def kernel_fn(k):
        return k

    assert dict(kernel_fn.input_req) == {"batch_axis": 0, "diagonal_spatial": CONV}
    assert kernel_fn(3) == 3


def test_resolve_without_requirements_takes_the_defaults():
    assert resolve({}) == dict(DEFAULTS)
    assert resolve({}, diagonal_spatial=None, diagonal_batch=None) == dict(DEFAULTS)


def test_resolve_prefers_the_users_choice():
    required = {"diagonal_spatial": FLATTEN, "channel_axis": 1}
    assert resolve(required)["diagonal_spatial"] is True
    assert resolve(required, diagonal_spatial=False)["diagonal_spatial"] is False
    assert resolve(required, diagonal_batch=False)["diagonal_batch"] is False
    assert resolve(required)["channel_axis"] == 1


@pytest.mark.parametrize(
    ("required", "chosen"),
    [
        ({"diagonal_spatial": Diagonal(Bool.NO, Bool.YES)}, {"diagonal_spatial": True}),
        ({"diagonal_batch": False}, {"diagonal_batch": True}),
    ],
)
def test_resolve_refuses_a_choice_that_the_network_forbids(required, chosen):
    with pytest.raises(ValueError, match=r"needs entries off that diagonal.*Leave diagonal_\w+ unset"):
        resolve(required, **chosen)
    assert resolve(required, **dict.fromkeys(chosen, False))


def kernel(**changes):
    layout = {"diagonal_batch": True, "diagonal_spatial": True, "batch_axis": 0, "channel_axis": 3}
    return types.SimpleNamespace(**{**layout, "shape1": (2, 4, 4, 3), **changes})


@pytest.mark.parametrize(
    "required",
    [
        {},
        {"diagonal_batch": True, "diagonal_spatial": FLATTEN},
        {"diagonal_spatial": Diagonal(Bool.MAYBE, Bool.NO)},
        {"diagonal_batch": None, "channel_axis": None},
        {"batch_axis": -4, "channel_axis": -1},
        {"use_dropout": True},
    ],
)
def test_check_accepts(required):
    check(required, kernel(), "Layer")


@pytest.mark.parametrize(
    ("required", "message"),
    [
        ({"diagonal_batch": False}, "Layer requires diagonal_batch .* does not contain sufficient information"),
        ({"diagonal_spatial": ATTENTION}, "Layer requires diagonal_spatial .* does not contain sufficient information"),
        (
            {"channel_axis": 1},
            r"channel_axis=1, but .* \(2, 4, 4, 3\).* it is 3, making the infinite limit ill-defined",
        ),
        ({"batch_axis": 2}, "batch_axis=2, but .* it is 0, making the infinite limit ill-defined"),
    ],
)
def test_check_refuses(required, message):
    with pytest.raises(ValueError, match=message):
        check(required, kernel(), "Layer")


def test_check_accepts_full_covariances_everywhere():
    check(
        {"diagonal_batch": False, "diagonal_spatial": ATTENTION},
        kernel(diagonal_batch=False, diagonal_spatial=False),
        "Layer",
    )
