"""The weight table: for each parameter its Hugging Face name, the change of layout and the logical axes.

Loading, saving, sharding and the check that nothing is missing and nothing is left over are four readings of one
table. Knows no family: a table is a tuple of rows handed in.
"""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from sft_jax.errors import ModelError, did_you_mean, listing

Arrays = dict[str, np.ndarray]
Anew = Literal["nothing", "head", "all"]  # what a checkpoint is not asked for
MOST_SHOWN = 20  # misfits in one message; near misses are looked up for no more, since each takes a while


@dataclass(frozen=True)
class Layout:
    """A change of layout and its inverse."""

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # of ours, from theirs


SAME = Layout(lambda a: a, lambda a: a, lambda s: s)
TRANSPOSE = Layout(np.transpose, np.transpose, lambda s: s[::-1])
# The kernel of a convolution: torch's [outputs, inputs, height, width], ours [height, width, inputs, outputs].
CONVOLUTION = Layout(
    lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1), lambda s: (*s[2:], *s[1::-1])
)


@dataclass(frozen=True)
class Part:
    """Where a parameter stands in a tensor that holds several."""

    axis: int  # of the tensor in the checkpoint
    begin: int
    size: int
    whole: int  # of the tensor along that axis

    def cut(self, array: np.ndarray) -> np.ndarray:
        """This part of the tensor."""
        return array[(slice(None),) * self.axis + (slice(self.begin, self.begin + self.size),)]


@dataclass(frozen=True)
class Row:
    """One parameter. `{i}` in both names stands for the number of a layer."""

    ours: str
    theirs: str
    layout: Layout
    axes: str  # logical name of each of our dimensions, '.' for none
    head: bool = False  # made anew where a checkpoint does not hold it
    part: Part | None = None  # of the tensor, where other rows have the rest; these stand in its order

    def shape(self, found: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of ours that a tensor of this shape gives; one that has not all the parts is left as it is."""
        part = self.part
        if part and len(found) > part.axis and found[part.axis] == part.whole:
            found = (*found[: part.axis], part.size, *found[part.axis + 1 :])
        return self.layout.shape(found)


@dataclass(frozen=True)
class Table:
    """The rows of one model, layers written out, and what a checkpoint may hold besides."""

    family: str
    rows: tuple[Row, ...]
    prefix: str = ""  # of the backbone's names in a checkpoint that also has a head
    ignore: tuple[str, ...] = ()  # patterns of tensors that hold nothing of the model
    renamed: tuple[tuple[str, str], ...] = ()  # endings that old checkpoints use, and today's
    aliases: Mapping[str, str] = field(default_factory=dict)  # whole names that another library uses, and these
    counters: tuple[str, ...] = ()  # whole numbers of which nothing is read, and that an export must have
    # Names that are ignored since their numbers are known: another tensor's, or the name of a function of the shape.
    copies: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Callable[[tuple[int, ...]], np.ndarray]] = field(default_factory=dict)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Logical axes of each of our parameters."""
        return {row.ours: tuple(row.axes.split()) for row in self.rows}


@dataclass(frozen=True)
class Matched:
    """What a checkpoint and a table have in common."""

    loaded: dict[str, str]  # our path -> name in the checkpoint
    initialised: tuple[str, ...]  # our paths that the checkpoint does not hold
    ignored: tuple[str, ...] = field(default=())  # names in the checkpoint that are not used


def linear(
    ours: str, theirs: str, axes: str, *, head: bool = False, bias: bool = True, layout: Layout = TRANSPOSE
) -> tuple[Row, ...]:
    """Kernel and bias of a torch Linear, whose weight is [outputs, inputs]; `axes` are those of our kernel."""
    kernel = Row(f"{ours}/kernel", f"{theirs}.weight", layout, axes, head)
    return (kernel, Row(f"{ours}/bias", f"{theirs}.bias", SAME, axes.split()[-1], head)) if bias else (kernel,)


def norm(ours: str, theirs: str, *, bias: bool = True) -> tuple[Row, ...]:
    """Scale and bias of a torch LayerNorm, or the scale of an RMSNorm."""
    scale = Row(f"{ours}/scale", f"{theirs}.weight", SAME, ".")
    return (scale, Row(f"{ours}/bias", f"{theirs}.bias", SAME, ".")) if bias else (scale,)


def conv(ours: str, theirs: str, *, bias: bool = False) -> tuple[Row, ...]:
    """Kernel, and bias if there is one, of a torch Conv2d."""
    kernel = Row(f"{ours}/kernel", f"{theirs}.weight", CONVOLUTION, ". . . embed")
    return (kernel, Row(f"{ours}/bias", f"{theirs}.bias", SAME, "embed")) if bias else (kernel,)


def batch_norm(ours: str, theirs: str) -> tuple[Row, ...]:
    """Scale, bias and running statistics of a torch BatchNorm2d."""
    mean = Row(f"{ours}/mean", f"{theirs}.running_mean", SAME, ".")
    return (*norm(ours, theirs), mean, Row(f"{ours}/variance", f"{theirs}.running_var", SAME, "."))


def fused(parts: Iterable[tuple[Sequence[Row], int]]) -> tuple[Row, ...]:
    """Linear layers whose outputs stand side by side in one tensor of the checkpoint: (rows, outputs) of each."""
    parts = tuple(parts)
    whole, begin, found = sum(size for _, size in parts), 0, []
    for rows, size in parts:
        for row in rows:
            outputs_first = row.layout is TRANSPOSE or row.ours.endswith("/bias")
            found.append(replace(row, part=Part(0 if outputs_first else 1, begin, size, whole)))
        begin += size
    return tuple(found)


def over_layers(rows: Iterable[Row], count: int) -> tuple[Row, ...]:
    """The rows of a block, once for each of `count` layers."""
    return tuple(
        replace(r, ours=r.ours.replace("{i}", str(i)), theirs=r.theirs.replace("{i}", str(i)))
        for i in range(count)
        for r in rows
    )


def match(
    table: Table,
    shapes: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    *,
    anew: Anew = "nothing",
) -> Matched:
    """Pair the table with the tensors of a checkpoint (name -> shape); every misfit in one ModelError.

    `shapes` are those of our parameters. A head that the checkpoint lacks is left to be initialised, and what
    `anew` says; else a backbone must be there in full.
    """
    names = {_canonical(name, table): name for name in found}
    known = {name for row in table.rows for name in (row.theirs, row.theirs.removeprefix(table.prefix))}
    spare = [name for name in names if name not in known]  # what a missing one may be a misspelling of
    loaded: dict[str, str] = {}
    initialised, problems = (
        [],
        [
            f"{name}: the same as {names[key]} by another name; leave one in the checkpoint"
            for name in found
            if names[key := _canonical(name, table)] != name
        ],
    )
    used: set[str] = set()
    for row in table.rows:
        key = row.theirs if row.theirs in names else row.theirs.removeprefix(table.prefix)
        name = names.get(key)
        used.add(key)
        if name is None or anew == "all" or (row.head and anew == "head"):
            initialised.append(row.ours)
            if not row.head and anew != "all":
                near = did_you_mean(row.theirs, spare) if len(problems) < MOST_SHOWN else ""
                problems.append(f"{row.theirs}: not in the checkpoint (needed for {row.ours}){near}")
        elif row.shape(found[name]) != shapes[row.ours]:
            ours, theirs = shapes[row.ours], row.shape(found[name])
            remedy = "; set model.head=new to begin with a fresh one" if row.head else ""
            problems.append(f"{name}: shape {theirs} for {row.ours}, expected {ours}{remedy}")
        else:
            loaded[row.ours] = name
    problems += [
        f"{row.theirs}: not in the checkpoint, which has the rest of that layer; set model.head=new"
        for row in table.rows
        if row.head and row.ours in initialised and any(p.startswith(f"{row.ours.rpartition('/')[0]}/") for p in loaded)
    ]
    names = {key: name for key, name in names.items() if key not in used}
    ignored = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in table.ignore)]
    wanted = [row.theirs for row in table.rows if row.ours not in loaded]
    for name in sorted(set(names) - set(ignored)):
        near = did_you_mean(name, wanted) if len(problems) < MOST_SHOWN else ""
        problems.append(f"{names[name]}: in the checkpoint, matched by no row{near}")
    if problems:
        more = max(0, len(problems) - MOST_SHOWN)
        place = f"{table.family}: checkpoint '{where}' is not what its config.json says; fetch both again"
        raise ModelError(listing(place, problems[:MOST_SHOWN], more))
    return Matched(loaded, tuple(initialised), tuple(sorted(names[n] for n in ignored)))


def differing(
    table: Table, found: Collection[str], read: Callable[[str], np.ndarray], *, near: float = 1e-5
) -> list[tuple[str, str]]:
    """(name, what it should equal) of the tensors of a checkpoint that are ignored as copies and hold other numbers.

    Copies must be equal; what is computed may be as far from it as `near`, for it was computed on another machine.
    """
    names = {_canonical(name, table): name for name in found}

    def there(name: str) -> str | None:
        return names.get(name) or names.get(name.removeprefix(table.prefix))

    wrong = [
        (own, original)
        for copy, name in table.copies.items()
        if (own := there(copy)) and (original := there(name)) and not np.array_equal(read(own), read(original))
    ]
    for name, computed in table.computed.items():
        if own := there(name):
            numbers = read(own).astype(np.float32)
            if not np.allclose(numbers, computed(numbers.shape), rtol=0, atol=near):
                wrong.append((own, "what is computed here"))
    return wrong


def load(table: Table, matched: Matched, read: Callable[[str], np.ndarray]) -> Arrays:
    """The loaded parameters in our layout, in the type that the checkpoint has."""
    rows = {row.ours: row for row in table.rows}
    return {ours: take(rows[ours], read(theirs)) for ours, theirs in matched.loaded.items()}


def save(table: Table, params: Mapping[str, np.ndarray]) -> Arrays:
    """Parameters under their Hugging Face names and in that layout."""
    tensors: dict[str, list[tuple[Row, np.ndarray]]] = {}
    for row in table.rows:
        tensors.setdefault(row.theirs, []).append((row, row.layout.save(params[row.ours])))
    counters = {name: np.zeros((), np.int64) for name in table.counters}
    return {theirs: _whole(parts) for theirs, parts in tensors.items()} | counters


def take(row: Row, tensor: np.ndarray) -> np.ndarray:
    """A parameter out of its tensor, in our layout."""
    return row.layout.load(row.part.cut(tensor) if row.part else tensor)


def _whole(parts: Sequence[tuple[Row, np.ndarray]]) -> np.ndarray:
    (row, array), *more = parts
    return np.concatenate([a for _, a in parts], row.part.axis) if row.part and more else np.ascontiguousarray(array)


def _canonical(name: str, table: Table) -> str:
    if name in table.aliases:
        return table.aliases[name]
    for old, new in table.renamed:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def check_covers(table: Table, keys: Sequence[str]) -> None:
    """A table and a template must name the same parameters; a difference is a bug in the family's file."""
    ours = [row.ours for row in table.rows]
    assert sorted(ours) == sorted(keys), sorted(set(ours) ^ set(keys))
