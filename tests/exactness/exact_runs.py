"""What the exactness tests share: small runs in directories of their own, real stops, digests and comparisons."""

import hashlib
import json
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bounds import in_double, widened

from sft_jax.config.read import read_config
from sft_jax.config.schema import Config
from sft_jax.data.batch import Batch, Shape, collate
from sft_jax.data.loader import TrainBatches
from sft_jax.errors import Interrupted
from sft_jax.jobs import train
from sft_jax.mesh import to_host
from sft_jax.run import Run, initial, prepare, train_program
from sft_jax.train.state import TrainState, beginning, place

TIMES = ("tokens_per_second", "waiting", "seconds_left")  # the fields of metrics.jsonl that hold times


def small_model(factory: pytest.TempPathFactory) -> Path:
    """A random BERT directory of one block, for what does not need two: it compiles in half the time."""
    from conftest import write_model  # not for the processes of `host_worker`, which take this module in as well

    home = factory.getbasetemp() / "small-bert"
    return home if home.exists() else write_model(home, {"num_hidden_layers": 1})


def settings(home: Path, model: Path, rows: Path, *overrides: str) -> Config:
    """A small run on one device in `home`: two epochs of seven steps on `rows`, each step reported."""
    base = [
        f"run.dir={home}",
        f"model.source={model}",
        "task.kind=sequence_classification",
        "data.source.kind=files",
        *(f"data.source.{split}={rows / split}.csv" for split in ("train", "validation", "test")),
        "data.max_length=32",
        "data.layout.buckets=1",
        "train.batch_size=8",
        "train.epochs=2",
        "train.log_every=1",
        "optim.lr=1e-3",
        "eval.batch_size=8",
        "mesh.data=1",
    ]
    return read_config([], [*base, *overrides])


@dataclass
class StopAfter:
    """A sink that sends this process a real SIGINT so that the loop stops at `step`; reports come a step late."""

    step: int

    def emit(self, kind: str, values: Mapping[str, Any]) -> None:
        """Ask to stop once the step before the wanted one is reported."""
        if kind == "train" and values["step"] == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)

    def stop(self) -> None:
        """Nothing is shown, so there is nothing to take away."""


def train_until(config: Config, step: int) -> None:
    """Train until a real signal stops the run at exactly this step."""
    with pytest.raises(Interrupted, match=f"stopped and saved at step {step} of") as caught:
        train(prepare(config), StopAfter(step))  # type: ignore[arg-type]
    assert caught.value.exit_code == 130


@dataclass(frozen=True)
class RecordedBatches(TrainBatches):
    """Training batches that write down which documents each step was given."""

    seen: dict[int, list[int]] = field(default_factory=dict)

    def __getitem__(self, step: int) -> Batch:
        batch = super().__getitem__(step)
        self.seen[step] = documents(batch)
        return batch


def recorded(run: Run) -> tuple[Run, dict[int, list[int]]]:
    """The same run, and which documents it has read at each step."""
    batches = RecordedBatches(run.batches.encoded, run.batches.order, run.batches.shapes, run.batches.steps)
    return replace(run, batches=batches), batches.seen


def documents(batch: Mapping[str, Any]) -> list[int]:
    """The documents in a batch, in the order that they stand in it."""
    index = np.asarray(batch["index"]).ravel()
    return index[index >= 0].tolist()


@dataclass(frozen=True)
class Steps:
    """What some steps of training came to."""

    state: TrainState
    losses: np.ndarray  # [steps], means
    norms: np.ndarray  # [steps], of the gradients
    weights: np.ndarray  # [steps]


def take_steps(run: Run, count: int, *, double: bool = False) -> Steps:
    """The first steps of a run with its own program, without a loop around it; `double`: all of it in float64."""
    given = initial(run)
    with in_double() if double else nullcontext():
        state, frozen = widened(given) if double else given
        program = train_program(run, state, frozen)
        found = []
        for number in range(count):
            batch = widened(run.batches[number]) if double else run.batches[number]
            state, metrics = program.compile(batch)(state, frozen, run.put(batch))
            found.append(jax.device_get(metrics))
    losses = [float(m["loss"].total) / float(m["loss"].weight) for m in found]
    norms = [float(m["grad_norm"]) for m in found]
    return Steps(state, np.array(losses), np.array(norms), np.array([float(m["loss"].weight) for m in found]))


def keeping_gradients() -> optax.GradientTransformation:
    """An optimizer that moves nothing and whose state is the gradient of the last step."""

    def init(params: optax.Params) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, gradients), gradients

    return optax.GradientTransformation(init, update)


def with_optimizer(run: Run, optimizer: optax.GradientTransformation) -> Run:
    """The same run with another optimizer."""
    begin = beginning(optimizer, run.config.train)
    placement = place(run.mesh, run.model.template, run.model.axes, run.frozen, begin)
    return replace(run, optimizer=optimizer, placement=placement)


def gradient(run: Run, step: int) -> dict[str, np.ndarray]:
    """The gradient of one step at the initial parameters, as the run's own program computes it in float64."""
    run = with_optimizer(run, keeping_gradients())
    given = initial(run)
    with in_double():
        (state, frozen), batch = widened(given), widened(run.batches[step])
        state, _ = train_program(run, state, frozen).compile(batch)(state, frozen, run.put(batch))
        return jax.device_get(state.opt)


def gradient_by_hand(run: Run, numbers: Sequence[int]) -> dict[str, np.ndarray]:
    """The sum of the gradients of some training documents, one document at a time, in float64.

    Neither the task's loss nor the run's layout has a part in it.
    """
    given = initial(run)
    template, encoded = run.model.template, run.data["train"]
    with in_double():
        state, frozen = widened(given)

        def loss(params: Any, batch: Any) -> Any:
            logits = template.bind({**params, **frozen})(batch)[0, 0]
            return -jax.nn.log_softmax(logits)[batch["label"][0, 0]]

        one = jax.jit(jax.grad(loss))
        shape = Shape(1, run.batches.shapes[-1].length, 1)
        found = [jax.device_get(one(state.params, widened(collate(encoded, [[int(d)]], shape)))) for d in numbers]
    return {path: sum(g[path] for g in found) for path in state.params}


def distance(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Norm of the difference by the norm of `one`, over the whole tree in float64.

    A leaf such as the bias of the keys has a gradient of exactly 0 in theory and of rounding noise in practice, so
    that a tolerance for each number by itself would compare noise with noise.
    """
    wide = {path: np.float64(one[path]) for path in one}
    return norm({path: wide[path] - other[path] for path in one}) / norm(wide)


def norm(tree: Mapping[str, np.ndarray]) -> float:
    """The Euclidean norm over all leaves, in float64."""
    return sum(float(np.square(np.float64(a)).sum()) for a in tree.values()) ** 0.5


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Every leaf on the host, by its path in the tree."""
    return {jax.tree_util.keystr(p): np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(to_host(tree))}


def differing(left: Any, right: Any) -> list[str]:
    """The leaves that are not the same bit for bit, or stand in one of the trees alone."""
    a, b = named_leaves(left), named_leaves(right)
    same = {n for n in a.keys() & b.keys() if a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes()}
    return sorted((a.keys() | b.keys()) - same)


def digest(tree: Any) -> str:
    """The sha256 of every leaf with its path."""
    made = hashlib.sha256()
    for name, array in sorted(named_leaves(tree).items()):
        made.update(f"{name} {array.dtype} {array.shape}".encode())
        made.update(array.tobytes())
    return made.hexdigest()


def metrics_lines(directory: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without the fields that hold times."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def losses_by_step(directory: Path) -> dict[int, float]:
    """The training loss that was reported for each step."""
    return {line["step"]: line["loss"] for line in metrics_lines(directory) if line["kind"] == "train"}
