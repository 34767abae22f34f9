"""Rows of a data set that `tensorflow_datasets` prepared as array records. Reads files alone: no code that comes with a
data set is imported, nothing is downloaded, and TensorFlow is not needed.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets import Features

from sft_jax.config.data import Tfds
from sft_jax.data.gather import Gathered, blocks
from sft_jax.data.images import FEATURE
from sft_jax.data.records import Problem, read_text
from sft_jax.data.rows import Rows
from sft_jax.errors import DataError, reason

HOME = "~/tensorflow_datasets"
AT_ONCE = 1000  # records that are read together


def load_tfds(source: Tfds, split: str, where: str) -> Rows:
    """The rows of a split or a slice; texts, labels, numbers, lists of these and encoded images are columns."""
    import tensorflow_datasets as tfds  # takes seconds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    logging.getLogger("absl").setLevel(logging.ERROR)
    described: dict[str, Any]
    records: Any
    home = Path(source.data_dir or HOME)
    try:
        builder = cast(Any, builder_from_files)(source.name, data_dir=home.expanduser())
        records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        described = {**builder.info.features}
    except Exception as error:  # many kinds, all of which mean: not there, or not in this form
        raise DataError(
            f"{where}: '{source.name}' (split '{split}') is not to be had from {home} "
            f"({reason(error)}); prepare it with file_format='array_record', and check name, split and data_dir"
        ) from None
    kinds = {name: kind for name, feature in described.items() if (kind := _kind(tfds.features, feature)) is not None}
    if not kinds:
        raise DataError(
            f"{where}: '{source.name}' has no texts, images, labels or numbers; it has {', '.join(described)}"
        )
    images = {name for name, kind in kinds.items() if isinstance(kind, datasets.Image)}
    encoded = {name: tfds.features.Text() for name in images}  # bytes, as records have them
    part: Any = tfds.features.FeaturesDict({**{name: described[name] for name in kinds}, **encoded})
    features = Features(kinds)
    schema = features.arrow_schema
    found = Gathered(where, ["row"])

    def examples(number: int, data: Any) -> Iterator[tuple[int, dict[str, Any] | Problem]]:
        for begin in range(0, len(data), AT_ONCE):
            held = data.__getitems__(range(begin, min(begin + AT_ONCE, len(data))))
            for row, record in enumerate(held, begin + 1):
                if not record:  # what array_record gives for what was cut off
                    raise ValueError(f"row {row} is empty, so the file was cut")
                yield row, _plain_row(part.deserialize_example_np(record), images)

    try:
        tables = [pa.Table.from_pylist(block, schema) for block in blocks([records], examples, found)]
    except DataError:
        raise
    except Exception as error:  # array_record raises many kinds for broken files
        raise DataError(f"{where}: '{source.name}' cannot be read ({reason(error)}); prepare it again") from None
    return found.rows(pa.concat_tables(tables) if tables else schema.empty_table(), features=features)


def _kind(known: Any, feature: Any) -> Any:
    """The type of a column, None for what is no column."""
    if type(feature) is known.Image:
        return FEATURE
    if type(feature) is known.ClassLabel:
        return datasets.ClassLabel(names=feature.names) if feature.names else datasets.Value("int64")
    if type(feature) is known.Sequence:
        inner = _kind(known, feature.feature)
        return None if inner in (None, FEATURE) else datasets.List(inner)
    if type(feature) not in (known.Text, known.Tensor, known.Scalar) or len(feature.shape) > 1:
        return None
    kind = np.dtype(feature.np_dtype)
    value = datasets.Value("string" if kind.kind in "OSU" else kind.name)
    return datasets.List(value) if feature.shape else value


def _plain_row(example: dict[str, Any], images: set[str]) -> dict[str, Any] | Problem:
    found = {
        name: {"bytes": bytes(value), "path": None} if name in images else _plain(value)
        for name, value in example.items()
    }
    for name, value in found.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Problem):
                return Problem(one.reason, f"{name}: {one.text}")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return read_text(value)
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
