"""Where rows come from: local files, folders, the hub, TFDS, or several of these mixed; as random-access rows.

Nothing here runs code that comes with data. Knows no task and no tokenizer.
"""

import glob
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from sft_jax.archives import ENDINGS
from sft_jax.config.data import Files, Hub, Mixture, Tfds
from sft_jax.data.arrays import is_idx, read_arrays, read_idx
from sft_jax.data.folders import is_folder, read_folders
from sft_jax.data.gather import shown
from sft_jax.data.mixture import mix
from sft_jax.data.rows import Rows, numbered, refuse
from sft_jax.data.tables import read_conll, read_csv, read_json, read_lines
from sft_jax.data.tfds import load_tfds
from sft_jax.errors import DataError, reason

SPLITS = ("train", "validation", "test")
CONLL = (".conll", ".iob", ".iob2", ".bio")
Reader = Callable[..., Rows]  # (files, where), and what is said of them


def load_rows(source: Files | Hub | Tfds | Mixture, where: str = "data.source") -> dict[str, Rows]:
    """The splits that a source names, each as random-access rows; local paths must be local by now."""
    if isinstance(source, Mixture):
        rows = _load_parts(source, where)
    else:
        named = {split: getattr(source, split) for split in SPLITS if getattr(source, split)}
        rows = {split: _load_split(source, name, f"{where}.{split}") for split, name in named.items()}
    for found in rows.values():
        if not len(found):
            refuse(found.where, found.bad)
            raise DataError(f"{found.where}: holds no row; give a source with some")
    return rows


def load_files(files: Sequence[str], where: str, encoding: str | None = None, delimiter: str | None = None) -> Rows:
    """The rows of some files of one kind, or of folders and archives of texts or images, in order.

    What is no row stands in `bad` and is to be judged by the caller; what concerns a whole file is a DataError.
    """
    kinds = sorted({"folder" if is_folder(file) else _ending(file) for file in files})
    if len(kinds) != 1 or kinds[0] not in READERS:
        named = [kind for kind in READERS if kind.startswith(".")]
        raise DataError(
            f"{where}: files ending in {', '.join(kinds) or 'nothing'}; give files of one kind among "
            f"{', '.join(named)}, images in IDX form, or folders of texts or images, also packed "
            f"({', '.join(ENDINGS)})"
        )
    said: dict[str, Any] = {}
    for name, value, those in (("encoding", encoding, ENCODED), ("delimiter", delimiter, SEPARATED)):
        if value is not None:
            if kinds[0] not in those:
                setting = f"{where.rpartition('.')[0]}.{name}"
                raise DataError(f"{setting}: is of files ending in {', '.join(those)}, not {kinds[0]}; leave it out")
            said[name] = value
    rows = READERS[kinds[0]](files, where, **said)
    if not len(rows) and not rows.bad:
        raise DataError(f"{where}: {', '.join(files)} holds no row; give files with some")
    return rows


def _ending(file: str) -> str:
    """The ending that says what a file is, without that of `gzip` where it may be there; IDX files have none."""
    if is_idx(file):
        return "idx"
    path = Path(file.lower())
    inner = Path(path.stem).suffix
    return inner if path.suffix == ".gz" and inner in PACKED else path.suffix


def _load_split(source: Files | Hub | Tfds, named: str | list[str], where: str) -> Rows:
    if isinstance(source, Files):
        return load_files([named] if isinstance(named, str) else named, where, source.encoding, source.delimiter)
    assert isinstance(named, str)
    if isinstance(source, Tfds):
        return load_tfds(source, named, where)
    return numbered(_load_hub(source, named, where.rpartition(".")[0]), where)


def _load_parts(source: Mixture, where: str) -> dict[str, Rows]:
    names = [part.name for part in source.parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{where}.parts: {', '.join(twice)} stands twice; give each part a name of its own")
    parts = [load_rows(part.source, f"{where}.parts.{part.name}") for part in source.parts]
    return {
        split: mix(
            [(n, rows.get(split)) for n, rows in zip(names, parts, strict=True)], f"{where}.{split}", source.column
        )
        for split in SPLITS
        if any(split in rows for rows in parts)
    }


def _load_built(files: Sequence[str], where: str, builder: str) -> Rows:
    """Files in a form of Arrow, through `datasets`."""
    found = [Path(f).expanduser().resolve() for f in files]
    local = [glob.escape(str(f)) if f.exists() else str(f) for f in found]  # `datasets` reads names as patterns
    _quiet()
    try:
        table = datasets.load_dataset(builder, data_files=local, split="train")
        counts = [pyarrow.parquet.read_metadata(f).num_rows for f in found] if builder == "parquet" else []
    except (DatasetGenerationError, OSError, ValueError, StopIteration) as error:
        if len(files) > 1:  # a column may be of other types in them, which is for those who read it
            parts = [
                (name, _load_built([file], where, builder)) for name, file in zip(shown(files), files, strict=True)
            ]
            return replace(mix(parts, where, None), part=None)
        cause = error.__cause__ or error
        why = "it holds no row" if isinstance(cause, StopIteration) else reason(cause, 200)
        raise DataError(f"{where}: {', '.join(files)} cannot be read as {builder} ({why}); mend the file") from None
    assert isinstance(table, Dataset)
    names = [f"{name}, row" for name in shown(files)]
    if len(files) == 1:
        return numbered(table, where, names[0])
    if sum(counts) != len(table):
        return numbered(table, where)
    file = np.repeat(np.arange(len(files), dtype=np.int32), counts)
    row = np.concatenate([np.arange(1, count + 1) for count in counts])
    return Rows(table, where, tuple(names), file, row)


READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".tsv": partial(read_csv, usual="\t"),
    ".jsonl": read_json,
    ".json": read_json,
    ".txt": read_lines,
    **dict.fromkeys(CONLL, read_conll),
    ".parquet": partial(_load_built, builder="parquet"),
    ".arrow": partial(_load_built, builder="arrow"),
    ".npz": read_arrays,
    ".npy": read_arrays,
    "idx": read_idx,
    "folder": read_folders,
}
SEPARATED = (".csv", ".tsv")
PACKED = (".csv", ".tsv", ".jsonl", ".json", ".txt", *CONLL)  # which may be packed by gzip: `reviews.csv.gz`
ENCODED = (*PACKED, "folder")


def _load_hub(source: Hub, split: str, where: str) -> Dataset:
    _quiet()
    if Path(source.name).expanduser().is_dir():
        return _load_saved(source, split, where)
    try:
        rows = datasets.load_dataset(source.name, source.config, split=split, revision=source.revision)
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        raise DataError(
            f"{where}: '{source.name}' (split '{split}') is not to be had from the hub ({reason(error)}); "
            f"check name, split and network, or give local files"
        ) from None
    assert isinstance(rows, Dataset)
    return rows


def _load_saved(source: Hub, split: str, where: str) -> Dataset:
    try:
        saved = datasets.load_from_disk(str(Path(source.name).expanduser()))
    except Exception as error:  # a damaged directory raises many kinds
        raise DataError(
            f"{where}: '{source.name}' cannot be read ({reason(error)}); give a directory that save_to_disk wrote"
        ) from None
    if isinstance(saved, Dataset):  # of one split: it must not stand for another as well
        saved = {"train": saved}
    if split not in saved:
        raise DataError(f"{where}: '{source.name}' has no split '{split}'; it has {', '.join(map(str, saved))}")
    return saved[split]


def _quiet() -> None:
    """No progress bars, and no log lines ahead of our own message."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
