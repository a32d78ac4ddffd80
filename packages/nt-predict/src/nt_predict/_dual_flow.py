"""Gradient flow on any loss, in coordinates of which there are as many as training outputs.

Outputs at any points under gradient flow are `f_t = f_0 - K a_t`, where the coefficients `a_t`, (train, columns), are
the integral of the loss's gradient at the training outputs. Only they are integrated: test points cost a product. With
momentum, `b_t = da_t/dt` decays at a constant rate beside, and initial velocities `q_0` of the outputs die out by
themselves.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffrax
import equinox
import jax
import jax.numpy as jnp
from nt_core.tracing import is_traced

from nt_predict._layout import OutputLayout, symmetric
from nt_predict._percentage import PERCENTAGE
from nt_predict._spectral import decompose, einsum, phi

Loss = Callable[[jax.Array, jax.Array], Any]

DEFAULT_SOLVER = diffrax.Tsit5()

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


@partial(jax.jit, static_argnames=("loss", "layout", "solver", "max_steps", "show"))
def integrate(
    loss: Loss,
    layout: OutputLayout,
    solver: diffrax.AbstractSolver,
    max_steps: int,
    show: bool,
    flow: Flow,
    times: jax.Array,
    tolerance: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Returns outputs, velocities, each (times, points, columns), and whether `max_steps` were enough.

    Args:
      loss, layout: the loss of outputs in this layout and labels.
      solver: what takes the steps.
      max_steps: between two times.
      show: whether to say how far it is, in `PERCENTAGE`.
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
            solver,
            jnp.zeros((), times.dtype),
            jnp.ones((), times.dtype),
            None,
            state,
            stepsize_controller=controller,
            saveat=diffrax.SaveAt(t1=True),
            max_steps=max_steps,
            throw=False,
            progress_meter=_Meter(start / last, end / last) if show else diffrax.NoProgressMeter(),
        )
        state = jax.tree.map(lambda part: part[0], solution.ys)
        return state, (state, solution.result == diffrax.RESULTS.successful)

    order = jnp.argsort(times)
    ends = times[order]
    last = jnp.where(ends[-1] > 0, ends[-1], 1)
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


class _Meter(diffrax.AbstractProgressMeter):
    """Says how much of all times is over, on the host, whenever that is one per cent more.

    Attributes:
      start, stop: the shares of all times at which an interval begins and ends.
    """

    start: Any
    stop: Any

    def init(self) -> Any:
        """Returns the per cent that were shown."""
        return jnp.floor(100 * self.start).astype(int)

    def step(self, state: Any, progress: Any) -> Any:
        """Shows those that there are."""
        reached = jnp.floor(100 * (self.start + (self.stop - self.start) * progress)).astype(int)
        jax.lax.cond(reached > state, lambda: jax.debug.callback(PERCENTAGE.reach, reached), lambda: None)
        return jnp.maximum(reached, state)

    def close(self, state: Any) -> None:
        """Does nothing: other intervals may follow."""


def _gradient(loss: Loss, layout: OutputLayout, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jax.grad(partial(_loss_of_matrix, loss, layout))(outputs, labels)


def _loss_of_matrix(loss: Loss, layout: OutputLayout, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return loss(layout.matrix_to_outputs(outputs, layout.train_positions, ()), labels)


@partial(jax.jit, static_argnames=("loss", "layout"))
def limit(loss: Loss, layout: OutputLayout, flow: Flow) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs after infinite time, (points, columns), and whether that limit was found.

    It is where the flow ends that starts at `flow.outputs`: the minimum of the loss that can be reached with
    coefficients in the span of gradients.
    """
    n = flow.n_train
    search = _Search.of(loss, layout, jax.lax.stop_gradient(flow))
    coefficients, outputs, found = search.minimum()
    found &= search.is_only_minimum(outputs)
    # One more step, which derivatives can pass: those of a solution are those of one Newton step from it.
    start = flow.coast(None)
    reached = start[:n] - einsum("ij,jk->ik", flow.kernel[:n], coefficients)
    gradient = _gradient(loss, layout, reached, flow.labels)
    coefficients += search.change(search.curvature(outputs), gradient, search.longest)
    return start - einsum("ij,jk->ik", flow.kernel, coefficients), found


@dataclasses.dataclass(frozen=True)
class _Search:
    """The way to the minimum of a loss.

    Steps are those of the implicit Euler method, linearised, at growing length (pseudo-transient continuation): in the
    end those of Newton. They stay in the span of gradients, where a kernel or a loss has directions in which it is
    constant. Coefficients change along orthonormal parameters, without those that loss or kernel do not depend on:
    there long steps would only amplify rounding errors.

    Attributes:
      loss: of training outputs, (train, columns), and labels.
      kernel: (train, train).
      start: the training outputs at the start.
      labels: of the shape of the training outputs.
      first_curvature: the Hessian of the loss there.
      basis: the coefficients that each parameter stands for, in columns.
      moves: the changes of outputs that they make.
      shortest, longest: lengths of steps. Beyond the longest, rounding errors of the solution would exceed what is
        still missing of a Newton step.
    """

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    kernel: jax.Array
    start: jax.Array
    labels: jax.Array
    first_curvature: jax.Array
    basis: jax.Array
    moves: jax.Array
    shortest: jax.Array
    longest: jax.Array

    @classmethod
    def of(cls, loss: Loss, layout: OutputLayout, flow: Flow) -> "_Search":
        """Prepares the search from the outputs of a flow."""
        n = flow.n_train
        kernel, start = flow.kernel[:n], flow.coast(None)[:n]
        value = partial(_loss_of_matrix, loss, layout)
        curvature = _curvature(value, start, flow.labels)
        vectors, _ = _range(curvature)
        full_kernel = jnp.kron(kernel, jnp.eye(start.shape[1], dtype=start.dtype))
        rotation, values = _range(symmetric(einsum("ai,ab,bj->ij", vectors, full_kernel, vectors)))
        basis = einsum("ai,ij->aj", vectors, rotation) / values[None] ** 0.5
        scale = jnp.abs(curvature).sum(1).max() * jnp.abs(kernel).sum(1).max()
        longest = jnp.finfo(start.dtype).eps ** (-2 / 3) / scale
        moves = einsum("ab,bi->ai", full_kernel, basis)
        return cls(value, kernel, start, flow.labels, curvature, basis, moves, 1 / scale, longest)

    def curvature(self, outputs: jax.Array) -> jax.Array:
        """Returns the Hessian of the loss at some outputs."""
        return _curvature(self.loss, outputs, self.labels)

    def change(self, curvature: jax.Array, gradient: jax.Array, length: jax.Array) -> jax.Array:
        """Returns the change of coefficients in one step, by the linear system of the gradient flow of parameters."""
        identity = jnp.eye(len(curvature), dtype=gradient.dtype)
        matrix = identity / length + einsum("ai,ab,bj->ij", self.moves, curvature, self.moves)
        solution = jnp.linalg.solve(matrix, einsum("ai,a->i", self.moves, gradient.ravel()))
        return einsum("ai,i->a", self.basis, solution).reshape(gradient.shape)

    def minimum(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the coefficients and the outputs where steps end, and whether they have ended."""
        first_loss, eps = self.loss(self.start, self.labels), jnp.finfo(self.start.dtype).eps

        def step(carry: Any) -> Any:
            coefficients, outputs, loss_now, length, _, count = carry
            gradient = jax.grad(self.loss)(outputs, self.labels)
            change = self.change(self.curvature(outputs), gradient, jnp.minimum(length, self.longest))
            proposal = self.start - einsum("ij,jk->ik", self.kernel, coefficients + change)
            loss_next = self.loss(proposal, self.labels)
            moved = jnp.abs(proposal - outputs).max() / (jnp.abs(outputs).max() + jnp.abs(self.labels).max() + eps)
            # Rounding errors of the loss are no reason to refuse a step.
            accepted = loss_next <= loss_now + 8 * eps * (jnp.abs(loss_now) + jnp.abs(first_loss))
            keep = partial(jnp.where, accepted)
            return (
                keep(coefficients + change, coefficients),
                keep(proposal, outputs),
                keep(loss_next, loss_now),
                jnp.where(accepted, 10 * length, length / 10),
                accepted & (moved < eps ** (2 / 3)) & (length >= self.longest),
                count + 1,
            )

        def unfinished(carry):
            return ~carry[4] & (carry[5] < _MAX_NEWTON_STEPS)

        initial = (jnp.zeros_like(self.start), self.start, first_loss, self.shortest, jnp.asarray(False), 0)
        coefficients, outputs, _, _, found, _ = jax.lax.while_loop(unfinished, step, initial)
        return coefficients, outputs, found

    def is_only_minimum(self, outputs: jax.Array) -> jax.Array:
        """Whether the loss is convex at the start and at a minimum, which does not depend on the way there.

        With a loss that is constant in more directions than at the start there are other minima.
        """
        first, last = jnp.linalg.eigvalsh(self.first_curvature), jnp.linalg.eigvalsh(self.curvature(outputs))
        noise = jnp.finfo(first.dtype).eps ** 0.75 * first[-1]
        convex = (last[0] > -noise) & (first[0] > -noise)
        return convex & ((last > noise).sum() >= (first > noise).sum())


def _curvature(loss: Callable[[jax.Array, jax.Array], jax.Array], outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The Hessian of a loss, (size, size) for outputs of so many numbers."""
    return jax.hessian(loss)(outputs, labels).reshape(outputs.size, outputs.size)


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
