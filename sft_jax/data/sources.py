"""Where rows come from: local files or the hub, through `datasets`, as random-access rows.

Nothing here runs code that comes with data. Knows no task and no tokenizer.
"""

import glob
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from sft_jax.config.schema import Files, Hub
from sft_jax.data.rows import Rows
from sft_jax.errors import DataError, reason

SPLITS = ("train", "validation", "test")
# Ending -> builder of `datasets` and its options. Words such as "NA" stay words.
BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}


def load_rows(source: Files | Hub) -> dict[str, Rows]:
    """The splits that a source names, each as random-access rows; local paths must be local by now."""
    named = {split: getattr(source, split) for split in SPLITS if getattr(source, split)}
    if isinstance(source, Hub):
        rows = {split: Rows(_load_hub(source, name), f"data.source.{split}") for split, name in named.items()}
    else:
        rows = {
            split: load_files([files] if isinstance(files, str) else files, f"data.source.{split}")
            for split, files in named.items()
        }
    empty = [split for split, found in rows.items() if not len(found)]
    if empty:
        raise DataError(f"data.source.{empty[0]}: holds no row; give a source with some")
    return rows


def load_files(files: list[str], where: str) -> Rows:
    """The rows of some files of one kind, in order."""
    endings = sorted({Path(f).suffix.lower() for f in files})
    unknown = [e for e in endings if e not in BUILDERS]
    if unknown or len(endings) != 1:
        raise DataError(
            f"{where}: files ending in {', '.join(endings) or 'nothing'}; "
            f"give files of one kind among {', '.join(BUILDERS)}"
        )
    builder, options = BUILDERS[endings[0]]
    found = [Path(f).expanduser().resolve() for f in files]
    local = [glob.escape(str(f)) if f.exists() else str(f) for f in found]  # `datasets` reads names as patterns
    _quiet()
    try:
        rows = datasets.load_dataset(builder, data_files=local, split="train", **options)
    except (DatasetGenerationError, OSError, ValueError, StopIteration) as error:
        cause = error.__cause__ or error
        why = "it holds no row" if isinstance(cause, StopIteration) else reason(cause, 200)
        raise DataError(f"{where}: {', '.join(files)} cannot be read as {builder} ({why}); mend the file") from None
    assert isinstance(rows, Dataset)
    return Rows(rows, where)


def _load_hub(source: Hub, split: str) -> Dataset:
    _quiet()
    if Path(source.name).expanduser().is_dir():
        return _load_saved(source, split)
    try:
        rows = datasets.load_dataset(source.name, source.config, split=split, revision=source.revision)
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        raise DataError(
            f"data.source: '{source.name}' (split '{split}') is not to be had from the hub ({reason(error)}); "
            f"check name, split and network, or give local files"
        ) from None
    assert isinstance(rows, Dataset)
    return rows


def _load_saved(source: Hub, split: str) -> Dataset:
    try:
        saved = datasets.load_from_disk(str(Path(source.name).expanduser()))
    except Exception as error:  # a damaged directory raises many kinds
        raise DataError(
            f"data.source: '{source.name}' cannot be read ({reason(error)}); give a directory that save_to_disk wrote"
        ) from None
    if isinstance(saved, Dataset):  # of one split: it must not stand for another as well
        saved = {"train": saved}
    if split not in saved:
        raise DataError(f"data.source: '{source.name}' has no split '{split}'; it has {', '.join(map(str, saved))}")
    return saved[split]


def _quiet() -> None:
    """No progress bars, and no log lines ahead of our own message."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
