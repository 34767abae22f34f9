"""A grid of heads in one program: each is the head that a run of its own would train."""

import json

import pytest
from conftest import write_model
from exact_runs import settings

from sft_jax.errors import ConfigError
from sft_jax.jobs import train
from sft_jax.run import prepare

FROZEN = ("train.freeze=['embed/**', 'blocks/**']",)


@pytest.fixture(scope="module")
def make(tmp_path_factory, rows):
    """`make(directory, *overrides)`: a run of a head alone, with dropout in it."""
    model = write_model(
        tmp_path_factory.mktemp("models") / "dropping", {"num_hidden_layers": 1, "classifier_dropout": 0.3}
    )
    return lambda home, *more: settings(home, model, rows, *FROZEN, "eval.best_metric=loss", *more)


def best(directory) -> float:
    """The best validation of a run."""
    return json.loads((directory / "summary.json").read_text())["validation"]["loss"]


def test_each_point_is_a_run_of_its_own(make, tmp_path):
    """D6: rates, decays and seeds side by side score as one by one; the best pair by the mean of seeds is trained."""
    grid = "train.head_grid={lr: [0.01, 0.1], weight_decay: [0.0, 0.5], seeds: [3, 4]}"
    train(prepare(make(tmp_path / "grid", grid)))
    found = json.loads((tmp_path / "grid/grid.json").read_text())
    points = {(point["lr"], point["weight_decay"]): point for point in found["points"]}
    assert found["metric"] == "loss" and len(points) == 4 and all(point["n"] == 2 for point in points.values())
    for lr, decay, seed in ((0.01, 0.5, 4), (0.1, 0.0, 3)):
        home = tmp_path / f"{lr}-{decay}-{seed}"
        train(prepare(make(home, f"optim.lr={lr}", f"optim.weight_decay={decay}", f"seed={seed}")))
        assert points[lr, decay]["scores"][seed - 3] == pytest.approx(best(home), rel=1e-5)
    scores = [score for point in points.values() for score in point["scores"]]
    assert len({round(score, 5) for score in scores}) == len(scores), "the control: all differ"
    (lr, decay), _ = min(points.items(), key=lambda item: item[1]["mean"])
    train(prepare(make(tmp_path / "alone", f"optim.lr={lr}", f"optim.weight_decay={decay}")))
    assert best(tmp_path / "grid") == pytest.approx(best(tmp_path / "alone"), rel=1e-5)


def test_a_grid_needs_features_that_stay(make, tmp_path):
    """A head that is not trained from memory has no grid, and is told how it would have."""
    for more in ("train.freeze=['embed/**']", "train.cache_features=never", "data.augment.delete=0.1"):
        with pytest.raises(ConfigError, match=r"train\.head_grid: features would not be computed once"):
            prepare(make(tmp_path / "run", "train.head_grid={lr: [0.1, 0.2]}", more))
