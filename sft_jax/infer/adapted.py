"""Several adapters on one base: rows say which of them answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sft_jax import assets
from sft_jax.adapt.peft import Found, read
from sft_jax.data.rows import Bad, Rows
from sft_jax.errors import ConfigError, DataError, ModelError, did_you_mean
from sft_jax.infer.predict import Predictor, find_model, loaded_as, make_predictor, say_remarks, section_of
from sft_jax.infer.records import Answers
from sft_jax.models.family import Model, build_model, settled
from sft_jax.nn.template import Params
from sft_jax.tasks.task import Record, Task, build_task
from sft_jax.weights.files import CONFIG, Checkpoint, find, open_checkpoint, read_config
from sft_jax.weights.table import match, take

COLUMN = "adapter"


@dataclass(frozen=True)
class Adapted(Answers):
    """A base with adapters, each with the task that it was trained for: rows in, records out; see `Answers`.

    Rows are answered by the adapter that their field `adapter` names, which may be left out where there is but one.
    """

    predictors: dict[str, Predictor]
    task: Task  # that of the first adapter
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """The most tokens that are read of a row."""
        return max(predictor.longest for predictor in self.predictors.values())

    def read(self, rows: Rows) -> dict[int, Bad]:
        """What is wrong with rows, by their numbers."""
        places, bad = self._places(rows)
        for name, own in places.items():
            found = self.predictors[name].read(rows.select(own)) if len(own) else {}
            bad |= {int(own[row]): one for row, one in found.items()}
        return bad

    def answered(self, rows: Rows, batch_size: int, *, raw: bool, score: bool, first: int) -> list[Record | Bad]:
        """The record of each row, or why it has none."""
        places, bad = self._places(rows)
        found: dict[int, Record | Bad] = dict(bad)
        for name, own in places.items():
            if len(own):
                how = {"raw": raw, "score": score, "first": first}
                records = self.predictors[name].answered(rows.select(own), batch_size, **how)
                found |= dict(zip(own.tolist(), records, strict=True))
        return [found[row] for row in range(len(rows))]

    def warm_up(self, longest: int | None = None, batch_size: int = 1) -> int:
        """As `Predictor.warm_up`, of each adapter."""
        return sum(predictor.warm_up(longest, batch_size) for predictor in self.predictors.values())

    def _places(self, rows: Rows) -> tuple[dict[str, np.ndarray], dict[int, Bad]]:
        """(the rows of each adapter, those that name none that there is)."""
        known = ", ".join(self.predictors)
        if COLUMN not in rows.names:
            if len(self.predictors) > 1:
                raise DataError(
                    f"{rows.where}: no column '{COLUMN}', and there are several: {known}; name one in each row"
                )
            return {name: np.arange(len(rows)) for name in self.predictors}, {}
        names = rows.column(COLUMN)
        bad = {
            row: Bad(
                rows.place(row),
                "unknown adapter",
                f"adapter {n!r:.60}{did_you_mean(str(n), self.predictors)} (known: {known})",
            )
            for row, n in enumerate(names)
            if n not in self.predictors
        }
        chosen = np.array(names, dtype=object)
        return {name: np.flatnonzero(chosen == name) for name in self.predictors}, bad


def load_adapted(
    source: str,
    adapters: Sequence[str],
    settings: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    *,
    chats: bool = False,
) -> Adapted:
    """The model in a directory, in memory once, with adapters `NAME=DIRECTORY`; all else as in `load_predictor`."""
    checkpoint, shared, found = open_checkpoint(find_model(source)), {}, {}
    for given in adapters:
        name, equals, directory = given.partition("=")
        if not (equals and name and directory) or name in found:
            raise ConfigError(f"--adapter {given}: expected NAME=DIRECTORY, each name once")
        found[name] = _load(checkpoint, find(assets.resolve(directory)), shared, settings, columns or {}, chats=chats)
    return Adapted(found, next(iter(found.values())).task, columns or {})


def _load(
    checkpoint: Checkpoint,
    directory: Path,
    shared: dict[tuple[str, str], Array],
    settings: Sequence[str],
    columns: Mapping[str, str],
    *,
    chats: bool,
) -> Predictor:
    """What answers by one adapter; arrays of the base that others have loaded are taken from them."""
    ours = (directory / CONFIG).is_file()  # PEFT's own have none, and are for the task of the base
    config = read_config(directory) if ours else checkpoint.config
    task = build_task(section_of(config, str(directory), columns, chats=chats), {})
    checkpoint = settled(checkpoint, task.head)
    say_remarks(checkpoint)
    plain = build_model(checkpoint.config, task.head, str(checkpoint.directory))
    found = read(directory, plain.table, plain.template.shapes)
    model = build_model(checkpoint.config, task.head, str(checkpoint.directory), adapter=found.plan)
    params = _params(checkpoint, model, found, shared, str(directory))
    loaded = loaded_as(config, directory if ours else checkpoint.directory, task, model, params)
    return make_predictor(loaded, settings, columns)


def _params(
    checkpoint: Checkpoint, model: Model, found: Found, shared: dict[tuple[str, str], Array], where: str
) -> Params:
    own = {path: jnp.asarray(array, jnp.float32) for path, array in found.arrays.items()}
    heads = {row.ours for row in model.table.rows if row.head}
    anew = "head" if heads and heads <= own.keys() else "nothing"
    matched = match(model.table, model.template.shapes, checkpoint.shapes, str(checkpoint.directory), anew=anew)
    rows = {row.ours: row for row in model.table.rows}
    for path, theirs in matched.loaded.items():
        if path not in own:
            if (path, theirs) not in shared:
                shared[path, theirs] = jnp.asarray(take(rows[path], checkpoint.read(theirs)), jnp.float32)
            own[path] = shared[path, theirs]
    missing = sorted(set(model.template.keys) - own.keys())
    if missing:
        raise ModelError(
            f"{where}: {missing[0]} is neither in the base nor in the adapter; give the base it was made for"
        )
    return {path: own[path] for path in sorted(own)}
