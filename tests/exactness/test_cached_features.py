"""Heads on features that are computed once: the run is that of heads on features that are computed at each step."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_model
from exact_runs import losses_by_step, settings, train_until
from pictures import RESNET, VIT, write_pictures, write_vision
from pictures import settings as pictures_settings

from sft_jax.config.read import read_config
from sft_jax.errors import ConfigError
from sft_jax.jobs import train, trained
from sft_jax.mesh import to_host
from sft_jax.run import prepare

FROZEN = ("train.freeze=['embed/**', 'blocks/**']", "optim.lr=0.01")
NOTHING_ELSE = ("checkpoint.keep=2", "eval.every=epoch")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, rows: Path):
    """`make(directory, *overrides)`: a run of a head alone, which has dropout where the model has none."""
    model = write_model(
        tmp_path_factory.mktemp("models") / "dropping", {"num_hidden_layers": 1, "classifier_dropout": 0.3}
    )
    return lambda home, *more: settings(home, model, rows, *FROZEN, *NOTHING_ELSE, *more)


def came_to(config) -> tuple[dict, list, str]:
    """(weights of the last step, losses of all steps, what was told) of a run."""
    run = prepare(config)
    heard: list[str] = []
    train(run, _Listening(heard))
    state, _, _ = trained(run, "latest")
    return to_host(state.weights), list(losses_by_step(run.directory).values()), "\n".join(heard)


class _Listening:
    """A screen that keeps the notes."""

    def __init__(self, heard: list[str]):
        self.heard = heard

    def emit(self, kind, values) -> None:
        """Keep a note."""
        if kind == "note":
            self.heard.append(values["text"])

    def stop(self) -> None:
        """Nothing is running."""


@pytest.mark.parametrize("layout", ["packed", "bucketed", "planned"])
def test_a_head_on_kept_features_is_the_same_head(layout, make, tmp_path):
    """Cached features change nothing (1e-5): losses of all steps, last weights, scores; with dropout in the head."""
    more = (f"data.layout.kind={layout}", "train.accumulate=2")
    computed, losses, said = came_to(make(tmp_path / "computed", "train.cache_features=never", *more))
    assert "features of" not in said
    cached, found, said = came_to(make(tmp_path / "cached", *more))
    assert "features of train: 56 × 16" in said
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert cached.keys() == computed.keys() == {f"head/{a}/{b}" for a in ("dense", "out") for b in ("bias", "kernel")}
    for path, values in computed.items():
        np.testing.assert_allclose(cached[path], values, atol=1e-5, err_msg=path)
    one, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("computed", "cached"))
    assert one["test"] == pytest.approx(other["test"], abs=1e-5)
    other_seed, _, _ = came_to(make(tmp_path / "control", "seed.dropout=1", *more))
    assert max(np.abs(other_seed[path] - values).max() for path, values in computed.items()) > 1e-4, "the control"


@pytest.mark.parametrize("config", [RESNET, VIT], ids=["resnet", "vit"])
def test_images_are_seen_once(config, tmp_path):
    """C28: a head on a frozen ResNet, statistics too, or ViT is the same, cached or computed at each step."""
    model = write_vision(tmp_path / "model", config)
    for seed, split in enumerate(("train", "validation", "test")):
        write_pictures(tmp_path / "images" / split, 20, seed)
    frozen = f"train.freeze=['{{{'embed,blocks,norm' if config is VIT else 'embed,stages'}}}/**']"
    found = {}
    for name, asked in (("computed", "never"), ("cached", "auto")):
        home = tmp_path / name
        more = (frozen, f"train.cache_features={asked}", "optim.lr=0.05")
        found[name] = came_to(read_config([], pictures_settings(home, model, tmp_path / "images", *more)))
    assert "features of train: 20 ×" in found["cached"][2] and "features of" not in found["computed"][2]
    np.testing.assert_allclose(found["cached"][1], found["computed"][1], rtol=1e-5)
    assert set(found["cached"][0]) == {"head/out/bias", "head/out/kernel"}
    for path, values in found["computed"][0].items():
        np.testing.assert_allclose(found["cached"][0][path], values, atol=1e-5)


def test_stop_and_resume_on_features(make, tmp_path):
    """C11: stopped on features between two steps, and gone on with, every leaf is bit-equal to the run in one piece."""
    whole, _, _ = came_to(make(tmp_path / "whole", "checkpoint.every=3"))
    broken = make(tmp_path / "broken", "checkpoint.every=3")
    train_until(broken, 3)
    assert 0 < max(int(step.name) for step in (tmp_path / "broken/checkpoints").iterdir() if step.name.isdigit()) < 14
    resumed, _, _ = came_to(broken)
    assert all(resumed[path].tobytes() == values.tobytes() for path, values in whole.items())


def test_features_are_found_again_by_what_they_are_made_of(make, tmp_path):
    """C22: the second run takes them from the cache, whatever its rates; other weights, rows or types make others."""
    first = came_to(make(tmp_path / "a"))[2]
    assert "computed once" in first or "from the cache" in first  # by an earlier test
    assert "computed once" not in came_to(make(tmp_path / "b", "optim.lr=0.02", "train.epochs=1"))[2]
    for number, change in enumerate(("data.max_length=9", "train.compute_dtype=bfloat16")):
        assert "features of train" in (said := came_to(make(tmp_path / f"c{number}", change, "train.epochs=1"))[2])
        assert "computed once" in said, change
    other = write_model(tmp_path / "other", {"num_hidden_layers": 1}, seed=5)
    assert "computed once" in came_to(make(tmp_path / "d", f"model.source={other}", "train.epochs=1"))[2]
    assert "features of" not in came_to(make(tmp_path / "e", "data.cache=false", "train.cache_features=never"))[2]


def test_what_changes_from_visit_to_visit_is_not_kept(make, tmp_path):
    """Nothing is cached where it would change the result: dropout below, changed documents, a trained block."""
    one_epoch = ("train.epochs=1", "eval.every=never")
    said = came_to(make(tmp_path / "a", "model.dropout=0.1", *one_epoch))[2]
    assert "dropout below the head" in said and "features of train" not in said
    said = came_to(make(tmp_path / "b", "model.dropout=0.1", "train.cache_features=always", *one_epoch))[2]
    assert "features of train" in said
    said = came_to(make(tmp_path / "c", "train.freeze=['embed/**']", *one_epoch))[2]
    assert "features of" not in said and "at every step" not in said, "nothing was to be kept"
    for number, (more, why) in enumerate(
        (
            ("train.freeze=['embed/**']", "more below the head are not frozen"),
            ("data.augment.delete=0.2", "training documents are changed at each visit"),
        )
    ):
        with pytest.raises(ConfigError, match=why):
            prepare(make(tmp_path / f"d{number}", "train.cache_features=always", more))
