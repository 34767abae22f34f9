"""Every knob of a run, with one line of doc each. The tree mirrors the rooms of the package.

Each section is handed to the room that it names; nothing below `run.py` sees the whole `Config`. Checks that need one
section live in it, checks across sections live in `Config`. Must not know jax, a model family or a file on disk.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
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
    resume: Literal["auto", "never", "must", "strict", "restart"] = "auto"
    """`auto` goes on from the newest valid checkpoint, `never` refuses a used directory, `must` refuses an empty one,
    `strict` also refuses a damaged newest checkpoint, `restart` moves all checkpoints aside and begins again."""
    resume_step: Positive | None = None
    """Go on from this checkpoint; later ones are moved aside."""

    @model_validator(mode="after")
    def _has_checkpoints(self) -> Self:
        if self.resume_step is not None and self.resume in ("never", "restart"):
            raise ValueError(f"resume_step: {self.resume_step} goes on, and resume={self.resume} does not; keep one")
        return self


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
    embedding_noise: NotNegative = 0.0
    """NEFTune: uniform noise on the embeddings while training, this number over the root of length times width."""


class Texts(Section):
    """The columns of one or two texts, which every task on sequences begins with."""

    text: str = "text"
    """Column that holds the text."""
    text_pair: str | None = None
    """Column that holds a second text (premise and hypothesis, question and passage)."""


class SequenceClassification(Texts):
    """One label for each row of one or two texts."""

    kind: Literal["sequence_classification"]
    label: str = "label"
    """Column that holds the label: a name, or a number from 0."""
    labels: list[str] | None = None
    """Names of the labels in the order of their numbers; null takes them from the source or the sorted values."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """`focal` weighs rows down that are already right."""
    focal_gamma: NotNegative = 2.0
    """How steeply `focal` weighs down; 0 is cross-entropy."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over all labels."""
    class_weights: Literal["balanced"] | dict[str, NotNegative] | None = None
    """Weight of each label's rows in the loss: by name (1 where not named), or inverse to how often it occurs."""


class MultiLabelClassification(Texts):
    """Any number of labels for each row of one or two texts."""

    kind: Literal["multi_label_classification"]
    label: str | list[str] = "labels"
    """Column that holds the labels, a list or a text joined by `separator`; or several columns of 0 and 1."""
    separator: str = ","
    """What joins the labels of a row where they are one text."""
    labels: list[str] | None = None
    """Names of the labels in the order of their numbers; null takes the column names or the sorted values."""
    threshold: Share = 0.5
    """Probability from which on a label is predicted."""
    loss: Literal["binary_cross_entropy", "focal"] = "binary_cross_entropy"
    """`focal` weighs labels down that are already right."""
    focal_gamma: NotNegative = 2.0
    """How steeply `focal` weighs down; 0 is binary cross-entropy."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is moved to one half."""
    class_weights: Literal["balanced"] | dict[str, NotNegative] | None = None
    """Weight of each label's positive rows in the loss: by name (1 where not named), or negatives over positives."""


class Regression(Texts):
    """A number for each row of one or two texts."""

    kind: Literal["regression"]
    label: str = "score"
    """Column that holds the number."""
    loss: Literal["squared", "huber"] = "squared"
    """`huber` is squared near 0 and linear beyond, so that outliers count for less."""
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    """Where `huber` turns linear."""


class Files(Section):
    """Local CSV, TSV, JSON lines, Parquet, Arrow or text files, or folders (also packed) with a folder a label."""

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

    source: Annotated[Files | Hub | Tfds | Mixture, Field(discriminator="kind")]
    """Where the rows come from."""
    bad_rows: Literal["error", "drop"] = "error"
    """What becomes of rows that cannot be read or used: all are named, or dropped and counted."""
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
    """Train on this many rows of each class, drawn from `seed.data`; for studies with few labels."""
    max_length: Positive = 128
    """Longest document in tokens, special tokens included; longer ones are cut, and counted."""
    layout: Layout = Layout()
    """How documents become rectangles."""
    max_rows: Positive | None = None
    """Keep only the first rows of each split; for trials."""
    augment: Augment = Augment()
    """Changes to the tokens of training documents."""
    cache: bool = True
    """Keep tokenised rows in the user's cache, found again by what they were made from."""
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


class Penalty(Section):
    """Penalties that the loss gains, over the parameters that the pattern fits; unlike decay, they are coupled."""

    l1: NotNegative = 0.0
    """Factor on the sum of absolute values."""
    l2: NotNegative = 0.0
    """Factor on the sum of squares."""
    match: str = "**/kernel"
    """Pattern over parameter paths."""


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
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the rate from each block to the one below it, the embeddings lowest; 1 is one rate for all."""
    penalty: Penalty = Penalty()
    """Penalties on the size of parameters."""


class Unfreeze(Section):
    """Parameters that stay as they are at first: gradual unfreezing."""

    match: str
    """Pattern over parameter paths."""
    at: NotNegative
    """When they begin to be trained: a share of all steps when below 1, else a step."""


class Spikes(Section):
    """When a loss is a spike: above mean plus `sigma` standard deviations of the last `window` steps taken."""

    window: Annotated[int, Field(ge=2)] = 128
    """Steps that are looked back on; until there are so many, no step is a spike."""
    sigma: Annotated[float, Field(gt=0)] = 6.0
    """Standard deviations above the mean."""


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
    unfreeze: list[Unfreeze] = []
    """Patterns of parameters that are trained from a later step on; the first that fits wins."""
    r_drop: NotNegative = 0.0
    """R-Drop: factor on the divergence between two passes with different dropout; 0 makes one pass."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which is then what is evaluated and exported."""
    non_finite: Literal["halt", "skip"] = "halt"
    """What becomes of a step whose loss or gradient is not finite; `skip` leaves everything as it is, and counts."""
    spikes: Spikes | None = None
    """Skip, and count, steps whose loss is a spike; null skips none."""
    max_skipped: Positive = 10
    """Halt after so many skipped steps in a row."""
    log_every: Positive = 10
    """Steps between two lines of metrics."""


class EvalSection(Section):
    """When to validate, and what counts as best."""

    every: Literal["epoch", "never"] | Positive = "epoch"
    """Validate after each epoch, or after this many steps; always at the end unless `never`."""
    batch_size: Positive = 128
    """Documents per evaluation batch."""
    best_metric: str | None = None
    """Metric of the validation split that picks the best checkpoint; null takes accuracy (one label), f1_micro
    (several labels) or pearson (a number)."""
    best_mode: Literal["auto", "max", "min"] = "auto"
    """Whether more or less of it is better; `auto` knows for every metric there is."""
    patience: Positive | None = None
    """Stop after so many validations in a row without a better one; null never stops early."""
    min_delta: NotNegative = 0.0
    """By how much a validation must be better to count as better."""
    group: str | None = None
    """Column whose values part the rows into groups that are scored apart as well; shows bias."""
    baselines: bool = False
    """Also score what needs no pretrained model on the test split: the commonest answer, TF-IDF with a linear model."""


class CheckpointSection(Section):
    """What is kept of the way."""

    every: Positive | None = None
    """Steps between two checkpoints; null saves whenever the run validates."""
    keep: Positive = 2
    """How many of the latest checkpoints stay; the best one stays besides."""
    on_error: Literal["halt", "warn"] = "halt"
    """What a save that failed in the background means."""


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


class ReportSection(Section):
    """What is made of the metrics besides `metrics.jsonl`, TensorBoard events and `report.html`."""

    mistakes: Positive = 20
    """How many of the worst mistakes on the test split the report shows."""
    wandb: str | None = None
    """Project of Weights & Biases that the metrics are sent to as well; null sends nothing anywhere."""


class Config(Section):
    """A whole run."""

    run: RunSection = RunSection()
    seed: Seeds = Seeds()
    model: ModelSection
    task: Annotated[SequenceClassification | MultiLabelClassification | Regression, Field(discriminator="kind")]
    """What is learned from the rows."""
    data: DataSection
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    report: ReportSection = ReportSection()
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
        if train.r_drop and self.model.dropout == 0 and not self.model.embedding_noise:
            raise ValueError("train.r_drop: two passes are equal without dropout; raise model.dropout, or leave r_drop")
        named = data.source.validation not in (None, False) or data.split.validation > 0
        if not named and evaluation.every != "never":
            raise ValueError(
                "eval.every: there is no validation split; name data.source.validation, "
                "set data.split.validation, or set eval.every=never"
            )
        return self
