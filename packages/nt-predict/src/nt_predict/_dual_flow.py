"""Gradient flow on any loss, in coordinates of which there are as many as training outputs.

Outputs at any points under gradient flow are `f_t = f_0 - K a_t`, where the coefficients `a_t`, (train, columns), are
the integral of the loss's gradient at the training outputs. Only they are integrated: test points cost a product. With
momentum, `b_t = da_t/dt` decays at a constant rate beside, and initial velocities `q_0` of the outputs die out by
themselves.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox
import jax
import jax.numpy as jnp
from nt_core.tracing import is_traced

from nt_predict._layout import OutputLayout, symmetric
from nt_predict._spectral import decompose, einsum, phi

Loss = Callable[[jax.Array, jax.Array], Any]

# Iterations to the minimum of a loss; from any start some ten are enough, if there is one.
_MAX_NEWTON_STEPS = 100


class Flow(NamedTuple):
    """Outputs at training points, and after them test points, before training, and how they will move.

    Attributes:
      kernel: (points, train).
      outputs: (points, columns).
      velocities: (points, columns); None without momentum.
      growth: (), the rate of velocities without a force, (momentum - 1) / sqrt(learning_rate).
      labels: of the shape of the training outputs.
    """

    kernel: jax.Array
    outputs: jax.Array
    velocities: Any  # an array or None
    growth: Any
    labels: jax.Array

    @property
    def n_train(self) -> int:
        """Rows of the training points."""
        return self.kernel.shape[1]

    def coast(self, time: jax.Array | None) -> jax.Array:
        """Returns the outputs that there would be without a force; time None is infinity."""
        if self.velocities is None:
            return self.outputs
        distance = -1 / self.growth if time is None else time * phi(-self.growth * time)
        return self.outputs + distance * self.velocities


@partial(jax.jit, static_argnames=("loss", "layout", "max_steps"))
def integrate(
    loss: Loss,
    layout: OutputLayout,
    max_steps: int,
    flow: Flow,
    times: jax.Array,
    tolerance: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Returns outputs, velocities, each (times, points, columns), and whether `max_steps` were enough.

    Args:
      loss, layout: the loss of outputs in this layout and labels.
      max_steps: between two times.
      flow: what is to be integrated.
      times: (times,), finite, at least 0, in any order.
      tolerance: (), the largest error of an output in one step.
    """
    n = flow.n_train

    def velocity(time: Any, state: Any) -> Any:
        outputs = flow.coast(time)[:n] - einsum("ij,jk->ik", flow.kernel[:n], state[0])
        force = _gradient(loss, layout, outputs, flow.labels)
        return (force,) if flow.growth is None else (state[1], flow.growth * state[1] + force)

    def error_of_outputs(state):
        # An error of coefficients matters as far as outputs show it.
        return jnp.stack([jnp.abs(einsum("ij,jk->ik", flow.kernel, part)).max() for part in state]).max() / tolerance

    controller = diffrax.PIDController(rtol=0.0, atol=1.0, norm=error_of_outputs)

    def advance(state, interval):
        # A step ends at each time: interpolation between steps would lose digits, and derivatives by the time.
        start, end = interval

        def scaled(fraction: Any, state: Any, _: Any) -> Any:
            change = velocity(start + fraction * (end - start), state)
            return jax.tree.map(lambda part: (end - start) * part, change)

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(scaled),
            diffrax.Tsit5(),
            jnp.zeros((), times.dtype),
            jnp.ones((), times.dtype),
            None,
            state,
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(t1=True),
            max_steps=max_steps,
            throw=False,
        )
        state = jax.tree.map(lambda part: part[0], solution.ys)
        return state, (state, solution.result == diffrax.RESULTS.successful)

    order = jnp.argsort(times)
    ends = times[order]
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    at_rest = jnp.zeros_like(flow.outputs[:n])
    state = (at_rest,) if flow.growth is None else (at_rest, at_rest)
    with jax.numpy_rank_promotion("allow"):  # which the solvers use
        _, (states, successful) = jax.lax.scan(advance, state, (starts, ends))
    states = [part[jnp.argsort(order)] for part in states]
    outputs = jax.vmap(flow.coast)(times) - einsum("ij,tjk->tik", flow.kernel, states[0])
    if flow.growth is None:
        return outputs, None, successful.all()
    remaining = jnp.exp(flow.growth * times)[:, None, None] * flow.velocities[None]
    return outputs, remaining - einsum("ij,tjk->tik", flow.kernel, states[1]), successful.all()


def _gradient(loss: Loss, layout: OutputLayout, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jax.grad(partial(_loss_of_matrix, loss, layout))(outputs, labels)


def _loss_of_matrix(loss: Loss, layout: OutputLayout, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return loss(layout.matrix_to_outputs(outputs, layout.train_positions, ()), labels)


@partial(jax.jit, static_argnames=("loss", "layout"))
def limit(loss: Loss, layout: OutputLayout, flow: Flow) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs after infinite time, (points, columns), and whether that limit was found.

    It is where the flow ends that starts at `flow.outputs`: the minimum of the loss that can be reached with
    coefficients in the span of gradients. Steps are those of the implicit Euler method, linearised, at growing length
    (pseudo-transient continuation): in the end those of Newton. They stay in that span, where a kernel or a loss has
    directions in which it is constant.
    """
    n = flow.n_train
    constant = jax.lax.stop_gradient(flow)
    start = flow.coast(None)
    shape = (n, flow.outputs.shape[1])
    size = n * shape[1]
    value = partial(_loss_of_matrix, loss, layout)
    eps = jnp.finfo(start.dtype).eps

    def outputs_at(flow, start, coefficients):
        return start[:n] - einsum("ij,jk->ik", flow.kernel[:n], coefficients)

    def curvature_at(outputs):
        return jax.hessian(value)(outputs, constant.labels).reshape(size, size)

    def direction(curvature, gradient, length):
        """Returns the change of coefficients in one step, by the linear system of the gradient flow of parameters."""
        matrix = jnp.eye(size, dtype=gradient.dtype) / length + einsum("ai,ab,bj->ij", moves, curvature, moves)
        change = jnp.linalg.solve(matrix, einsum("ai,a->i", moves, gradient.ravel()))
        return einsum("ai,i->a", basis, change).reshape(shape)

    fixed_start = jax.lax.stop_gradient(start)
    first_curvature = curvature_at(fixed_start[:n])
    # Coefficients change along orthonormal parameters, without those that loss or kernel do not depend on: there long
    # steps would only amplify rounding errors.
    vectors, _ = _range(first_curvature)
    full_kernel = jnp.kron(constant.kernel[:n], jnp.eye(shape[1], dtype=start.dtype))
    rotation, values = _range(symmetric(einsum("ai,ab,bj->ij", vectors, full_kernel, vectors)))
    basis = einsum("ai,ij->aj", vectors, rotation) / values[None] ** 0.5
    moves = einsum("ab,bi->ai", full_kernel, basis)
    scale = jnp.abs(first_curvature).sum(1).max() * jnp.abs(constant.kernel[:n]).sum(1).max()
    # Beyond this length rounding errors of the solution would exceed what is still missing of a Newton step.
    longest = eps ** (-2 / 3) / scale

    first_loss = value(fixed_start[:n], constant.labels)

    def step(carry: Any) -> Any:
        coefficients, outputs, loss_now, length, _, count = carry
        change = direction(
            curvature_at(outputs), jax.grad(value)(outputs, constant.labels), jnp.minimum(length, longest)
        )
        proposal = outputs_at(constant, fixed_start, coefficients + change)
        loss_next = value(proposal, constant.labels)
        moved = jnp.abs(proposal - outputs).max() / (jnp.abs(outputs).max() + jnp.abs(constant.labels).max() + eps)
        # Rounding errors of the loss are no reason to refuse a step.
        accepted = loss_next <= loss_now + 8 * eps * (jnp.abs(loss_now) + jnp.abs(first_loss))
        done = accepted & (moved < eps ** (2 / 3)) & (length >= longest)
        keep = partial(jnp.where, accepted)
        return (
            keep(coefficients + change, coefficients),
            keep(proposal, outputs),
            keep(loss_next, loss_now),
            jnp.where(accepted, 10 * length, length / 10),
            done,
            count + 1,
        )

    def unfinished(carry):
        return ~carry[4] & (carry[5] < _MAX_NEWTON_STEPS)

    initial = (
        jnp.zeros(shape, start.dtype),
        fixed_start[:n],
        first_loss,
        1 / scale,
        jnp.asarray(False),
        0,
    )
    coefficients, outputs, _, _, found, _ = jax.lax.while_loop(unfinished, step, initial)
    curvature = curvature_at(outputs)
    # A loss that is constant in more directions than at the start has other minima: the limit depends on the way.
    spectrum, first = jnp.linalg.eigvalsh(curvature), jnp.linalg.eigvalsh(first_curvature)
    noise = eps**0.75 * first[-1]
    convex = (spectrum[0] > -noise) & (first[0] > -noise)
    found &= convex & ((spectrum > noise).sum() >= (first > noise).sum())
    # One more step, which derivatives can pass: those of a solution are those of one Newton step from it.
    gradient = jax.grad(value)(outputs_at(flow, start, coefficients), flow.labels)
    coefficients += direction(curvature, gradient, longest)
    return start - einsum("ij,jk->ik", flow.kernel, coefficients), found


def _range(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the eigenvectors of positive eigenvalues, in columns, and these; others are zeros, and ones."""
    spectrum = decompose(matrix)
    positive = spectrum.values > spectrum.noise * spectrum.scale
    return jnp.where(positive[None], spectrum.vectors, 0), jnp.where(positive, spectrum.values, 1)


def require(condition: jax.Array, values: Any, message: str) -> Any:
    """Returns the values, or raises `RuntimeError`: at once if the condition is known, else when it is computed."""
    if is_traced(condition):
        return equinox.error_if(values, ~condition, message)
    if not condition:
        raise RuntimeError(message)
    return values
