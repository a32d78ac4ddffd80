"""How the covariance rules of layers are applied, one after another.

A rule that is data (`emit`) is collected with its neighbours into one program, so that a backend can run them fused. A
rule that is only a function of materialised kernels, and every rule while masks are around, is applied on its own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from nt_core import backends
from nt_core.backends import Implementation, Request
from nt_core.kernel import Kernel
from nt_core.program import Builder, Program, Value
from nt_core.requirements import NO_REQUIREMENTS, Requirements, check
from nt_core.sources import Inputs, Source
from nt_core.steps import Step
from nt_core.trees import nt_tree_leaves, nt_tree_map

Emit = Callable[[Builder, Any], Any]


class NoStep(Exception):
    """What a layer does to these values is no step: it ends the program."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What one layer does to covariances.

    Attributes:
      name: of the layer, for messages.
      requirements: what it asks of incoming kernels.
      emit: appends the layer's steps to a program: `emit(builder, values) -> values`, with trees of `Value`. Raises
        `NoStep` where `function` has to be used.
      function: `function(kernels, run) -> kernels`, on trees of materialised `Kernel`s; keywords of the user are in
        `run.kwargs`. A rule has `emit`, `function`, or both; then they agree, and `function` is the one that knows
        about masks.
      mask_fn: `mask_fn(mask, shape) -> mask` of the outputs; None leaves masks to `function`.
      remask: the kernel has to be zeroed at masked positions afterwards.
      init_fn: gives the output shape where `function` cannot know it.
    """

    name: str
    requirements: Requirements = dataclasses.field(default_factory=lambda: NO_REQUIREMENTS)
    emit: Emit | None = None
    function: Callable[..., Any] | None = None
    mask_fn: Callable[[Any, Any], Any] | None = None
    remask: bool = False
    init_fn: Callable[..., Any] | None = None


def step_rule(
    step: Step, requirements: Requirements = NO_REQUIREMENTS, function: Callable[..., Any] | None = None
) -> Rule:
    """The rule of a layer that is one step. `function`, if given, is what is used on kernels with masks."""
    return Rule(
        name=type(step).__name__,
        requirements=requirements,
        emit=lambda builder, value: builder.add(step, value),
        function=function,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """What holds for one call of a kernel function, whatever the layer.

    Attributes:
      request: what is to be computed.
      implementation: backend, or backends in order of preference.
      kwargs: keywords of the user.
    """

    request: Request
    implementation: Implementation
    kwargs: dict[str, Any]


class Collected(NamedTuple):
    """Layers as one program.

    Attributes:
      program: what they do.
      sources: what it starts from.
      values: tree of the values that it returns.
      n_rules: number of layers.
    """

    program: Program
    sources: list[Source]
    values: Any
    n_rules: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """Layers that are applied together, as one program; or one layer on its own.

    Attributes:
      rules: of the layers.
      state: tree of sources.
      run: what is asked of this stage.
      collected: the program, or None for a layer on its own.
    """

    rules: Sequence[Rule]
    state: Any
    run: Run
    collected: Collected | None

    def apply(self) -> Any:
        """Returns a tree of kernels."""
        if self.collected is None:
            return _apply_one(self.rules[0], self.state, self.run)
        return _execute(self.collected, self.run)


def apply_rules(rules: Sequence[Rule], state: Any, run: Run) -> Any:
    """Carries a tree of sources through layers. Returns a tree of `Kernel`s."""
    while rules:
        stage, rules = first_stage(rules, state, run)
        state = stage.apply()
    return nt_tree_map(lambda source: materialise(source, run.request.ntk), state)


def first_stage(rules: Sequence[Rule], state: Any, run: Run) -> tuple[Stage, Sequence[Rule]]:
    """Returns the layers that are to be applied first, as many as there can be, and those that remain."""
    collected = None if _has_masks(state) else collect(rules, state)
    if collected is not None and not collected.n_rules:
        collected = None
    n = 1 if collected is None else collected.n_rules
    if n < len(rules):  # what follows reads the variances
        run = dataclasses.replace(run, request=dataclasses.replace(run.request, covariances=True))
    return Stage(rules[:n], state, run, collected), rules[n:]


def collect(rules: Sequence[Rule], state: Any) -> Collected:
    """Collects layers, up to the first that is no step, into a program."""
    builder = Builder()
    sources = nt_tree_leaves(state)
    values = nt_tree_map(lambda source: builder.source(source.spec), state)
    n_rules = 0
    try:
        for rule in rules:
            values = emit(rule, builder, values)
            n_rules += 1
    except NoStep:
        pass
    return Collected(builder.build(*nt_tree_leaves(values)), sources, values, n_rules)


def emit_all(rules: Sequence[Rule], builder: Builder, values: Any) -> Any:
    """Appends layers to a program, one after another."""
    for rule in rules:
        values = emit(rule, builder, values)
    return values


def emit(rule: Rule, builder: Builder, values: Any) -> Any:
    """Appends a layer to a program, after checking what it requires."""
    if isinstance(values, Value):
        check(rule.requirements, values.spec, rule.name)
    if rule.emit is None:
        raise NoStep
    return rule.emit(builder, values)


def materialise(source: Source, ntk: bool = True) -> Kernel:
    """Returns the kernel of a source."""
    return source.kernel(ntk) if isinstance(source, Inputs) else source


def _execute(collected: Collected, run: Run) -> Any:
    kernels = iter(backends.propagate(collected.program, collected.sources, run.request, run.implementation))
    return nt_tree_map(lambda _: next(kernels), collected.values)


def _apply_one(rule: Rule, state: Any, run: Run) -> Any:
    kernels = nt_tree_map(lambda source: materialise(source, run.request.ntk), state)
    if isinstance(kernels, Kernel):
        check(rule.requirements, kernels, rule.name)
    if rule.function is None:
        collected = collect([rule], kernels)
        assert collected.n_rules == 1, f"{rule.name} has neither a step nor a function"
        out = _execute(collected, run)
    else:
        out = rule.function(kernels, run)
        out = _infer_shapes(rule, kernels, out)
    return _propagate_masks(rule, kernels, out)


def _infer_shapes(rule: Rule, before: Any, after: Any) -> Any:
    """Sets the shapes of the finite network's activations as the layer's `init_fn` gives them."""
    if rule.init_fn is None:
        return after
    shapes1 = _output_shape(rule.init_fn, nt_tree_map(lambda k: k.shape1, before))
    shapes2 = _output_shape(rule.init_fn, nt_tree_map(lambda k: k.shape2, before))
    return _map_with_shapes(lambda k, s1, s2: k.replace(shape1=s1, shape2=s2, is_input=False), after, shapes1, shapes2)


def _output_shape(init_fn: Callable[..., Any], shape: Any) -> Any:
    shapes = []

    def record(key):
        out_shape, params = init_fn(key, shape)
        shapes.append(out_shape)
        return params

    jax.eval_shape(record, jax.random.key(0))
    return shapes[0]


def _propagate_masks(rule: Rule, before: Any, after: Any) -> Any:
    if rule.mask_fn is None or not _has_masks(before):
        return after
    masks1 = rule.mask_fn(nt_tree_map(lambda k: k.mask1, before), nt_tree_map(lambda k: k.shape1, before))
    masks2 = rule.mask_fn(nt_tree_map(lambda k: k.mask2, before), nt_tree_map(lambda k: k.shape2, before))
    if rule.remask:
        return _map_with_shapes(lambda k, m1, m2: k.mask(m1, m2), after, masks1, masks2)
    return _map_with_shapes(lambda k, m1, m2: k.replace(mask1=m1, mask2=m2), after, masks1, masks2)


def _map_with_shapes(fn: Callable[..., Kernel], kernels: Any, *others: Any) -> Any:
    """Maps over a tree of kernels, with other trees whose leaves may be tuples."""
    if isinstance(kernels, Kernel):
        return fn(kernels, *others)
    return type(kernels)(_map_with_shapes(fn, *parts) for parts in zip(kernels, *others, strict=True))


def _has_masks(state: Any) -> bool:
    return any(
        isinstance(source, Kernel) and not (source.mask1 is None and source.mask2 is None)
        for source in nt_tree_leaves(state)
    )
