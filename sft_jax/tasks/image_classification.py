"""One label for each image."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sft_jax import machine
from sft_jax.config.tasks import ImageClassification
from sft_jax.data.batch import Encoded
from sft_jax.data.images import read_images
from sft_jax.data.pixels import encode_pictures
from sft_jax.data.processor import load_processor, processor_files
from sft_jax.data.rows import Rows
from sft_jax.errors import ModelError
from sft_jax.tasks import baselines, classes
from sft_jax.tasks.task import Examples, Reader, Task, Texts, written


def build(section: ImageClassification, rows: Mapping[str, Rows]) -> Task:
    """The task on these rows; the labels are those of the configuration, the source, or the sorted values."""

    def encode(images: Texts, targets: Sequence[int] | None, processor: Any, max_length: int) -> Encoded:
        return encode_pictures(images[0], classes.numbers(targets, len(images[0])), processor)

    size: dict[str, Any] = {"size": section.size, "whole": section.whole}
    return classes.build(
        section,
        rows,
        {"kind": section.kind, "image": section.image},
        texts=(section.image,),
        read=lambda rows: read_images(rows, section.image, machine.cache_home() / "images"),
        columns=(section.image, section.label),
        encode=encode,
        baselines=baseline_scores,
        reader=Reader(partial(load_processor, **size), partial(processor_files, **size)),
        images=True,
    )


def restore(config: Mapping[str, Any]) -> ImageClassification:
    """The section that a `config.json` was written from; of a model that others trained, its label names."""
    if config.get("problem_type") not in (None, classes.PROBLEM):
        raise ModelError(f"config.json: problem_type is {config['problem_type']!r:.60}, expected {classes.PROBLEM}")
    names, image = classes.names_to_restore(config), written(config).get("image", "image")
    return ImageClassification(kind="image_classification", labels=names, image=image)


def baseline_scores(train: Examples, test: Examples) -> dict[str, float]:
    """Accuracy of the majority class and of logistic regression on the pixels of small images."""
    label, test_label = train.documents["label"], test.documents["label"]
    return {
        "majority class": baselines.commonest_class(label, test_label),
        "pixels + logistic regression": baselines.linear_pixels(train.texts[0], label, test.texts[0], test_label),
    }
