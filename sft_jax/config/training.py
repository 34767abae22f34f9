"""How a model is trained, validated and kept."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sft_jax.config.section import NotNegative, Positive, Section, Seed, Share


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


class HeadGrid(Section):
    """Heads on features that are computed once, trained side by side; the best pair by validation is the run's."""

    lr: list[Annotated[float, Field(gt=0)]] = []
    """Peak learning rates; none takes `optim.lr`."""
    weight_decay: list[NotNegative] = []
    """Weight decays; none takes `optim.weight_decay`."""
    seeds: list[Seed] = []
    """Seeds of initial values, order and dropout that each pair is judged by the mean of; none takes the run's own."""

    @model_validator(mode="after")
    def _has_points(self) -> Self:
        if not (self.lr or self.weight_decay or self.seeds):
            raise ValueError("a grid of one point; give lr, weight_decay or seeds")
        return self


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
    attention: Literal["auto", "xla", "cudnn", "flash", "splash"] = "auto"
    """What computes self-attention: for rows of 128 tokens and more on a GPU in bfloat16 `auto` takes cuDNN or, where
    the model has dropout there, `flash`, our kernel; for rows of 1,024 and more on a TPU, of a model without dropout
    there, `splash`, which is jax's; else XLA."""
    scan: Literal["auto", "always", "never"] = "auto"
    """Whether layers that are alike are held as one array and scanned over, so that one is compiled for all of them:
    `auto` does in stacks of 16 or more; results and files are the same."""
    remat: Literal["none", "dots", "full", "offload"] = "none"
    """What is computed again for the gradient instead of being kept: nothing, all of a block but its products, all of a
    block; `offload` keeps the products in the host's memory."""
    freeze: list[str] = []
    """Patterns of parameters that stay as they are, but for those that `unfreeze` names."""
    cache_features: Literal["auto", "always", "never"] = "auto"
    """Where all below the head is frozen, compute what the head reads once and keep it: `auto` where that changes
    nothing, `always` also where there is dropout below the head, which is then left out, `never`."""
    head_grid: HeadGrid | None = None
    """Rates and decays to choose from before the head is trained; null takes those of `optim`."""
    unfreeze: list[Unfreeze] = []
    """Patterns of parameters that stay as they are until a later step, whether `freeze` names them or not, and are
    trained from then on; the first that fits wins. Statistics of norms that `freeze` names stay as they are."""
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
    profile: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """First and last step of a trace in `run.dir/profile`, for xprof and TensorBoard's profiler; null makes none."""

    @model_validator(mode="after")
    def _profiles_forwards(self) -> Self:
        if self.profile and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile: ends at step {self.profile[1]}, before it begins; give the first step first")
        return self


class EvalSection(Section):
    """When to validate, and what counts as best."""

    every: Literal["epoch", "never"] | Positive = "epoch"
    """Validate after each epoch, or after this many steps; always at the end unless `never`."""
    batch_size: Positive = 128
    """Documents per evaluation batch."""
    best_metric: str | None = None
    """Metric that picks the best checkpoint: on the validation split, of equals the earlier; null takes the task's
    headline."""
    best_mode: Literal["auto", "max", "min"] = "auto"
    """Whether more or less of it is better; `auto` knows for every metric there is."""
    patience: Positive | None = None
    """Stop after so many validations in a row without a better one; null never stops early."""
    min_delta: NotNegative = 0.0
    """By how much a validation must be better to count as better."""
    answers: Annotated[int, Field(ge=0)] = 100
    """Of tasks that score what they write: how many of the first rows of a split are answered; 0 scores none."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Of tasks that answer in words: how many of the first validation rows are answered at each validation."""
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
