"""How a program is carried out on planes: stages, the torus of each, what is stored, and what samples must provide.

A stage is the part of a program that leads to one pool or Flatten, its end. It is carried out plane by plane: a
plane holds the pairs of positions `(p, p + d)` of two images, for one offset `d`. docs/gpu.md explains the layout.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from nt_core import activations
from nt_core.activations.coefficients import TracedFunction
from nt_core.backends.base import Refused
from nt_core.backends.mosaic.terms import Terms
from nt_core.lowering import Lowered, Primitive, Repeated, Window, Windows, fold_repeats, lower
from nt_core.lowering.primitives import Dual, Flatten, Normalize, Pool, Rescale, Sum, Tied
from nt_core.program import Program
from nt_core.sources import Inputs, Source

Two = tuple[int, int]
_MAX_TAPS = 5
_MAX_SIZE = 64
_MAX_CHANNELS = 16
_MAX_POOL_READS = 512

# Their duals are sums, which kernels add up in a loop.
BOUNDED = activations.Clip, activations.ClipGate  # with loops over nodes of quadratures
SUMS = *BOUNDED, activations.ElementwiseNumerical

# The standard deviation of a ghost: 0 to all sums and products, and yet told from that of a black pixel by its sign.
GHOST_ROOT = -1e-30


class Torus(NamedTuple):
    """The positions of a plane, numbered around a circle. The numbers are *addresses*: those of neighbours differ by
    the same, modulo `size`, wherever they are.

    A plane is computed in *pieces*, arrays of `width` numbers. Piece `k` holds the addresses from `k * pitch` on. Where
    there are several, the vertical neighbours of one piece are in the next, so that windows share what they load.

    Attributes:
      shape: rows and columns. Positions beyond the image are *ghosts*: the zero padding.
      wraps: columns continue periodically within their row (CIRCULAR). Otherwise the position after the last one of a
        row (or column) is the first one of the next: ghosts lie between them, so that no window can tell.
      size: how many addresses there are, at least one for each position.
      steps: by how much the addresses of vertical and of horizontal neighbours differ.
      pieces, pitch, width: as above. Where pieces overlap, or go beyond the last address, numbers are computed twice.
    """

    shape: Two
    wraps: bool
    size: int
    steps: Two
    pieces: int
    pitch: int
    width: int

    @property
    def reach(self) -> int:
        """How many addresses must be stored, periodically, so that a plane may start at any."""
        return self.size + (self.pieces - 1) * self.pitch + self.width

    @property
    def piece_reach(self) -> int:
        """How many addresses must be stored, periodically, so that a piece may start at any."""
        return self.size + self.width

    @property
    def slots(self) -> int:
        """How many numbers the pieces hold."""
        return self.pieces * self.width

    def slot(self, address: Any) -> Any:
        """Where the pieces, one after another, hold an address."""
        return address // self.pitch * self.width + address % self.pitch

    def addresses(self) -> np.ndarray:
        """The address in each slot."""
        piece, lane = np.divmod(np.arange(self.slots), self.width)
        return (piece * self.pitch + lane) % self.size


class Hardware(NamedTuple):
    """What a machine computes at once.

    Attributes:
      multiple: of numbers in an array.
      largest: how many of them make a piece at most, where planes are divided into pieces; None where they are not.
      numbers: how many the planes of a block of pairs may hold between two stages.
    """

    multiple: int
    largest: int | None
    numbers: int


class Row(NamedTuple):
    """A statistic of single samples that kernels read: one plane for each phase (and iteration, and channel or term).

    Attributes:
      kind: 'channel', 'mask', 'column', 'half' (variance / 2), 'root' (the root of the variance; negative at ghosts),
        'scale' (of a rescaling), 'average' (half the mean of the variances over each window) or 'terms' (see `Terms`).
      repeated: the number of the `Repeated` value whose body it is of, or None.
      number: the value, of the program or of the body.
      space, scale: see `Instance`.
    """

    kind: str
    repeated: int | None
    number: int
    space: Two
    scale: Two


@dataclasses.dataclass
class Table:
    """The rows that a chain of instances reads, those of one iteration together.

    Attributes:
      count: iterations; 1 for what is not repeated.
      rows: where each begins, within an iteration.
      size: how many an iteration has.
    """

    count: int = 1
    rows: dict[Row, int] = dataclasses.field(default_factory=dict)
    size: int = 0

    def add(self, row: Row, n: int) -> int:
        if row not in self.rows:
            self.rows[row] = self.size
            self.size += n
        return self.rows[row]


@dataclasses.dataclass
class Instance:
    """A value, as a stage needs it.

    Attributes:
      number: the value, of the program or of the body of a `Repeated`.
      primitive: what computes it, its leaves to be replaced by coefficients; None for what comes from outside.
      channels: of inputs.
      inputs: numbers of instances.
      space: size of its image.
      scale: how many of its positions lie along each side of one position of the torus. Position `p` of the image is in
        phase `p % scale`, at `p // scale`.
      deficit: it is a deficit rather than a covariance.
      has_ntk: it has a tangent kernel.
      windows: of a convolution.
      coefficients: where the leaves of `primitive` begin among the coefficients.
      table: where its rows are, among the tables of the stage.
      rows: where each kind of `Row` of this value begins in it ('mask': in the first table).
      turns: where among the coefficients it begins how many turns each iteration takes, of a dual with `Terms`.
      stored: it is kept in a buffer, or computed anew by its only reader.
      masked: ghosts are to be stored as such.
      buffer: where it is stored.
      body: of a `Repeated`, with what it reads as its first instance.
      source: of a materialised covariance, its number among those of the stage.
    """

    number: int
    primitive: Primitive | None
    inputs: list[int]
    space: Two
    scale: Two
    deficit: bool
    has_ntk: bool
    windows: tuple[Window, Window] | None = None
    channels: int = 0
    coefficients: int = 0
    table: int = 0
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    turns: int = 0
    stored: bool = False
    masked: bool = False
    buffer: int = -1
    body: "list[Instance] | None" = None
    source: int = -1

    @property
    def phases(self) -> int:
        return self.scale[0] * self.scale[1]

    @property
    def n_source_rows(self) -> int:
        """How many planes come in for each offset: the phases of a covariance, then those of its tangent kernel."""
        return self.phases * (2 if self.has_ntk else 1)


_NO_TORUS = Torus((1, 1), False, 1, (1, 1), 1, 1, 1)


@dataclasses.dataclass
class Stage:
    """What leads to one pool or Flatten, its end.

    Attributes:
      end: the number of the pool or Flatten.
      primitive: that pool or Flatten.
      instances: in an order of evaluation, the input of the end last.
      deficit: the end is of deficits.
      windows: of a pool; None where everything is summed up.
      stride: of the pool: as many offsets along each side fall on one offset after it.
      offsets: how many offsets of the torus are needed, times `stride` along each side.
      tables: of the instances, then of each body.
      sources: numbers of the earlier ends that it starts from, with their scales.
      leaves: the primitives whose numbers are the coefficients, in order; those of a body with the count of iterations.
    """

    end: int
    primitive: Pool | Flatten
    deficit: bool
    windows: tuple[Window, Window] | None
    stride: Two
    instances: list[Instance] = dataclasses.field(default_factory=list)
    torus: Torus = _NO_TORUS
    offsets: int = 1
    tables: list[Table] = dataclasses.field(default_factory=list)
    sources: list[Instance] = dataclasses.field(default_factory=list)
    leaves: list[tuple[Any, int | None]] = dataclasses.field(default_factory=list)
    n_coefficients: int = 0
    buffers: list[int] = dataclasses.field(default_factory=list)

    @property
    def root(self) -> Instance:
        return self.instances[-1]

    @property
    def has_ntk(self) -> bool:
        return self.root.has_ntk

    @property
    def chains(self) -> list[list[Instance]]:
        """The instances, then those of each body."""
        return [self.instances, *(i.body for i in self.instances if i.body is not None)]

    @property
    def nonlinearities(self) -> list[activations.Activation]:
        """Those of its duals."""
        duals = (i.primitive for chain in self.chains for i in chain if isinstance(i.primitive, Dual))
        return [dual.activation for dual in duals]

    @property
    def n_rows(self) -> int:
        return self.first_row(len(self.tables))

    def first_row(self, table: int) -> int:
        """Where a table begins, if they are laid one after another."""
        return sum(before.count * before.size for before in self.tables[:table])

    def source_row(self, source: Instance) -> int:
        """Where the planes of a source begin among those that come in."""
        return sum(other.n_source_rows for other in self.sources[: source.source])


def lower_for_planes(program: Program, sources: tuple[Source, ...], ntk: bool) -> Lowered:
    """Returns a program lowered, with its repeats folded such that they may be stored where they end."""
    lowered = lower(program, sources, ntk=ntk, covariances=False)
    return fold_repeats(lowered, ends_block=lambda primitive: not _convolves(primitive))


def make_plan(lowered: Lowered, sources: tuple[Source, ...], hardware: Hardware) -> list[Stage]:
    """Returns the stages of a program (with repeats folded), in order. Raises `Refused`."""
    _check(lowered, sources)
    channels = [source.spec.n_channels for source in sources]
    stages: list[Stage] = []
    for number, node in lowered.numbered_nodes():
        if isinstance(node.primitive, Pool | Flatten) and lowered.input_form(node).space:
            stages.append(_StageBuilder(lowered, channels, hardware, stages, number, node.primitive).build())
    if not stages:
        raise Refused("there is neither a pool nor Flatten, and without images XLA does as well")
    return stages


def _convolves(primitive: Primitive | None) -> bool:
    return isinstance(primitive, Tied) and bool(primitive.windows)


def canonical(space: tuple[int, ...]) -> Two:
    """Sizes along two axes."""
    return (1,) * (2 - len(space)) + tuple(space)  # type: ignore[return-value]


def _check(lowered: Lowered, sources: tuple[Source, ...]) -> None:
    if len(lowered.outputs) != 1:
        raise Refused("the program has several outputs")
    if lowered.forms[lowered.outputs[0]].space:
        raise Refused("its output holds positions: a pool over all of them, or Flatten, must come last")
    for source in sources:
        if not isinstance(source, Inputs):
            raise Refused("it starts from a kernel that is materialised, not from inputs")
        if not 0 < len(source.spec.space) < 3:
            raise Refused(f"it takes one or two spatial axes, not inputs of shape {source.spec.shape1}")
        if 0 in source.spec.shape1 or 0 in source.spec.shape2:
            raise Refused(f"inputs of shapes {source.spec.shape1} and {source.spec.shape2} are empty")
        if max(source.spec.space) > _MAX_SIZE:
            raise Refused(f"it takes images of up to {_MAX_SIZE} x {_MAX_SIZE}, not {source.spec.space}")
        if source.spec.n_channels > _MAX_CHANNELS:
            raise Refused(f"it takes inputs with up to {_MAX_CHANNELS} channels, not {source.spec.n_channels}")


class _StageBuilder:
    def __init__(
        self,
        lowered: Lowered,
        channels: list[int],
        hardware: Hardware,
        earlier: list[Stage],
        number: int,
        primitive: Pool | Flatten,
    ) -> None:
        self._lowered = lowered
        self._channels = channels
        self._hardware = hardware
        self._end_has_ntk = {stage.end: stage.has_ntk for stage in earlier}
        self._made: dict[tuple[int, Two], int] = {}
        node = lowered.node(number)
        assert node is not None
        pool_windows = None
        if isinstance(primitive, Pool):
            if lowered.input_form(node).same_position:
                raise Refused("a pool over same-position covariances")
            pool_windows = _two(primitive.windows)
        if pool_windows is not None and all(w.covers_axis() for w in pool_windows):
            pool_windows = None
        if pool_windows is not None and any(w.is_dilated() for w in pool_windows):
            raise Refused("pools whose windows are dilated")
        if pool_windows is not None and any(w.circular for w in pool_windows):
            raise Refused("pools with CIRCULAR padding")
        if pool_windows is not None and any(w.taps < w.stride for w in pool_windows):
            raise Refused("pools that leave positions out")
        if pool_windows is not None and math.prod(_pool_reads(w) for w in pool_windows) > _MAX_POOL_READS:
            shapes = [[(w.taps, w.stride) for w in pool_windows]]
            raise Refused(f"pools whose windows overlap too much (windows and strides {shapes})")
        stride = (1, 1) if pool_windows is None else (pool_windows[0].stride, pool_windows[1].stride)
        self._stage = Stage(number, primitive, lowered.forms[number].deficit, pool_windows, stride)

    def build(self) -> Stage:
        stage = self._stage
        node = self._lowered.node(stage.end)
        assert node is not None
        (root,) = node.inputs
        self._instance(root, stage.stride)
        self._lay_out()
        if not isinstance(stage.primitive, Flatten):
            stage.offsets = stage.torus.size
        self._store()
        self._require_rows()
        return stage

    # Which values, and how many of their positions

    def _instance(self, number: int, scale: Two) -> int:
        if (number, scale) in self._made:
            return self._made[number, scale]
        stage, form, node = self._stage, self._lowered.forms[number], self._lowered.node(number)
        primitive = None if node is None or isinstance(node.primitive, Pool | Flatten) else node.primitive
        inputs: list[int] = []
        has_ntk = self._end_has_ntk.get(number, False)
        windows = None
        if node is not None and primitive is not None:
            _check_primitive(primitive)
            before = scale
            windows = _windows_of(primitive)
            if windows is not None:
                before = (scale[0] * windows[0].stride, scale[1] * windows[1].stride)
            inputs = [self._instance(i, before) for i in node.inputs]
            has_ntk = form.has_ntk
        made = Instance(number, primitive, inputs, canonical(form.space), scale, form.deficit, has_ntk, windows)
        if node is None:
            made.channels = self._channels[number]
        elif primitive is None:
            made.source = len(stage.sources)
            stage.sources.append(made)
        if isinstance(primitive, Repeated):
            made.body = self._body(primitive, made)
        elif primitive is not None:
            made.coefficients = self._stage.n_coefficients
            self._stage.leaves.append((primitive, None))
            self._stage.n_coefficients += n_leaves(primitive)
        stage.instances.append(made)
        self._made[number, scale] = len(stage.instances) - 1
        return self._made[number, scale]

    def _body(self, repeated: Repeated, of: Instance) -> list[Instance]:
        """The instances of one iteration; the first is what it starts from."""
        body, stage = repeated.body, self._stage
        entry = body.forms[0]
        instances = [Instance(0, None, [], of.space, of.scale, entry.deficit, entry.has_ntk)]
        start = stage.n_coefficients
        for number, node in body.numbered_nodes():
            _check_primitive(node.primitive)
            form = body.forms[number]
            windows = _windows_of(node.primitive)
            made = Instance(
                number, node.primitive, list(node.inputs), of.space, of.scale, form.deficit, form.has_ntk, windows
            )
            made.coefficients = stage.n_coefficients
            stage.n_coefficients += n_leaves(node.primitive)
            instances.append(made)
        of.coefficients = stage.n_coefficients - start  # of one iteration
        stage.n_coefficients = start + of.coefficients * repeated.count
        stage.leaves.append((tuple(node.primitive for node in body.nodes), repeated.count))
        return instances

    # The torus

    def _lay_out(self) -> None:
        """Finds the smallest torus that holds every image with its padding."""
        stage = self._stage
        sides, wraps = [], []
        for axis in range(2):
            side, circular, padded = 1, False, stage.windows is not None and _padding(stage.windows[axis]) > 0
            if stage.windows is not None:
                side = -(-(stage.root.space[axis] + _padding(stage.windows[axis])) // stage.root.scale[axis])
                side = max(side, stage.windows[axis].count)
            for instance, before in self._all_with_inputs():
                side = max(side, -(-instance.space[axis] // instance.scale[axis]))
                if instance.windows is None:
                    continue
                window = instance.windows[axis]
                if window.circular and not window.is_trivial():
                    circular = True
                else:
                    side = max(side, -(-(before.space[axis] + _padding(window)) // before.scale[axis]))
                    padded |= _padding(window) > 0
            if circular and (padded or any(i.space[axis] != side * i.scale[axis] for i, _ in self._all_with_inputs())):
                raise Refused("CIRCULAR convolutions beside padding, or beside images that they do not divide")
            sides.append(side)
            wraps.append(circular)
        shape = (sides[0], sides[1])
        if any(wraps) and not all(
            w or s == 1 or self._is_exact(a) for a, (w, s) in enumerate(zip(wraps, sides, strict=True))
        ):
            raise Refused("convolutions that are CIRCULAR along one axis only")
        stage.torus = _torus(shape, any(wraps), self._hardware)

    def _is_exact(self, axis: int) -> bool:
        """Whether nothing moves along an axis."""
        return all(i.windows is None or i.windows[axis].is_trivial() for i, _ in self._all_with_inputs())

    def _all_with_inputs(self) -> list[tuple[Instance, Instance]]:
        """All instances, those of bodies too, each with its first input (or itself)."""
        found = []
        for instances in self._stage.chains:
            found += [(i, instances[i.inputs[0]] if i.inputs else i) for i in instances]
        return found

    # What is stored, and where

    def _store(self) -> None:
        stage = self._stage
        for instances in self._stage.chains:
            for i, instance in enumerate(instances):
                readers = [other for other in instances if i in other.inputs]
                is_read_moved = any(other.windows is not None for other in readers)
                instance.stored = len(readers) > 1 or is_read_moved or instance.body is not None
                instance.masked = is_read_moved and not stage.torus.wraps
        for instance in stage.instances:
            if instance.body is not None:  # what an iteration ends with, the next one starts from
                entry, last = instance.body[0], instance.body[-1]
                entry.stored = last.stored = True
                last.masked = instance.masked = instance.masked or entry.masked
        if stage.windows is not None:
            stage.root.stored = True
        _allocate(stage)

    def _require_rows(self) -> None:
        stage = self._stage
        bodies = [i for i in stage.instances if i.body is not None]
        repeats = [owner.primitive for owner in bodies if isinstance(owner.primitive, Repeated)]
        stage.tables = [Table(), *(Table(repeated.count) for repeated in repeats)]
        if stage.torus.wraps:
            stage.tables[0].add(Row("column", None, 0, stage.torus.shape, (1, 1)), 1)
        for number, (owner, instances) in enumerate(zip([None, *bodies], self._stage.chains, strict=True)):
            for i, instance in enumerate(instances):
                instance.table = number
                before = instances[instance.inputs[0]] if instance.inputs else None
                kinds = _kinds(instance, before, [other for other in instances if i in other.inputs])
                if owner is None and instance.primitive is None and instance.source < 0:
                    kinds.append("channel")
                for kind in kinds:
                    row = Row(
                        kind, None if owner is None else owner.number, instance.number, instance.space, instance.scale
                    )
                    instance.rows[kind] = stage.tables[number].add(row, _n_planes_of(kind, instance) * instance.phases)
                    if kind == "terms":
                        instance.turns = stage.n_coefficients
                        stage.n_coefficients += stage.tables[number].count
        for instances in self._stage.chains:
            for i, instance in enumerate(instances):
                if (instance.masked or instance is stage.root) and with_roots(instances, i) is None:
                    row = Row("mask", None, 0, instance.space, instance.scale)
                    instance.rows["mask"] = stage.tables[0].add(row, instance.phases)


def _torus(shape: Two, wraps: bool, hardware: Hardware) -> Torus:
    (rows, columns), n = shape, math.prod(shape)
    if hardware.largest is None or wraps or n <= hardware.largest:
        width = -(-n // hardware.multiple) * hardware.multiple
        return Torus(shape, wraps, n, (columns, 1), 1, width, width)
    # Column by column, in strips of `count` rows, one for each lane: address = pitch * place, where count * pitch = 1
    # modulo size. So the next place is in the next piece, and the one after a strip is the first of the next lane.
    count = -(-(n + 1) // hardware.largest)
    pitch = -(-(n + 1) // count)
    size = count * pitch - 1
    return Torus(shape, wraps, size, (pitch, pitch * rows % size), count, pitch, hardware.largest)


def _kinds(instance: Instance, before: Instance | None, readers: list[Instance]) -> list[str]:
    """The statistics of a value that are read, beside its mask."""
    kinds = []
    if any(is_relu(other.primitive) for other in readers):
        kinds.append("root")
    elif is_sum(instance.primitive) or (instance.deficit and not is_relu(instance.primitive)):
        kinds.append("half")
    if terms_of(instance.primitive) is not None:
        kinds.append("terms")
    if isinstance(instance.primitive, Rescale):
        kinds.append("scale")
    if reads_average(instance, before):
        kinds.append("average")
    return kinds


def is_relu(primitive: Primitive | None) -> bool:
    """Whether it is the dual of the ReLU family, which gives half the variance of its output from its input's."""
    return isinstance(primitive, Dual) and isinstance(primitive.activation, activations.ABRelu)


def is_sum(primitive: Primitive | None) -> bool:
    """Whether it is a dual that is a sum. Variances after it come with the statistics."""
    return isinstance(primitive, Dual) and isinstance(primitive.activation, SUMS)


def terms_of(primitive: Primitive | None) -> Terms | None:
    """What a dual adds up that is a sum over Hermite coefficients."""
    if isinstance(primitive, Dual) and isinstance(primitive.activation, activations.ElementwiseNumerical):
        return Terms(primitive.activation)
    return None


def _n_planes_of(kind: str, instance: Instance) -> int:
    """How many planes a kind of statistic has in each phase."""
    if kind == "channel":
        return instance.channels
    terms = terms_of(instance.primitive)
    return terms.n_numbers if kind == "terms" and terms is not None else 1


def with_roots(instances: list[Instance], i: int) -> Instance | None:
    """The value whose standard deviations tell which positions of an instance are ghosts, if there is one."""
    instance = instances[i]
    if instance.body is not None:
        return with_roots(instances, instance.inputs[0])
    if is_relu(instance.primitive):
        return instances[instance.inputs[0]]
    return instance if "root" in instance.rows else None


def reads_average(instance: Instance, before: Instance | None) -> bool:
    """Whether tied weights read averages of variances, beside deficits."""
    if not isinstance(instance.primitive, Tied) or before is None:
        return False
    return instance.primitive.reads_average(before.deficit, instance.deficit, instance.has_ntk)


def n_leaves(primitive: Primitive) -> int:
    """How many numbers a primitive has."""
    return len(jax.tree.leaves(primitive))


def _allocate(stage: Stage) -> None:
    """Assigns buffers. A value overwrites one that nobody reads any more, itself included where that is safe."""
    free: list[int] = []

    def take(phases: int) -> int:
        if not free:
            stage.buffers.append(0)
            free.append(len(stage.buffers) - 1)
        buffer = free.pop()
        stage.buffers[buffer] = max(stage.buffers[buffer], phases)
        return buffer

    def chain(instances: list[Instance], kept: int | None) -> None:
        reads = [_stored_inputs(instances, i) for i in range(len(instances))]
        last_use = {
            i: max([j for j in range(len(instances)) if i in reads[j]], default=i) for i in range(len(instances))
        }
        for j, instance in enumerate(instances):
            if not instance.stored and j < len(instances) - 1:
                continue
            done = [i for i in reads[j] if last_use[i] == j and instances[i].buffer != kept]
            if instance.stored and instance.buffer < 0:
                over = [i for i in done if _can_overwrite(instance, instances[i], reads[j][i])]
                if over:
                    instance.buffer = instances[over[0]].buffer
                    done.remove(over[0])
                else:
                    instance.buffer = take(instance.phases)
            if instance.body is not None:
                body = instance.body
                body[0].buffer = instance.buffer
                moved = _stored_inputs(body, len(body) - 1).get(0)
                if moved is None or _can_overwrite(body[-1], body[0], moved):
                    body[-1].buffer = instance.buffer
                chain(body, instance.buffer)
            free.extend(instances[i].buffer for i in done)
        if kept is not None and instances[-1].buffer != kept:
            free.append(instances[-1].buffer)

    chain(stage.instances, None)


def _stored_inputs(instances: list[Instance], i: int) -> dict[int, bool]:
    """The stored values that are read to compute an instance, and whether they are read at other positions."""
    found: dict[int, bool] = {}
    for j in instances[i].inputs:
        if instances[j].stored:
            found[j] = found.get(j, False) or instances[i].windows is not None
        else:
            for k, moved in _stored_inputs(instances, j).items():
                found[k] = found.get(k, False) or moved
    return found


def _can_overwrite(instance: Instance, read: Instance, moved: bool) -> bool:
    """Whether a value may be written where another is that it is computed from: it is known before anything is written
    if there is one phase."""
    return instance.phases == read.phases and (instance.phases == 1 or not moved)


# Their duals are polynomials, divisions, roots, exponentials and sines.
_DUALS = (
    *(activations.ABRelu, activations.Step, activations.RectifiedMonomial, activations.Erf, activations.Gelu),
    *(activations.Monomial, activations.Polynomial, activations.Hermite, activations.Exp, activations.ExpNormalized),
    *(activations.Gaussian, activations.Gabor, activations.Rbf, activations.Sin),
)


def _check_primitive(primitive: Primitive) -> None:
    match primitive:
        case Sum() | Repeated():
            return
        case Tied():
            if any(w.taps > _MAX_TAPS or w.dilation > 1 for w in primitive.windows):
                raise Refused(f"it takes windows of up to {_MAX_TAPS} x {_MAX_TAPS}, without dilation")
            if not primitive.keeps_order:
                raise Refused("a convolution that permutes axes")
        case Dual():
            if not isinstance(primitive.activation, (*_DUALS, *SUMS)):
                raise Refused(f"it does not have the dual of {type(primitive.activation).__name__}")
            try:
                terms_of(primitive)
            except TracedFunction as error:
                raise Refused("the function of ElementwiseNumerical depends on values that are traced") from error
        case Normalize():
            if primitive.space_axes or primitive.sample_numbers(1) is not None:
                raise Refused("a normalisation over positions")
        case _:
            raise Refused(f"it does not know the primitive {type(primitive).__name__}")


def _windows_of(primitive: Primitive) -> tuple[Window, Window] | None:
    return _two(primitive.windows) if isinstance(primitive, Tied) and primitive.windows else None


def _two(along: Windows) -> tuple[Window, Window]:
    """Windows along two axes."""
    trivial = Window(size=1, count=1, taps=1, stride=1, dilation=1, low=0, high=0, circular=False)
    first, second = [trivial, *along][-2:]
    return first, second


def _padding(window: Window) -> int:
    """Ghosts that a window needs beside an image: one gap serves both of its ends."""
    last = (window.count - 1) * window.stride + (window.taps - 1) * window.dilation - window.low
    return max(0, window.low, last - (window.size - 1))


def pool_turns(window: Window) -> range:
    """By how much an offset after a pool may differ from that of the torus."""
    return range(-((window.taps - 1) // window.stride), (window.taps + window.stride - 2) // window.stride + 1)


def _pool_reads(window: Window) -> int:
    return len(pool_turns(window)) * window.taps


def n_planes(stage: Stage) -> int:
    """How many planes a stage computes for a pair of samples."""
    return stage.offsets * stage.stride[0] * stage.stride[1]
