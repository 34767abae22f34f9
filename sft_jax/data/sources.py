"""Where rows come from: local files or the hub, through `datasets`, as random-access rows.

Nothing here runs code that comes with data. Knows no task and no tokenizer.
"""

from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from sft_jax.config.schema import Files, Hub
from sft_jax.errors import DataError

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


def load_rows(source: Files | Hub) -> dict[str, Dataset]:
    """The splits that a source names, each as random-access rows; local paths must be local by now."""
    datasets.disable_progress_bars()
    named = {split: getattr(source, split) for split in SPLITS if getattr(source, split)}
    if isinstance(source, Hub):
        return {split: _load_hub(source, name) for split, name in named.items()}
    return {
        split: load_files([files] if isinstance(files, str) else files, f"data.source.{split}")
        for split, files in named.items()
    }


def load_files(files: list[str], where: str) -> Dataset:
    """The rows of some files of one kind, in order."""
    endings = sorted({Path(f).suffix.lower() for f in files})
    unknown = [e for e in endings if e not in BUILDERS]
    if unknown or len(endings) != 1:
        raise DataError(
            f"{where}: files ending in {', '.join(endings) or 'nothing'}; "
            f"give files of one kind among {', '.join(BUILDERS)}"
        )
    builder, options = BUILDERS[endings[0]]
    local = [str(Path(f).expanduser().resolve()) for f in files]
    try:
        rows = datasets.load_dataset(builder, data_files=local, split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise DataError(
            f"{where}: {', '.join(files)} cannot be read as {builder} ({reason:.200}); mend the file"
        ) from None
    assert isinstance(rows, Dataset)
    return rows


def _load_hub(source: Hub, split: str) -> Dataset:
    if Path(source.name).expanduser().is_dir():
        return _load_saved(source, split)
    try:
        rows = datasets.load_dataset(source.name, source.config, split=split, revision=source.revision)
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.source: '{source.name}' (split '{split}') is not to be had from the hub ({reason:.150}); "
            f"check name, split and network, or give local files"
        ) from None
    assert isinstance(rows, Dataset)
    return rows


def _load_saved(source: Hub, split: str) -> Dataset:
    try:
        saved = datasets.load_from_disk(str(Path(source.name).expanduser()))
    except (OSError, ValueError) as error:
        raise DataError(f"data.source: '{source.name}' was not written by save_to_disk ({error})") from None
    if isinstance(saved, Dataset):
        return saved
    if split not in saved:
        raise DataError(f"data.source: '{source.name}' has no split '{split}'; it has {', '.join(saved)}")
    return saved[split]


def column(rows: Dataset, name: str, where: str) -> list[Any]:
    """One column as a list; a missing one is an error that lists what was found."""
    if name not in rows.column_names:
        raise DataError(f"{where}: no column '{name}'; the rows have: {', '.join(rows.column_names)}")
    return rows[name][:]
