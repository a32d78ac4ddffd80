"""The outputs of a network in the course of gradient descent on any loss."""

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from nt_core.tracing import is_traced

from nt_predict._flow import flow_times
from nt_predict._layout import Axes, OutputLayout
from nt_predict._percentage import PERCENTAGE, is_watched

Loss = Callable[[jax.Array, jax.Array], Any]

_NO_LIMIT = (
    "The outputs have no limit that can be found: at `t=None` the loss must be convex, twice differentiable, and have "
    "its minimum at finite outputs, and only one of them. (The cross-entropy of hard labels has it at infinity: "
    "give the labels some probability of error, e.g. `0.99 * y + 0.01 / n_classes`.) Give a finite `t`."
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ODEState:
    """Where gradient descent stands, to go on from there.

    Attributes:
      fx_train: outputs at training points.
      fx_test: outputs at test points; None: there are none.
      qx_train: with momentum, the velocities of the training outputs; None at rest.
      qx_test: with momentum, the velocities of the test outputs; None at rest.
    """

    fx_train: Any = None
    fx_test: Any = None
    qx_train: Any = None
    qx_test: Any = None


def gradient_descent(
    loss: Loss,
    k_train_train: Any,
    y_train: Any,
    learning_rate: float = 1.0,
    momentum: float | None = None,
    trace_axes: Axes = (-1,),
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int = 2**17,
    solver: Any = None,
    progress: bool = True,
) -> Callable[..., Any]:
    r"""Outputs of an infinitely wide, or a linearised, network under gradient descent on any loss.

    Continuous-time gradient descent keeps the tangent kernel :math:`\Theta` fixed, and the outputs :math:`f` at
    training points, :math:`f^*` at test points follow (Lee et al., 2019, arXiv:1902.06720)

    .. math::
      \dot f = -\eta \Theta_{dd} \nabla_f L(f, y), \quad \dot f^* = -\eta \Theta_{*d} \nabla_f L(f, y),

    with momentum :math:`m` instead

    .. math::
      \dot f = \sqrt\eta\, q, \quad \dot q = (m - 1) q - \sqrt\eta\, \Theta_{dd} \nabla_f L(f, y),

    and alike at test points. They are integrated numerically, in adaptive steps. For the mean squared error use
    :func:`gradient_descent_mse`, which needs no steps.

    Args:
      loss: ``loss(fx, y_train)``, a scalar, for training outputs of the shape of ``y_train``; differentiable by JAX.
        Functions that are one object are compiled once.
      k_train_train: train-train kernel of shape ``(n, n)`` for ``y_train`` of shape ``(n, c)``; in general a pair of
        axes for every axis of ``y_train`` that is not in ``trace_axes``.
      y_train: training labels.
      learning_rate: step size; a step is one unit of ``t``.
      momentum: coefficient of the momentum, in [0, 1); None: plain gradient descent.
      trace_axes: axes of ``y_train`` along which outputs are independent and have the same kernel.
      rtol, atol: the error of a step is at most ``atol`` plus ``rtol`` times the largest of labels and initial outputs,
        at every output. None is 1e-8 in double, 1e-5 in single precision.
      max_steps: the most steps between two times. Those of an explicit solver are at most as long as the fastest
        direction is stable.
      solver: one of diffrax; None is ``diffrax.Tsit5()``.
      progress: whether to show a bar, if tqdm is installed, standard error is a terminal, and it takes longer than a
        second; not under `jax.jit`.

    Returns:
      ``predict_fn(t=None, fx_train_or_state_0=0., fx_test_0=None, k_test_train=None)``. ``t`` is a finite number or an
      array of any shape, at least 0, in any order; ``None`` is infinity, for convex losses. ``fx_train_or_state_0`` and
      ``fx_test_0`` are the outputs before training, arrays or scalars. The result is the training outputs, or those of
      test points if ``fx_train_or_state_0=None``, or the tuple of both, with the axes of ``t`` in front.

      ``fx_train_or_state_0`` may be an :class:`ODEState`, with the test outputs in it. The result is then an
      :class:`ODEState` too, and may be given to ``predict_fn`` to go on: ``t`` counts from the state that is given.

    Raises:
      ImportError: diffrax is not installed.
      TypeError: the loss is not a real scalar.
      ValueError: shapes do not fit; nothing to predict, or no kernel to do it with; negative or infinite times;
        velocities without momentum.
      RuntimeError: ``max_steps`` are not enough; there is no limit at ``t=None``. Also inside ``jax.jit``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nt_predict import gradient_descent
      >>> def cross_entropy(fx, y):
      ...     return -jnp.mean(jnp.sum(jax.nn.log_softmax(fx) * y, axis=-1))
      >>> predict_fn = gradient_descent(cross_entropy, jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.eye(2))
      >>> fx_train, fx_test = predict_fn(jnp.array([0.0, 4.0]), 0.0, 0.0, k_test_train=jnp.array([[1.0, 0.0]]))
      >>> print(fx_train.shape, jax.nn.softmax(fx_test[1]).round(2))
      (2, 2, 2) [[0.79 0.21]]
    """
    dual_flow = _dual_flow()
    layout = OutputLayout.of(y_train, trace_axes)
    kernel = layout.train_train(k_train_train, "k_train_train")
    dtype, y = kernel.dtype, jnp.asarray(y_train)
    _check_loss(loss, y, dtype)
    if not is_traced(kernel) and not jnp.isfinite(kernel).all():
        raise ValueError("The train-train kernel is infinite or not a number somewhere.")
    known = not (is_traced(momentum) or is_traced(learning_rate))
    if momentum is not None and known and not (0 <= momentum < 1 and learning_rate > 0):
        raise ValueError(
            f"`momentum` must be in [0, 1), or None, with a positive learning rate, but `momentum` is {momentum} "
            f"and `learning_rate` is {learning_rate}."
        )
    default = 1e-8 if dtype == jnp.float64 else 1e-5
    rtol, atol = (default if given is None else given for given in (rtol, atol))

    def predict_fn(
        t: Any = None, fx_train_or_state_0: Any = 0.0, fx_test_0: Any = None, k_test_train: Any = None
    ) -> Any:
        state = _state(fx_train_or_state_0, fx_test_0, momentum)
        if state.fx_train is None and state.fx_test is None:
            raise ValueError("Both the training and the test outputs are None: there is nothing to predict.")
        if state.fx_test is not None and k_test_train is None:
            raise ValueError("Initial outputs at test points ask for predictions there, which need `k_test_train`.")

        kernels, positions = [kernel], [layout.train_positions]
        if state.fx_test is not None:
            test_train, test_positions = layout.test_train(k_test_train, dtype, "k_test_train")
            kernels, positions = [kernel, test_train], [layout.train_positions, test_positions]

        def rows(train, test, kind):
            parts = zip((train, test), positions, ("train", "test"), strict=False)
            return jnp.concatenate(
                [layout.outputs_to_matrix(0.0 if x is None else x, p, dtype, f"{kind}_{name}") for x, p, name in parts]
            )

        def outputs(matrix, leading):
            if matrix is None:
                return None, None
            n = len(kernel)
            train = layout.matrix_to_outputs(matrix[..., :n, :], positions[0], leading)
            if state.fx_test is None:
                return train, None
            return train, layout.matrix_to_outputs(matrix[..., n:, :], positions[1], leading)

        flow = dual_flow.Flow(jnp.concatenate(kernels), rows(state.fx_train, state.fx_test, "fx"), None, None, y)
        times, leading = flow_times(t, learning_rate, 1, dtype)
        if momentum is not None:
            root = jnp.sqrt(jnp.asarray(learning_rate, dtype))
            times = None if times is None else times / root
            flow = flow._replace(
                velocities=rows(state.qx_train, state.qx_test, "qx"), growth=jnp.asarray((momentum - 1) / root, dtype)
            )

        if times is None:
            fx, found = dual_flow.limit(loss, layout, flow)
            fx = dual_flow.require(found, fx, _NO_LIMIT)
            qx = None if momentum is None else jnp.zeros_like(fx)
        else:
            if not is_traced(times) and not jnp.isfinite(times).all():
                raise ValueError("`t` must be finite; the limit of infinite time is `t=None`.")
            largest = jnp.maximum(jnp.abs(flow.outputs).max(), jnp.abs(y).max().astype(dtype))
            show = progress and is_watched(times, *jax.tree.leaves(flow))
            with PERCENTAGE.shown("gradient descent") if show else contextlib.nullcontext():
                fx, qx, successful = jax.block_until_ready(
                    dual_flow.integrate(
                        loss,
                        layout,
                        dual_flow.DEFAULT_SOLVER if solver is None else solver,
                        max_steps,
                        show,
                        flow,
                        times,
                        atol + rtol * largest,
                    )
                )
            fx = dual_flow.require(
                successful,
                fx,
                f"{max_steps} steps are not enough to reach `t`: increase `max_steps` or the tolerances, or, for the "
                "end of training, give `t=None`.",
            )

        (train, test), (train_velocity, test_velocity) = outputs(fx, leading), outputs(qx, leading)
        if isinstance(fx_train_or_state_0, ODEState):
            return ODEState(train, test, train_velocity, test_velocity)
        if state.fx_train is None:
            return test
        return train if state.fx_test is None else (train, test)

    return predict_fn


def _dual_flow() -> Any:
    """Returns the module that needs diffrax."""
    try:
        return importlib.import_module("nt_predict._dual_flow")
    except ImportError as error:
        raise ImportError(
            f"`gradient_descent` needs {error.name}, which is not installed: pip install 'nt-predict[diffrax]'"
        ) from error


def _check_loss(loss: Loss, y: jax.Array, dtype: Any) -> None:
    result = jax.eval_shape(loss, jax.ShapeDtypeStruct(y.shape, dtype), y)
    if getattr(result, "shape", None) != () or not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(
            f"`loss(fx, y_train)` must be a real scalar for outputs and labels of shape {y.shape}, but is {result}. "
            "Take the sum or the mean over training points."
        )


def _state(fx_train_or_state_0: Any, fx_test_0: Any, momentum: float | None) -> ODEState:
    if not isinstance(fx_train_or_state_0, ODEState):
        return ODEState(fx_train_or_state_0, fx_test_0)
    state = fx_train_or_state_0
    if fx_test_0 is not None:
        raise ValueError("`fx_test_0` must be None if an `ODEState` is given: its `fx_test` are the test outputs.")
    if momentum is None and (state.qx_train is not None or state.qx_test is not None):
        raise ValueError("The state has velocities `qx_train` or `qx_test`, but `gradient_descent` has no `momentum`.")
    return state
