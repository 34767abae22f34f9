"""Blocks of columns on their way to be one table: in memory, and from a size on in files that are mapped.

Each block is kept in the form that its values have (`cells.py`); where a later one has another, the column is turned
into the form that holds both, here and nowhere else. Files are taken away as soon as they are mapped: nothing is left
behind.
"""

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from sft_jax.data.cells import NOTHING, Form, joined, packed, turned
from sft_jax.errors import DataError, reason

MOST_HELD = 1 << 28  # bytes of blocks in memory
Forms = dict[str, Form]
Block = dict[str, tuple[pa.Array, Form]]


class Store:
    """Takes blocks of columns, and gives one table."""

    def __init__(self, where: str) -> None:
        self.forms: Forms = {}  # of each column, in the order in which they were found
        self._where = where  # the setting that the rows come from
        self._blocks: list[tuple[int, Block]] = []  # (rows, columns) in memory
        self._held = 0  # bytes of these
        self._files: list[tuple[Forms, str]] = []  # (forms, path) of those before them
        self._sink: Any = None  # the last file, which is open
        self._paths: list[str] = []  # of all files there ever were
        weakref.finalize(self, _remove, self._paths)  # also where reading ends in an error

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Keep a block, as many values of each column; a column of other blocks that it lacks is None in it."""
        count = len(next(iter(columns.values())))
        found = {name: packed(values) for name, values in columns.items()}
        block = {name: (array, form) for name, (array, form) in found.items() if isinstance(array, pa.Array)}
        if len(block) < len(found) and count > 1:  # more than an Arrow array has room for
            self.add({name: values[: count // 2] for name, values in columns.items()})
            self.add({name: values[count // 2 :] for name, values in columns.items()})
            return
        for name, (_, form) in block.items():
            self.forms[name] = joined((self.forms.get(name, Form(NOTHING)), form))
        self._blocks.append((count, block))
        self._held += sum(array.nbytes for array, _ in block.values())
        if self._held > MOST_HELD:
            self._spill()

    def table(self) -> pa.Table:
        """All blocks in order; afterwards the store is empty."""
        if not self._files:
            return pa.Table.from_batches(list(self._batches()), _schema(self.forms))
        self._spill()
        self._sink.close()
        table = pa.concat_tables([self._mapped(*file) for file in self._files])
        _remove(self._paths)
        return table

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """The blocks that are held, in the forms that columns have by now."""
        schema = _schema(self.forms)
        for count, block in self._blocks:
            nothing = pa.nulls(count), Form(NOTHING)
            arrays = [turned(*block.get(name, nothing), form) for name, form in self.forms.items()]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)
        self._blocks, self._held = [], 0

    def _spill(self) -> None:
        """Write the blocks that are held, into a new file where forms have changed."""
        try:
            if not self._files or self._files[-1][0] != self.forms:
                if self._files:
                    self._sink.close()
                self._files.append((dict(self.forms), self._new_file()))
                self._sink = pa.ipc.new_file(self._files[-1][1], _schema(self.forms))
            for batch in self._batches():
                self._sink.write_batch(batch)
        except OSError as error:
            raise self._no_room(error) from None

    def _mapped(self, forms: Forms, path: str) -> pa.Table:
        """The table that a file holds, turned into the final forms."""
        source = pa.ipc.open_file(pa.memory_map(path))
        if forms != self.forms:
            other = self._new_file()
            try:
                with pa.ipc.new_file(other, _schema(self.forms)) as sink:
                    for number in range(source.num_record_batches):
                        batch = source.get_batch(number)
                        self._blocks = [(len(batch), {name: (batch[name], form) for name, form in forms.items()})]
                        for made in self._batches():
                            sink.write_batch(made)
            except OSError as error:
                raise self._no_room(error) from None
            source = pa.ipc.open_file(pa.memory_map(other))
        return source.read_all()  # which holds the mapping, also once the file is gone

    def _new_file(self) -> str:
        handle, path = tempfile.mkstemp(prefix="sft_jax_", suffix=".rows")
        os.close(handle)
        self._paths.append(path)
        return path

    def _no_room(self, error: OSError) -> DataError:
        place = tempfile.gettempdir()
        return DataError(
            f"{self._where}: rows that do not fit into memory cannot be written to {place} ({reason(error)}); "
            f"make room there, or set TMPDIR to a directory that has some"
        )


def _remove(paths: Sequence[str]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _schema(forms: Forms) -> pa.Schema:
    return pa.schema([(name, form.kind) for name, form in forms.items()])
