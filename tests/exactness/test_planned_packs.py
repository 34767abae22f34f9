"""Planned packs in training: the gradient is that of their documents one by one, and stopping leaves no trace."""

from itertools import chain
from pathlib import Path

import pytest
from bounds import SAME
from exact_runs import (
    differing,
    distance,
    documents,
    gradient,
    gradient_by_hand,
    metrics_lines,
    settings,
    small_model,
    train_until,
)

from sft_jax.errors import ConfigError
from sft_jax.jobs import train, trained
from sft_jax.run import open_run, prepare

PLANNED = ("data.layout.kind=planned", "data.layout.length=64")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, rows: Path):
    """`make(directory, *overrides)`: a configuration of planned packs on one block."""
    model = small_model(tmp_path_factory)
    return lambda home, *more: settings(home, model, rows, *PLANNED, *more)


def test_the_gradient_is_that_of_the_documents_one_by_one(make, tmp_path):
    """R17 C3: a step on planned packs optimises what its documents, each in a row of its own, would."""
    run = prepare(make(tmp_path / "run"))
    numbers = documents(run.batches[1])
    assert len(numbers) > run.batches.order.batch_size, "packs hold several documents"
    found, total, without = gradient(run, 1), gradient_by_hand(run, numbers), gradient_by_hand(run, numbers[1:])
    assert distance({path: values / len(numbers) for path, values in total.items()}, found) < SAME
    assert distance({path: values / len(numbers) for path, values in without.items()}, found) > 1e-3, "the control"


def test_devices_and_microbatches_change_no_pack(make, tmp_path):
    """C32 C1: the documents of a step are the same on 1 and on 4 devices, accumulated or not, each once an epoch."""
    one, four = (
        prepare(make(tmp_path / f"run{k}", *more)).batches
        for k, more in enumerate(([], ["mesh.data=2", "train.accumulate=2"]))
    )
    read = [documents(one[k]) for k in range(len(one))]
    assert read == [documents(four[k]) for k in range(len(four))]
    assert sorted(chain(*read[: one.order.steps_per_epoch])) == list(range(len(one.encoded)))


def test_stop_and_resume_is_as_if_nothing_had_been(make, tmp_path):
    """C11 R17: stopped within an epoch of planned packs and resumed, every leaf and loss is bit-equal."""
    more = ("model.dropout=0.1", "train.accumulate=2")
    train(prepare(make(tmp_path / "whole", *more)))
    broken = make(tmp_path / "broken", *more)
    train_until(broken, 3)
    train(prepare(broken))
    whole, pieces = (trained(open_run(tmp_path / name), "latest")[0] for name in ("whole", "broken"))
    assert whole.step == pieces.step > 3 and differing(whole, pieces) == []
    assert metrics_lines(tmp_path / "whole") == metrics_lines(tmp_path / "broken")


def test_packs_of_a_mixture_are_refused(make, tmp_path):
    """C26: a plan would ignore the weights of a mixture, so it is refused by name."""
    part = "{name: a, source: {kind: files, train: a.csv}}"
    with pytest.raises(ConfigError, match=r"data\.layout\.kind: planned packs know no shares of a mixture; set it to"):
        make(tmp_path, f"data.source={{kind: mixture, parts: [{part}]}}", "eval.every=never")
