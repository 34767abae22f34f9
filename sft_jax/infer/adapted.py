"""Several adapters on one base: rows say which of them answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sft_jax.adapt.peft import Found, read
from sft_jax.data.rows import Bad, Rows, refuse
from sft_jax.errors import ConfigError, DataError, ModelError, did_you_mean
from sft_jax.infer.predict import Predictor, make_predictor, of_texts, say_remarks
from sft_jax.models.family import Model, build_model, settled
from sft_jax.nn.template import Params
from sft_jax.tasks.task import Record, Task, restore_task
from sft_jax.weights.files import CONFIG, Checkpoint, find, open_checkpoint, read_config
from sft_jax.weights.table import match, take

COLUMN = "adapter"


@dataclass(frozen=True)
class Adapted:
    """A base with adapters, each with the task that it was trained for: rows in, records out."""

    predictors: dict[str, Predictor]

    @property
    def task(self) -> Task:
        """That of the first adapter."""
        return next(iter(self.predictors.values())).task

    def __call__(
        self, rows: Rows | Sequence[str], batch_size: int = 32, *, raw: bool = False, score: bool = False
    ) -> Iterator[Record]:
        """A record for each row (or text), in order, by the adapter that its field `adapter` names; one may be left
        out where there is but one."""
        rows = rows if isinstance(rows, Rows) else of_texts(self.task, rows)
        chosen = np.array(self._chosen(rows), dtype=object)
        places = {name: np.flatnonzero(chosen == name) for name in self.predictors}
        answers = {
            name: self.predictors[name].numbered(rows.select(places[name]), batch_size, raw=raw, score=score)
            for name in self.predictors
            if len(places[name])
        }
        following = {name: next(found, None) for name, found in answers.items()}
        for row, name in enumerate(chosen):
            while (found := following[name]) is not None and places[name][found[0]] == row:
                yield found[1]
                following[name] = next(answers[name], None)

    def _chosen(self, rows: Rows) -> list[str]:
        """The adapter of each row."""
        known = ", ".join(self.predictors)
        if COLUMN not in rows.names:
            if len(self.predictors) > 1:
                raise DataError(
                    f"{rows.where}: no column '{COLUMN}', and there are several: {known}; name one in each row"
                )
            return [*self.predictors] * len(rows)
        names = rows.column(COLUMN)
        bad = [
            Bad(
                rows.place(row),
                "unknown adapter",
                f"adapter {n!r:.60}{did_you_mean(str(n), self.predictors)} (known: {known})",
            )
            for row, n in enumerate(names)
            if n not in self.predictors
        ]
        refuse(rows.where, bad)
        return names


def load_adapted(source: str, adapters: Sequence[str], settings: Sequence[str] = ()) -> Adapted:
    """The model in a directory, in memory once, with adapters `NAME=DIRECTORY`; settings as in `load_predictor`."""
    checkpoint, shared, found = open_checkpoint(find(source)), {}, {}
    for given in adapters:
        name, equals, directory = given.partition("=")
        if not (equals and name and directory) or name in found:
            raise ConfigError(f"--adapter {given}: expected NAME=DIRECTORY, each name once")
        found[name] = _load(checkpoint, find(directory), shared, settings)
    return Adapted(found)


def _load(
    checkpoint: Checkpoint, directory: Path, shared: dict[tuple[str, str], Array], settings: Sequence[str]
) -> Predictor:
    """What answers by one adapter; arrays of the base that others have loaded are taken from them."""
    ours = (directory / CONFIG).is_file()  # PEFT's own have none, and are for the task of the base
    config = read_config(directory) if ours else checkpoint.config
    task = restore_task(config, str(directory))
    checkpoint = settled(checkpoint, task.head)
    say_remarks(checkpoint)
    plain = build_model(checkpoint.config, task.head, str(checkpoint.directory))
    found = read(directory, plain.table, plain.template.shapes)
    model = build_model(checkpoint.config, task.head, str(checkpoint.directory), adapter=found.plan)
    params = _params(checkpoint, model, found, shared, str(directory))
    return make_predictor(config, directory if ours else checkpoint.directory, task, model, params, settings)


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
