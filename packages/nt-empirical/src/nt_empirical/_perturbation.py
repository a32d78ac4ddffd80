"""A network as a function of perturbations, one at each place where its parameters enter."""

import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from nt_core.manual import varying, varying_axes

from nt_empirical._equations import CALLS, closed, evaluated, scanned, state_of_scan
from nt_empirical._inside import outside_branch, outside_loop
from nt_empirical._rules import RULES, is_arrangement, split
from nt_empirical._uses import Use, dtype_of

# Outputs of an equation, and what is inside, from perturbations.
Evaluate = Callable[[list[jax.Array] | None], tuple[list[Any], "Inside"]]


class Weights(NamedTuple):
    """A value that is linear in one parameter."""

    value: jax.Array
    use: Use


class Perturbed:
    """A function of parameters as one of perturbations, which are added wherever a parameter has entered.

    Attributes:
      zeros: perturbations of 0.
    """

    def __init__(self, f: Callable[[list[jax.Array]], Any], weights: Sequence[jax.Array]):
        self._weights = [jnp.asarray(w) for w in weights]
        self._jaxpr, shapes = jax.make_jaxpr(f, return_shape=True)(list(weights))
        self._structure = jax.tree.structure(shapes)
        self._found_inside: dict[Any, Inside] = {}
        found: list[Any] = []

        def collect() -> None:
            found.extend(jax.typeof(value) for value in self._evaluate(None).perturbed)

        jax.eval_shape(collect)
        self.zeros = [varying(jnp.zeros(v.shape, v.dtype), varying_axes(v)) for v in found]

    def __call__(self, perturbations: list[jax.Array]) -> tuple[Any, list[tuple[Use, ...]]]:
        """Returns the outputs, and for every perturbation how changes of parameters change the value it is added to."""
        evaluation = self._evaluate(perturbations)
        return self._structure.unflatten(evaluation.outputs), evaluation.uses

    def _evaluate(self, perturbations: list[jax.Array] | None) -> "_Evaluation":
        evaluation = _Evaluation(perturbations, self._found_inside)
        inputs = [Weights(w, Use.of(i, w)) for i, w in enumerate(self._weights)]
        outputs = evaluation.run(self._jaxpr.jaxpr, self._jaxpr.consts, inputs)
        evaluation.outputs = [evaluation.plain(y) for y in outputs]
        return evaluation


class Inside(NamedTuple):
    """What is found inside of an equation, whose inputs are the parameters there.

    Attributes:
      uses: by each value that is perturbed.
      perturbed: these values, where there are no perturbations yet; otherwise none.
    """

    uses: list[tuple[Use, ...]]
    perturbed: list[jax.Array]


class _Evaluation:
    """Evaluates a jaxpr equation by equation, with perturbations; without, the values that would be perturbed count.

    `found_inside` keeps the shapes of what was found inside of equations, which need not be traced again for each level
    of loops and branches around them.
    """

    def __init__(self, perturbations: list[jax.Array] | None, found_inside: dict[Any, Inside]):
        self._perturbations = perturbations
        self._found_inside = found_inside
        self.perturbed: list[jax.Array] = []
        self.uses: list[tuple[Use, ...]] = []
        self.outputs: list[jax.Array] = []

    def perturb(self, value: jax.Array, uses: Sequence[Use]) -> jax.Array:
        """Adds the next perturbation to a value, which changes with parameters as `uses` say."""
        self.perturbed.append(value)
        self.uses.append(tuple(uses))
        return value if self._perturbations is None else value + self._perturbations[len(self.uses) - 1]

    def plain(self, value: Any) -> Any:
        """Returns a value that is perturbed itself if it was linear in a parameter."""
        return self.perturb(value.value, [value.use]) if isinstance(value, Weights) else value

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """Returns the outputs of a jaxpr, of inputs and with outputs that may be `Weights`."""
        known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        plain: dict[Any, Any] = {}  # perturbed parameters: of each one, for all equations that no rule is for

        def read(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else known[var]

        def read_plain(var: Any) -> Any:
            if not isinstance(value := read(var), Weights):
                return value
            if var not in plain:
                plain[var] = self.plain(value)
            return plain[var]

        for equation in jaxpr.eqns:
            values = [read(var) for var in equation.invars]
            outputs = None
            if any(isinstance(v, Weights) for v in values):
                outputs = self._with_rule(equation, values, read_plain, jaxpr)
            if outputs is None:
                outputs = evaluated(equation, [read_plain(var) for var in equation.invars], jaxpr)
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _with_rule(
        self, equation: JaxprEqn, inputs: list[Any], read_plain: Callable[[Any], Any], jaxpr: Jaxpr
    ) -> list[Any] | None:
        """Returns the outputs of an equation that takes parameters, or None if there is no rule for it."""
        name = equation.primitive.name
        if name in CALLS:
            called = closed(equation.params[CALLS[name]])
            return self.run(called.jaxpr, called.consts, inputs)
        if name == "scan":
            return self._loop(equation, inputs, read_plain)
        if name == "cond":
            return self._branches(equation, inputs, read_plain)
        weights = {i: value.use for i, value in enumerate(inputs) if isinstance(value, Weights)}
        values = [value.value if isinstance(value, Weights) else value for value in inputs]
        if name in ("split", "unstack"):
            slices = split(weights[0], equation)
            return None if slices is None else list(map(Weights, evaluated(equation, values, jaxpr), slices))
        if name not in RULES or not jnp.issubdtype(dtype_of(equation.outvars[0]), jnp.floating):
            return None
        found = [RULES[name](use, i, values, equation) for i, use in weights.items()]
        uses = [use for use in found if use is not None]
        if len(uses) != len(found):
            return None
        (output,) = evaluated(equation, values, jaxpr)
        if len(uses) == 1 and is_arrangement(name, uses[0]):
            return [Weights(output, uses[0])]
        return [self.perturb(output, uses)]

    def _loop(self, equation: JaxprEqn, inputs: list[Any], read_plain: Callable[[Any], Any]) -> list[Any] | None:
        """Returns the outputs of a `scan`, as `_with_rule`."""
        first, last = state_of_scan(equation)
        body = closed(equation.params["jaxpr"])
        # What goes from round to round is no parameter any more.
        uses = {i: v.use for i, v in enumerate(inputs) if isinstance(v, Weights) and not first <= i < last}
        if not uses:
            return None
        values = [value.value if isinstance(value, Weights) else value for value in inputs]
        values[first:last] = [read_plain(var) for var in equation.invars[first:last]]

        def rounds(perturbations: list[jax.Array] | None) -> tuple[list[Any], Inside]:
            return scanned(
                equation,
                values,
                lambda given, of_round: self._inside(body, given, uses, of_round),
                perturbations,
            )

        return self._enter(
            self._shapes(equation, 0, uses, rounds),
            rounds,
            lambda use, value: outside_loop(uses[use.parameter], use, value, sliced=use.parameter >= last),
        )

    def _branches(self, equation: JaxprEqn, inputs: list[Any], read_plain: Callable[[Any], Any]) -> list[Any] | None:
        """Returns the outputs of a `cond` or `switch`, as `_with_rule`."""
        uses = {i: value.use for i, value in enumerate(inputs[1:]) if isinstance(value, Weights)}
        # Under `shard_map`, what is 0 in other branches would have to vary over devices as it does here; branches for
        # platforms are chosen when a program is compiled.
        manual = jax.sharding.get_abstract_mesh().manual_axes
        if not uses or manual or equation.params.get("branches_platforms") is not None:
            return None
        which = read_plain(equation.invars[0])
        values = [value.value if isinstance(value, Weights) else value for value in inputs[1:]]
        branches = [functools.partial(self._inside, closed(b), values, uses) for b in equation.params["branches"]]
        shapes = [self._shapes(equation, number, uses, branch) for number, branch in enumerate(branches)]
        starts = [0, *itertools.accumulate(len(inside.uses) for inside in shapes)]
        perturbed = [shape for inside in shapes for shape in inside.perturbed]

        def chosen(perturbations: list[jax.Array] | None) -> tuple[list[Any], Inside]:
            def branch(number: int) -> tuple[list[Any], list[list[jax.Array]]]:
                own = None if perturbations is None else perturbations[starts[number] : starts[number + 1]]
                outputs, found = branches[number](own)
                # Those of other branches do not count, for their perturbations change nothing.
                factors = [[jnp.zeros(s.shape, s.dtype) for s in jax.tree.leaves(inside.uses)] for inside in shapes]
                factors[number] = jax.tree.leaves(found.uses)
                return outputs, factors

            outputs, factors = jax.lax.switch(which, [functools.partial(branch, i) for i in range(len(branches))])
            found = [
                jax.tree.structure(inside.uses).unflatten(leaves)
                for inside, leaves in zip(shapes, factors, strict=True)
            ]
            values = [jnp.zeros(shape.shape, shape.dtype) for shape in perturbed] if perturbations is None else []
            return outputs, Inside([*itertools.chain(*found)], values)

        return self._enter(
            Inside([*itertools.chain(*(inside.uses for inside in shapes))], perturbed),
            chosen,
            lambda use, value: outside_branch(uses[use.parameter], use, value),
        )

    def _inside(
        self,
        jaxpr: ClosedJaxpr,
        values: Sequence[Any],
        numbers: Collection[int],
        perturbations: list[jax.Array] | None,
    ) -> tuple[list[Any], Inside]:
        """Returns the outputs of a jaxpr inside of an equation; the inputs with these numbers are parameters."""
        evaluation = _Evaluation(perturbations, self._found_inside)
        inputs = [Weights(v, Use.of(i, jnp.asarray(v))) if i in numbers else v for i, v in enumerate(values)]
        outputs = [evaluation.plain(y) for y in evaluation.run(jaxpr.jaxpr, jaxpr.consts, inputs)]
        return outputs, Inside(evaluation.uses, evaluation.perturbed if perturbations is None else [])

    def _shapes(self, equation: JaxprEqn, branch: int, uses: Collection[int], evaluate: Evaluate) -> Inside:
        """Returns the shapes of what `evaluate` finds inside of an equation, where these inputs are parameters."""
        # The equation is part of the network's jaxpr, which outlives this dictionary.
        key = id(equation), branch, frozenset(uses)
        if key not in self._found_inside:
            self._found_inside[key] = jax.eval_shape(lambda: evaluate(None)[1])
        return self._found_inside[key]

    def _enter(self, shapes: Inside, evaluate: Evaluate, outside: Callable[[Use, Any], Use | None]) -> list[Any] | None:
        """Returns what `evaluate` does for the next perturbations, inside of an equation, and adds them to those here.

        Returns None if a use inside is no use `outside`.
        """
        inside = list(zip(shapes.uses, shapes.perturbed, strict=True))
        if any(outside(use, value) is None for uses, value in inside for use in uses):
            return None
        first = len(self.uses)
        given = None if self._perturbations is None else self._perturbations[first : first + len(inside)]
        outputs, found = evaluate(given)
        self.perturbed += found.perturbed
        for uses, value in zip(found.uses, shapes.perturbed, strict=True):
            self.uses.append(tuple(outside(use, value) for use in uses))  # type: ignore[arg-type]
        return outputs
