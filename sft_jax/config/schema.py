"""Every knob of a run, with one line of doc each: `Config`, and the sections that have no file of their own.

The tree mirrors the rooms of the package: each section is handed to the room that it names, and nothing below `run.py`
sees the whole `Config`. Checks that need one section live in it, checks across sections live in `Config`. Must not know
jax, a model family or a file on disk.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sft_jax.config.adapter import AdapterSection
from sft_jax.config.data import DataSection
from sft_jax.config.metrics import metric_names, unknown_metric
from sft_jax.config.section import NotNegative, Positive, Section, Seed, Share
from sft_jax.config.tasks import TaskSection
from sft_jax.config.training import CheckpointSection, EvalSection, OptimSection, TrainSection


class Seeds(Section):
    """One seed for each kind of chance; `seed: 7` sets all of them."""

    init: Seed = 0
    """Initial values of whatever the checkpoint does not hold (the new head)."""
    data: Seed = 0
    """Order of the training rows."""
    dropout: Seed = 0
    """Dropout masks."""
    split: Seed = 0
    """The split where the source has none, and what `data.per_class` draws; as `data` where it is not given."""

    @model_validator(mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole:
            return {"init": value, "data": value, "dropout": value, "split": value}
        return {"split": value.get("data", 0), **value} if isinstance(value, dict) else value


class RunSection(Section):
    """Where the run lives."""

    dir: str = "runs/default"
    """Directory for the configuration, manifest, metrics, checkpoints and the exported model."""
    resume: Literal["auto", "never", "must", "strict", "restart"] = "auto"
    """`auto` goes on from the newest valid checkpoint, `never` refuses a used directory, `must` refuses an empty one,
    `strict` also refuses a damaged newest checkpoint, `restart` moves all checkpoints aside and begins again."""
    resume_step: Positive | None = None
    """Go on from this checkpoint; later ones are moved aside."""
    extend: bool = False
    """Go on with a run, also one that is done, to more `train.epochs` or `train.steps` than it was to have. Rows come
    in the order that they would have had; the learning rate is that of the new number of steps from there on."""
    deterministic: bool = False
    """On a GPU, the same bits each time: no kernel that adds up in whatever order, none picked by its speed. Costs
    speed, most where embeddings are trained, and is what CPUs and TPUs do anyway."""

    @model_validator(mode="after")
    def _has_checkpoints(self) -> Self:
        if self.resume_step is not None and self.resume in ("never", "restart"):
            raise ValueError(f"resume_step: {self.resume_step} goes on, and resume={self.resume} does not; keep one")
        if self.extend and self.resume in ("never", "restart"):
            raise ValueError(f"extend: goes on, and resume={self.resume} does not; keep one")
        return self


class ModelSection(Section):
    """Which pretrained checkpoint to start from."""

    source: str
    """A local directory, a hub name such as `bert-base-uncased`, or a packaged asset such as `asset:minilm`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; a commit makes the run reproducible."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` begins from `seed.init` and takes only sizes and tokenizer from the source: to learn from scratch."""
    head: Literal["auto", "new"] = "auto"
    """`auto` keeps a head of the right kind that the checkpoint holds, `new` always begins with a fresh one."""
    dropout: Share | None = None
    """Overrides every dropout rate of the checkpoint's `config.json`; null keeps them."""
    embedding_noise: NotNegative = 0.0
    """NEFTune: uniform noise on the embeddings while training, this number over the root of length times width."""


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
    task: Annotated[TaskSection, Field(discriminator="kind")]
    """What is learned from the rows."""
    data: DataSection
    train: TrainSection = TrainSection()
    adapter: AdapterSection | None = None
    """Train adapters of low rank in place of the model; null trains the model itself."""
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
        if data.layout.kind == "planned" and data.source.kind == "mixture":
            raise ValueError("data.layout.kind: planned packs know no shares of a mixture; set it to packed")
        if self.adapter and self.model.weights == "random":
            raise ValueError("adapter: adapts a pretrained model, and model.weights is random; leave one of them out")
        if train.r_drop and self.model.dropout == 0 and not self.model.embedding_noise:
            raise ValueError("train.r_drop: two passes are equal without dropout; raise model.dropout, or leave r_drop")
        if train.head_grid and train.head_grid.seeds and data.layout.kind == "planned":
            raise ValueError("train.head_grid.seeds: planned packs are of one seed; set data.layout.kind to packed")
        named = data.source.validation not in (None, False) or data.split.validation > 0
        if not named and evaluation.every != "never":
            raise ValueError(
                "eval.every: there is no validation split; name data.source.validation, "
                "set data.split.validation, or set eval.every=never"
            )
        known = metric_names(self.task)
        if evaluation.best_metric not in (None, *known):
            raise ValueError(f"eval.best_metric: {unknown_metric(self.task.kind, evaluation.best_metric, known)}")
        if train.head_grid and evaluation.every == "never":
            raise ValueError("train.head_grid: is chosen by validation, and eval.every is never; set it to epoch")
        return self
