"""Microbatches and devices add up exactly: one big batch, many small ones, and a short last step."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from bounds import SAME
from conftest import write_rows
from exact_runs import (
    Steps,
    distance,
    gradient,
    gradient_by_hand,
    settings,
    small_model,
    take_steps,
)

from sft_jax.run import Run, prepare
from sft_jax.tasks.task import Ratio

LAYOUTS = ("packed", "padded")
FREEZES = {"full": "[]", "frozen": "['embed/**','blocks/0/attn/**']"}
Ready = Callable[..., Run]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Ready:
    """`ready("key=value", ...)`: a run on 54 ragged rows, so that the seventh step of eight documents has six."""
    home = tmp_path_factory.mktemp("accumulation")
    model = small_model(tmp_path_factory)
    write_rows(home / "train.csv", 54, seed=3, longest=28)

    def make(*overrides: str) -> Run:
        given = (f"data.source.train={home / 'train.csv'}", "train.epochs=1", *overrides)
        return prepare(settings(home / "run", model, rows, *given))

    return make


def agree(one: Steps, other: Steps) -> bool:
    """C1's tolerances: losses 1e-5, gradient norms 1e-4 relative, mean signed residual of the losses 1e-6."""
    residual = other.losses - one.losses
    norms = np.abs(other.norms - one.norms) / one.norms
    return bool(abs(residual).max() <= 1e-5 and norms.max() <= 1e-4 and abs(residual.mean()) <= 1e-6)


def mean_of_means(run: Run) -> Run:
    """The mistake: each microbatch gives its own mean, and the mean of these is taken."""
    loss = run.task.loss
    return replace(run, task=replace(run.task, loss=lambda o, b: Ratio(loss(o, b).value, jnp.ones(()))))


@pytest.mark.parametrize("freeze", FREEZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_microbatches_or_devices_train_as_one_batch_does(ready: Ready, layout: str, freeze: str):
    """C1, R22: 8x1 = 1x8 = two devices over an epoch of ragged rows."""
    common = (f"data.layout.kind={layout}", f"train.freeze={FREEZES[freeze]}")
    whole = take_steps(ready(*common), 7)
    assert whole.weights.tolist() == [8] * 6 + [6]
    assert agree(whole, take_steps(ready(*common, "train.accumulate=8"), 7))
    assert agree(whole, take_steps(ready(*common, "mesh.data=2"), 7))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mean_of_means_fails_the_same_check(ready: Ready, layout: str):
    """C1, R22: negative control; averaging the means of ragged microbatches is not the same training."""
    common = (f"data.layout.kind={layout}", f"train.freeze={FREEZES['frozen']}")
    whole = take_steps(ready(*common), 7)
    wrong = take_steps(mean_of_means(ready(*common, "train.accumulate=8")), 7)
    assert not agree(whole, wrong)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_four_microbatches_are_those_of_one(ready: Ready, layout: str):
    """R22: in the short step, 4 microbatches and 1 give the same gradients; the mean of means does not."""
    whole, parts = (ready(f"data.layout.kind={layout}", f"train.accumulate={n}") for n in (1, 4))
    assert whole.batches[6]["weight"].sum() == 6
    one = gradient(whole, 6)
    assert distance(one, gradient(parts, 6)) <= SAME
    assert distance(one, gradient(mean_of_means(parts), 6)) > 1e-2


def test_a_short_last_step_is_divided_by_its_own_documents(ready: Ready, tmp_path: Path):
    """C2: 7 microbatches under accumulation 4 are 2 updates, the second divided by its 6 documents, not by 8."""
    file = write_rows(tmp_path / "train.csv", 14, seed=4)
    run = ready(f"data.source.train={file}", "train.accumulate=4", "data.layout.kind=padded")
    assert run.batches.steps == 2
    assert take_steps(run, 2).weights.tolist() == [8, 6]
    for step, count in enumerate((8, 6)):
        total = gradient_by_hand(run, run.batches.order.documents(step))
        assert distance({p: g / count for p, g in total.items()}, gradient(run, step)) <= SAME
    assert distance({p: g / 8 for p, g in total.items()}, gradient(run, 1)) > 0.1
