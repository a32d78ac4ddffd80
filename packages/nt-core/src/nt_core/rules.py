"""How the covariance rules of layers are applied, one after another.

A rule that is data (`emit`) is collected with its neighbours into one program, so that a backend can run them fused. A
rule that is only a function of materialised kernels is applied on its own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array

from nt_core import backends
from nt_core.backends import Implementation, Request
from nt_core.kernel import Kernel
from nt_core.masks import Masks
from nt_core.program import Builder, Program, Value
from nt_core.requirements import NO_REQUIREMENTS, Requirements, check
from nt_core.sources import Inputs, Source, masks_of
from nt_core.spec import Spec
from nt_core.steps import Scale, Step
from nt_core.tracing import is_traced
from nt_core.trees import nt_tree_leaves, nt_tree_map

Emit = Callable[[Builder, Any], Any]


class NoStep(Exception):
    """What a layer does to these values is no step: it ends the program."""


# Compared by identity: what it is made of, functions above all, has no other equality.
@dataclasses.dataclass(frozen=True, eq=False)
class Rule:
    """What one layer does to covariances.

    Attributes:
      name: of the layer, for messages.
      requirements: what it asks of incoming kernels.
      emit: appends the layer's steps to a program: `emit(builder, values) -> values`, with trees of `Value`. Raises
        `NoStep` where `function` has to be used.
      function: `function(kernels, run) -> kernels`, on trees of materialised `Kernel`s; keywords of the user are in
        `run.kwargs`. A rule has `emit`, `function`, or both.
      mask_fn: `mask_fn(mask, shape) -> mask` of the outputs; None leaves masks to `emit` and `function`.
      remask: the kernel has to be zeroed at masked positions afterwards.
      init_fn: gives the output shape where `function` cannot know it.
      of_inputs: `of_inputs(inputs) -> kernel`, the covariance that the layer starts from if inputs are not vectors, and
        it is the first one.
    """

    name: str
    requirements: Requirements = dataclasses.field(default_factory=lambda: NO_REQUIREMENTS)
    emit: Emit | None = None
    function: Callable[..., Any] | None = None
    mask_fn: Callable[[Any, Any], Any] | None = None
    remask: bool = False
    init_fn: Callable[..., Any] | None = None
    of_inputs: Callable[[Inputs], Kernel] | None = None


def step_rule(step: Step, requirements: Requirements = NO_REQUIREMENTS) -> Rule:
    """The rule of a layer that is one step."""
    return Rule(type(step).__name__, requirements, emit=lambda builder, value: builder.add(step, value))


class Collected(NamedTuple):
    """Layers as one program.

    Attributes:
      program: what they do.
      values: tree of the values that it returns.
      n_rules: number of layers.
    """

    program: Program
    values: Any
    n_rules: int


@dataclasses.dataclass(frozen=True)
class Run:
    """What holds for one call of a kernel function, whatever the layer.

    Attributes:
      request: what is to be computed.
      implementation: backend, or backends in order of preference.
      kwargs: keywords of the user.
      collect, collect_masked: the functions of these names, or what remembers their results.
    """

    request: Request
    implementation: Implementation
    kwargs: dict[str, Any]
    collect: Callable[..., Collected] = dataclasses.field(default_factory=lambda: collect)
    collect_masked: Callable[..., Any] = dataclasses.field(default_factory=lambda: collect_masked)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers that are applied together, as one program; or one layer on its own.

    Attributes:
      rules: of the layers.
      state: tree of sources.
      run: what is asked of this segment.
      collected: the program, or None for a layer on its own.
    """

    rules: Sequence[Rule]
    state: Any
    run: Run
    collected: Collected | None

    @property
    def sources(self) -> tuple[Source, ...]:
        """What the program starts from."""
        return tuple(nt_tree_leaves(self.state))

    def apply(self) -> Any:
        """Returns a tree of kernels."""
        if self.collected is None:
            return _apply_one(self.rules[0], self.state, self.run)
        return _execute(self.collected, self.sources, self.run)


def apply_rules(rules: Sequence[Rule], state: Any, run: Run) -> Any:
    """Carries a tree of sources through layers. Returns a tree of `Kernel`s."""
    while rules:
        segment, rules = first_segment(rules, state, run)
        state = segment.apply()
    return nt_tree_map(lambda source: materialise(source, run.request.ntk), state)


def first_segment(rules: Sequence[Rule], state: Any, run: Run) -> tuple[Segment, Sequence[Rule]]:
    """Returns the layers that are to be applied first, as many as there can be, and those that remain."""
    of_inputs = rules[0].of_inputs
    if of_inputs is not None:
        state = nt_tree_map(lambda source: of_inputs(source) if isinstance(source, Inputs) else source, state)
    collected = _collect(rules, state, run)
    if not collected.n_rules:
        collected = None
    if any(isinstance(source, Kernel) and source.ntk is None for source in nt_tree_leaves(state)):
        run = dataclasses.replace(run, request=dataclasses.replace(run.request, ntk=False))
    n = 1 if collected is None else collected.n_rules
    if n < len(rules):  # what follows reads the variances
        run = dataclasses.replace(run, request=dataclasses.replace(run.request, covariances=True))
    return Segment(rules[:n], state, run, collected), rules[n:]


def collect(
    rules: tuple[Rule, ...], specs: tuple[Spec, ...], structure: Any, masks: Sequence[Masks | None] | None = None
) -> Collected:
    """Collects layers, up to the first that is no step, into a program.

    Args:
      rules: of the layers.
      specs: of the sources that it starts from.
      structure: of the tree of sources, as `jax.tree.structure` gives it.
      masks: of the sources, None for no masks at all.
    """
    builder = Builder()
    sources = [builder.source(spec) for spec in specs]
    masked = sources if masks is None else [with_masks(*pair) for pair in zip(sources, masks, strict=True)]
    values = jax.tree.unflatten(structure, masked)
    n_rules = 0
    try:
        for rule in rules:
            values = emit(rule, builder, values)
            n_rules += 1
    except NoStep:
        pass
    return Collected(builder.build(*nt_tree_leaves(values)), values, n_rules)


def collect_masked(
    rules: tuple[Rule, ...], specs: tuple[Spec, ...], structure: Any, shapes: tuple[Any, ...]
) -> Callable[[list[Masks | None]], Collected]:
    """Returns `collect` for masks of these shapes, compiled: the masks of all layers are one operation.

    Args:
      rules, specs, structure: see `collect`.
      shapes: of the masks.
    """
    known: dict[str, Any] = {}  # what does not depend on masks

    @jax.jit
    def traced_leaves(masks: list[Masks | None]) -> list[Array]:
        collected = collect(rules, specs, structure, masks)
        after = [value.masks for value in nt_tree_leaves(collected.values)]
        leaves, known["tree"] = jax.tree.flatten((collected.program, after))
        known["values"] = nt_tree_map(lambda value: with_masks(value, None), collected.values)
        known["n_rules"] = collected.n_rules
        known["leaves"] = [None if is_traced(leaf) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if is_traced(leaf)]

    def of_masks(masks: list[Masks | None]) -> Collected:
        computed = iter(traced_leaves(masks))
        leaves = [next(computed) if leaf is None else leaf for leaf in known["leaves"]]
        program, after = jax.tree.unflatten(known["tree"], leaves)
        remaining = iter(after)
        values = nt_tree_map(lambda value: with_masks(value, next(remaining)), known["values"])
        return Collected(program, values, known["n_rules"])

    return of_masks


def _collect(rules: Sequence[Rule], state: Any, run: Run) -> Collected:
    specs, structure = jax.tree.flatten(nt_tree_map(lambda source: source.spec, state))
    masks = [masks_of(source) for source in nt_tree_leaves(state)]
    if all(m is None for m in masks):
        return run.collect(tuple(rules), tuple(specs), structure)
    shapes = tuple((m and m.first.shape, m and m.second is not None and m.second.shape) for m in masks)
    return run.collect_masked(tuple(rules), tuple(specs), structure, shapes)(masks)


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
    after = rule.emit(builder, values)
    return after if rule.mask_fn is None else _mask_values(rule, builder, values, after)


def with_masks(value: Value, masks: Masks | None) -> Value:
    """Returns a value that is masked."""
    return dataclasses.replace(value, masks=masks)


def _mask_values(rule: Rule, builder: Builder, before: Any, after: Any) -> Any:
    """Sets the masks of what a layer has emitted, and zeroes it where it has to be."""
    assert rule.mask_fn is not None
    masks = nt_tree_map(lambda v: v.masks, before)
    if all(m is None for m in nt_tree_leaves(masks)):
        return after
    first = rule.mask_fn(
        nt_tree_map(lambda v: v.masks and v.masks.first, before), nt_tree_map(lambda v: v.spec.shape1, before)
    )
    second = rule.mask_fn(
        nt_tree_map(lambda v: v.masks and v.masks.second, before), nt_tree_map(lambda v: v.spec.shape2, before)
    )

    def masked(value: Value, mask1: Array | None, mask2: Array | None) -> Value:
        masks = None if mask1 is None else Masks(mask1, mask2)
        if masks is not None and rule.remask:
            value = builder.add(Scale(*masks.unmasked(value.spec)), value)
        return with_masks(value, masks)

    return _map_with(Value, masked, after, first, second)


def materialise(source: Source, ntk: bool = True) -> Kernel:
    """Returns the kernel of a source."""
    return source.kernel(ntk) if isinstance(source, Inputs) else source


def _execute(collected: Collected, sources: Sequence[Source], run: Run) -> Any:
    kernels = iter(backends.propagate(collected.program, sources, run.request, run.implementation))

    def masked(value: Value) -> Kernel:
        masks = value.masks
        kernel = next(kernels)
        return kernel if masks is None else kernel.replace(mask1=masks.first, mask2=masks.second)

    return nt_tree_map(masked, collected.values)


def _apply_one(rule: Rule, state: Any, run: Run) -> Any:
    assert rule.function is not None, f"{rule.name} has neither a step nor a function"
    kernels = nt_tree_map(lambda source: materialise(source, run.request.ntk), state)
    if isinstance(kernels, Kernel):
        check(rule.requirements, kernels, rule.name)
    out = rule.function(kernels, run)
    return _propagate_masks(rule, kernels, _infer_shapes(rule, kernels, out))


def _infer_shapes(rule: Rule, before: Any, after: Any) -> Any:
    """Sets the shapes of the finite network's activations as the layer's `init_fn` gives them."""
    if rule.init_fn is None:
        return after
    shapes1 = _output_shape(rule.init_fn, nt_tree_map(lambda k: k.shape1, before))
    shapes2 = _output_shape(rule.init_fn, nt_tree_map(lambda k: k.shape2, before))
    return _map_with(Kernel, _with_shapes, after, shapes1, shapes2)


def _with_shapes(kernel: Kernel, shape1: tuple[int, ...], shape2: tuple[int, ...]) -> Kernel:
    # Of a layer that drops axes and does not say where channels are then: channels that came last still do.
    channel_axis = min(kernel.channel_axis, len(shape1) - 1)
    return kernel.replace(shape1=shape1, shape2=shape2, channel_axis=channel_axis, is_input=False)


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
        return _map_with(Kernel, _masked, after, masks1, masks2)
    return _map_with(Kernel, lambda k, m1, m2: k.replace(mask1=m1, mask2=m2), after, masks1, masks2)


@jax.jit
def _masked(kernel: Kernel, mask1: Array | None, mask2: Array | None) -> Kernel:
    return kernel.mask(mask1, mask2)


def _map_with(leaf: type, fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Maps over a tree of leaves of one type, with other trees whose leaves may be tuples, or None for all leaves."""
    if isinstance(tree, leaf):
        return fn(tree, *others)
    others = tuple([None] * len(tree) if other is None else other for other in others)
    return type(tree)(_map_with(leaf, fn, *parts) for parts in zip(tree, *others, strict=True))


def _has_masks(state: Any) -> bool:
    return any(masks_of(source) is not None for source in nt_tree_leaves(state))
