"""What is added to the plain objective is exactly that, in the compiled step of a run; and stopping early is exact."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from bounds import SAME, in_double, widened
from exact_runs import distance, gradient, settings, small_model, train_until

from sft_jax.errors import ConfigError
from sft_jax.jobs import train
from sft_jax.nn import random
from sft_jax.nn.template import Params, crc
from sft_jax.run import Run, initial, open_run, prepare
from sft_jax.train.checkpoint import Checkpoints, Progress
from sft_jax.train.loop import Plan, note, out_of_patience
from sft_jax.train.state import TrainState

DROP = ("model.dropout=0.3", "data.layout.kind=padded")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[..., Run]:
    """`ready("key=value", ...)`: a run of one block."""
    home, model = tmp_path_factory.mktemp("regularisation"), small_model(tmp_path_factory)
    return lambda *more: prepare(settings(home / "run", model, rows, *more))


def by_hand(run: Run, alpha: float, *, same_masks: bool = False) -> dict[str, np.ndarray]:
    """The gradient of R-Drop's objective at step 0 of its paper's formula, with the two passes' masks, in float64."""
    given = initial(run)
    with in_double():
        return _by_hand(run, *widened(given), run.put(widened(run.batches[0])), alpha, same_masks)


def _by_hand(run: Run, state: TrainState, frozen: Params, batch: Params, alpha: float, same_masks: bool) -> Params:
    stream = jax.random.fold_in(jax.random.key(run.config.seed.dropout), crc("dropout"))
    key = jax.random.fold_in(stream, 0)
    keys = key, key if same_masks else jax.random.fold_in(key, crc("r-drop"))
    weight = batch["weight"]

    def objective(params):
        model = run.model.template.bind({**params, **frozen})
        logs = [jax.nn.log_softmax(model(batch, key=random.from_jax(k))) for k in keys]
        right = [-jax.numpy.take_along_axis(p, batch["label"][..., None], axis=-1)[..., 0] for p in logs]
        (p, q), exp = logs, jax.numpy.exp
        apart = ((exp(p) * (p - q)).sum(-1) + (exp(q) * (q - p)).sum(-1)) / 2
        return (weight * (sum(right) / 2 + alpha * apart)).sum() / weight.sum()

    return jax.device_get(jax.jit(jax.grad(objective))(state.params))


def test_r_drop_is_two_passes_and_their_divergence(ready):
    """C1: the step's gradient is that of half the losses of two passes plus alpha times their symmetric divergence."""
    run = ready(*DROP, "train.r_drop=0.7")
    found = gradient(run, 0)
    assert distance(by_hand(run, 0.7), found) < SAME
    assert distance(by_hand(run, 0.0), found) > 1e-2, "the divergence counts"
    assert distance(by_hand(run, 0.7, same_masks=True), found) > 1e-2, "the passes differ"


def test_r_drop_without_dropout_is_refused(ready):
    """C26: two equal passes would be an option that does nothing."""
    with pytest.raises(ConfigError, match=r"train\.r_drop: two passes are equal without dropout; raise model\.dropout"):
        ready("model.dropout=0", "train.r_drop=1")


def plan(**given) -> Plan:
    """A plan that looks at accuracy."""
    plain = {"steps": 9, "log_every": 1, "eval_every": 1, "save_every": None}
    return Plan(**plain, best_metric="accuracy", best_mode="max", **given)


def stops(scores: list[float], **given) -> int | None:
    """After how many evaluations of these scores a run stops early."""
    progress = Progress()
    for number, score in enumerate(scores, start=1):
        progress.step = number
        note(progress, plan(**given), {"accuracy": score}, [])
        if out_of_patience(progress, plan(**given), []):
            return number
    return None


@pytest.mark.parametrize(
    ("scores", "given", "stopped"),
    [
        ([0.5, 0.6, 0.6, 0.5, 0.4], {"patience": 3}, 5),
        ([0.5, 0.6, 0.5, 0.4, 0.7, 0.6, 0.5], {"patience": 3}, None),
        ([0.5, 0.55, 0.58, 0.59], {"patience": 2, "min_delta": 0.1}, 3),
        ([0.9, 0.1, 0.1, 0.1], {}, None),
        ([0.9, 0.1], {"patience": 1}, 2),
    ],
)
def test_patience_counts_evaluations_since_the_best(scores, given, stopped):
    """C13: a run stops after `patience` evaluations none of which was better by more than `min_delta`."""
    assert stops(scores, **given) == stopped


def test_patience_survives_a_stop(tmp_path: Path, rows: Path, tmp_path_factory, monkeypatch):
    """C13: patience 3, stopped after 2 evaluations that were no better: after the resume one more ends the run."""
    scores = iter([0.9, 0.5, 0.4, 0.3, 0.2, 0.1])
    model = small_model(tmp_path_factory)
    config = settings(
        tmp_path / "run",
        model,
        rows,
        "data.layout.kind=padded",
        "eval.every=2",
        "eval.patience=3",
        "data.source.test=null",
    )
    monkeypatch.setattr("sft_jax.jobs.Scores.values", lambda self: {**self.metrics, "accuracy": next(scores)})
    train_until(config, 6)
    left = Checkpoints(tmp_path / "run" / "checkpoints", 2)
    progress = left.progress(6)
    left.close()
    assert (progress.best_step, [entry["step"] for entry in progress.evaluations]) == (2, [2, 4, 6])
    result = train(prepare(config))
    assert (result.steps, result.best_step) == (8, 2)
    assert train(open_run(tmp_path / "run")).steps == 8, "a run that stopped early is done"
