"""Which rows there are, and how they become batches."""

import codecs
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sft_jax.config.section import NotNegative, Positive, Section, Share

Paths = str | list[str]


class Files(Section):
    """Local CSV, TSV, JSON, CoNLL, Parquet, Arrow, NumPy, IDX or text files, or folders (also packed) of labels."""

    kind: Literal["files"]
    train: Paths
    """File or files to train on."""
    validation: Paths | None = None
    """File or files to validate on while training."""
    test: Paths | None = None
    """File or files for the one test at the end."""
    encoding: str | None = None
    """Encoding of text files, such as `cp1252` or `utf-16`; null is UTF-8."""
    delimiter: str | None = None
    """What stands between the cells of CSV files, such as `;` or `tab`; null is a comma, in TSV files a tab."""

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        try:
            return value if value is None or not "a".encode(value) else codecs.lookup(value).name
        except (LookupError, UnicodeError, TypeError):
            raise ValueError(
                f"{value!r:.40} is no encoding of texts; give one such as utf-8, cp1252 or utf-16"
            ) from None

    @field_validator("delimiter")
    @classmethod
    def _is_one(cls, value: str | None) -> str | None:
        found = {"tab": "\t", "\\t": "\t"}.get(value or "", value)
        if found is not None and (len(found) != 1 or found in '"\r\n'):
            raise ValueError(f"{value!r:.40} is no single character; give one such as ';' or tab")
        return found


class Hub(Section):
    """A data set on the Hugging Face hub, or a directory that `datasets` has saved."""

    kind: Literal["hub"]
    name: str
    """Name on the hub such as `stanfordnlp/imdb`, or a directory written by `save_to_disk`."""
    config: str | None = None
    """Configuration of the data set."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    train: str = "train"
    """Split to train on; of the hub also a slice such as `train[:80%]`."""
    validation: str | None = None
    """Split to validate on while training."""
    test: str | None = None
    """Split for the one test at the end."""


class Tfds(Section):
    """A data set of `tensorflow_datasets`, prepared as array records; read without TensorFlow."""

    kind: Literal["tfds"]
    name: str
    """Name such as `imdb_reviews` or `glue/mrpc:2.0.0`."""
    data_dir: str | None = None
    """Directory that the data set was prepared in; null takes `~/tensorflow_datasets`."""
    train: str = "train"
    """Split to train on, or a slice such as `train[:80%]`."""
    validation: str | None = None
    """Split to validate on while training."""
    test: str | None = None
    """Split for the one test at the end."""


class Part(Section):
    """One source of a mixture."""

    name: str
    """What the part is called in reports and in `data.source.column`."""
    source: Annotated[Files | Hub | Tfds, Field(discriminator="kind")]
    """Where its rows come from; their validation and test rows are put one after the other."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the documents of an epoch, relative to the other parts; its rows are all read equally often."""


class Mixture(Section):
    """Several sources, mixed with weights; an epoch has as many documents as they have rows together."""

    kind: Literal["mixture"]
    parts: Annotated[list[Part], Field(min_length=1)]
    """The sources."""
    column: str | None = None
    """Column to make of the name of each row's part, for `eval.group` say."""

    @property
    def validation(self) -> bool:
        """Whether any part names a validation split."""
        return any(part.source.validation is not None for part in self.parts)


class Clean(Section):
    """What is done to every text before it is tokenised, in this order; exported, so that `predict` does it too."""

    html: bool = False
    """Take tags out and decode entities such as `&amp;`."""
    unicode: Literal["NFC", "NFKC"] | None = None
    """Unicode normal form."""
    whitespace: bool = False
    """Make each run of white space one blank, and trim both ends."""
    min_chars: Positive = 1
    """Rows with a shorter text are dropped, and counted; one without any text is a bad row."""
    max_chars: Positive | None = None
    """Rows with a longer text are dropped, and counted."""


class Augment(Section):
    """Changes to the tokens of training documents, drawn anew for each pass; special tokens stay."""

    token_dropout: Share = 0.0
    """Share of the tokens that become the unknown or mask token."""
    swap: Share = 0.0
    """Share of the tokens that change places with another one of the same text."""
    delete: Share = 0.0
    """Share of the tokens that are taken out; at least one stays."""


class Images(Section):
    """Changes to training images, drawn anew for each pass; validation and test images stay as they are."""

    flip: Share = 0.0
    """Share of the images that are mirrored left to right."""
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Random crop in place of the processor's resizing and cropping: the least share of an image that it keeps."""
    pad: Annotated[int, Field(ge=0)] = 0
    """Pixels of black around an image, of which a window of the old size is then cut at random."""
    rand_augment: Annotated[int, Field(ge=0)] = 0
    """RandAugment: operations on each image, out of fourteen; 0 makes none."""
    magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """How strong the operations of RandAugment are."""
    mixup: NotNegative = 0.0
    """Mixup: each image is blended with another of its batch, shares drawn from a beta distribution with this alpha."""
    cutmix: NotNegative = 0.0
    """Cutmix: a box of each image is another's, its share drawn so; with `mixup` too, one of both by chance."""


class Split(Section):
    """Stratified shares cut from the training rows where the source has no such split."""

    validation: Share = 0.0
    """Share to validate on while training."""
    test: Share = 0.0
    """Share for the one test at the end."""

    @model_validator(mode="after")
    def _leaves_rows(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together leave no row to train on; make them smaller")
        return self


class Layout(Section):
    """How the documents of a batch become a rectangle of tokens, from a declared set of shapes."""

    kind: Literal["packed", "planned", "bucketed", "padded"] = "packed"
    """`packed`: several documents a row, isolated; `planned`: the same over all documents, before training, and a step
    reads whole rows that hold about `train.batch_size` documents; `bucketed`: a few lengths; `padded`: one length."""
    length: Positive | None = None
    """Tokens in a row; null takes the longest document, rounded up to a multiple of 8."""
    buckets: Positive = 2
    """Shapes made for the usual batch: lengths when bucketed, numbers of rows when packed; each is compiled."""


class DataSection(Section):
    """Which rows, and how they become batches."""

    source: Annotated[Files | Hub | Tfds | Mixture, Field(discriminator="kind")]
    """Where the rows come from."""
    bad_rows: Literal["error", "drop"] = "error"
    """What becomes of rows that cannot be read or used: all are named, or dropped and counted."""
    most_bad: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the rows of a split that may be dropped as bad; more are an error, for it is seldom the rows then."""
    clean: Clean = Clean()
    """What is done to every text."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What becomes of rows of one split with equal texts and label, but for the first; counted either way."""
    conflicts: Literal["keep", "drop"] = "keep"
    """What becomes of training rows with equal texts and different labels; counted either way."""
    leakage: Literal["keep", "drop"] = "keep"
    """What becomes of training rows whose texts stand in validation or test too; counted either way."""
    split: Split = Split()
    """Shares cut from the training rows where the source has no such split."""
    per_class: Positive | None = None
    """Train on this many rows of each class, drawn from `seed.split`; for studies with few labels."""
    max_length: Positive = 128
    """Longest document in tokens, special tokens included; longer ones are cut, and counted."""
    layout: Layout = Layout()
    """How documents become rectangles."""
    max_rows: Positive | None = None
    """Keep only the first rows of each split; for trials."""
    augment: Augment = Augment()
    """Changes to the tokens of training documents."""
    images: Images = Images()
    """Changes to training images."""
    cache: bool = True
    """Keep tokenised rows, and prepared ones of large files, in the user's cache, found by what they were made from."""
    prefetch: Positive = 4
    """Batches prepared ahead in the background."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare the batches of training; 0 does it in threads of this one, which suits most images too."""
