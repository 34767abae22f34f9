"""Every knob of a run, with one line of doc each. The tree mirrors the rooms of the package.

Each section is handed to the room that it names; nothing below `run.py` sees the whole `Config`. Checks that need one
section live in it, checks across sections live in `Config`. Must not know jax, a model family or a file on disk.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # jax would use no more of it
Paths = str | list[str]


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Seeds(Section):
    """One seed for each kind of chance; `seed: 7` sets all three."""

    init: Seed = 0
    """Initial values of whatever the checkpoint does not hold (the new head)."""
    data: Seed = 0
    """Order of the training rows, and the split where the source has none."""
    dropout: Seed = 0
    """Dropout masks."""

    @model_validator(mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return {"init": value, "data": value, "dropout": value} if whole else value


class RunSection(Section):
    """Where the run lives."""

    dir: str = "runs/default"
    """Directory for the configuration, manifest, metrics, checkpoints and the exported model."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto` goes on where a matching run stopped, `never` refuses a used directory, `must` refuses an empty one."""


class ModelSection(Section):
    """Which pretrained checkpoint to start from."""

    source: str
    """A local directory, a hub name such as `bert-base-uncased`, or a packaged asset such as `asset:minilm`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; a commit makes the run reproducible."""
    head: Literal["auto", "new"] = "auto"
    """`auto` keeps a head of the right kind that the checkpoint holds, `new` always begins with a fresh one."""
    dropout: Share | None = None
    """Overrides every dropout rate of the checkpoint's `config.json`; null keeps them."""


class SequenceClassification(Section):
    """One label for each row of one or two texts."""

    kind: Literal["sequence_classification"]
    text: str = "text"
    """Column that holds the text."""
    text_pair: str | None = None
    """Column that holds a second text (premise and hypothesis, question and passage)."""
    label: str = "label"
    """Column that holds the label: a name, or a number from 0."""
    labels: list[str] | None = None
    """Names of the labels in the order of their numbers; null takes them from the source or the sorted values."""


class Files(Section):
    """Local CSV, TSV, JSON lines, Parquet or Arrow files."""

    kind: Literal["files"]
    train: Paths
    """File or files to train on."""
    validation: Paths | None = None
    """File or files to validate on while training."""
    test: Paths | None = None
    """File or files for the one test at the end."""


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

    kind: Literal["packed", "bucketed", "padded"] = "packed"
    """`packed`: several documents a row, isolated; `bucketed`: a few lengths; `padded`: one length."""
    length: Positive | None = None
    """Tokens in a row; null takes the longest document, rounded up to a multiple of 8."""
    buckets: Positive = 2
    """Shapes made for the usual batch: lengths when bucketed, numbers of rows when packed; each is compiled."""


class DataSection(Section):
    """Which rows, and how they become batches."""

    source: Annotated[Files | Hub, Field(discriminator="kind")]
    """Where the rows come from."""
    split: Split = Split()
    """Shares cut from the training rows where the source has no such split."""
    max_length: Positive = 128
    """Longest document in tokens, special tokens included; longer ones are cut, and counted."""
    layout: Layout = Layout()
    """How documents become rectangles."""
    max_rows: Positive | None = None
    """Keep only the first rows of each split; for trials."""
    prefetch: Positive = 4
    """Batches prepared ahead in the background."""


class Schedule(Section):
    """Learning rate over the steps of the run."""

    kind: Literal["linear", "cosine", "constant", "inverse_sqrt", "wsd"] = "linear"
    """Shape after the warmup; `wsd` is warmup, stable, decay."""
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Linear warmup: a share of all steps when below 1, else a number of steps."""
    end: Share = 0.0
    """Rate at the last step, as a share of `optim.lr` (linear, cosine and wsd)."""
    decay: Share = 0.2
    """Share of all steps that the decay of `wsd` takes."""


class Group(Section):
    """What differs for the parameters whose path fits a pattern; the first group that fits wins."""

    match: str
    """Pattern over parameter paths."""
    lr_scale: Annotated[float, Field(ge=0)] | None = None
    """Factor on the learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Decoupled weight decay in place of `optim.weight_decay`."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.lr_scale is None and self.weight_decay is None:
            raise ValueError("a group that changes nothing; give lr_scale or weight_decay")
        return self


class OptimSection(Section):
    """Optimizer, schedule, decay and clipping."""

    name: str = "adamw"
    """Any optimizer of optax by its name there."""
    options: dict[str, float | int | bool | str] = {}
    """Further arguments of that optimizer, such as `b2: 0.98`."""
    lr: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay, multiplied by the current learning rate."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global norm of the gradient; null does not clip."""
    schedule: Schedule = Schedule()
    """Learning rate over the steps."""
    groups: list[Group] = [Group(match="**/{bias,scale}", weight_decay=0.0)]
    """Exceptions by pattern, in order; the default keeps decay off biases and norms."""


class TrainSection(Section):
    """How long and how to train."""

    epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the training rows; ignored when `steps` is given."""
    steps: Positive | None = None
    """Optimizer steps in all."""
    batch_size: Positive = 32
    """Documents per optimizer step, over all devices, hosts and microbatches."""
    accumulate: Positive = 1
    """Microbatches that a step is computed in; the result does not depend on it."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the arithmetic; trainable parameters and moments stay float32."""
    freeze: list[str] = []
    """Patterns of parameters that stay as they are."""
    log_every: Positive = 10
    """Steps between two lines of metrics."""


class EvalSection(Section):
    """When to validate, and what counts as best."""

    every: Literal["epoch", "never"] | Positive = "epoch"
    """Validate after each epoch, or after this many steps; always at the end unless `never`."""
    batch_size: Positive = 128
    """Documents per evaluation batch."""
    best_metric: str = "f1_macro"
    """Metric of the validation split that picks the best checkpoint."""
    best_mode: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""
    baselines: bool = False
    """Also score the majority class and TF-IDF with logistic regression on the test split."""


class CheckpointSection(Section):
    """What is kept of the way."""

    every: Positive | None = None
    """Steps between two checkpoints; null saves whenever the run validates."""
    keep: Positive = 2
    """How many of the latest checkpoints stay; the best one stays besides."""


class MeshSection(Section):
    """Devices along each axis; -1 takes what is left."""

    data: Annotated[int, Field(ge=-1)] = -1
    """Axis that only the batch is divided over."""
    fsdp: Positive = 1
    """Axis that the batch, parameters and optimizer state are divided over."""
    tensor: Positive = 1
    """Axis that the heads and the hidden layer of each block are divided over."""

    @model_validator(mode="after")
    def _no_empty_axis(self) -> Self:
        if self.data == 0:
            raise ValueError("data: an axis of 0 devices; give -1 for all that are left, or a count")
        return self


class Config(Section):
    """A whole run."""

    run: RunSection = RunSection()
    seed: Seeds = Seeds()
    model: ModelSection
    task: SequenceClassification
    data: DataSection
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    mesh: MeshSection = MeshSection()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        train, data, evaluation = self.train, self.data, self.eval
        if train.batch_size % train.accumulate:
            raise ValueError(
                f"train.batch_size: {train.batch_size} is not divisible by train.accumulate "
                f"({train.accumulate}); make one a multiple of the other"
            )
        if data.layout.length is not None and data.layout.length < data.max_length:
            raise ValueError(
                f"data.layout.length: {data.layout.length} tokens cannot hold a document of "
                f"data.max_length ({data.max_length}); lower max_length or leave length out"
            )
        named = data.source.validation is not None or data.split.validation > 0
        if not named and evaluation.every != "never":
            raise ValueError(
                "eval.every: there is no validation split; name data.source.validation, "
                "set data.split.validation, or set eval.every=never"
            )
        return self
