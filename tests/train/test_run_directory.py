"""When a run may go on in a directory, and when that is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_model, write_rows

from sft_jax.config.schema import Config
from sft_jax.errors import RunError
from sft_jax.jobs import begin_directory
from sft_jax.run import prepare
from sft_jax.train.directory import differences

Make = Callable[..., Config]


@pytest.fixture
def begun(configure: Make, tmp_path: Path) -> Make:
    """`begun("key=value", ...)`: the configuration of a run that has begun, on files that a test may change."""
    model = write_model(tmp_path / "model", {"num_hidden_layers": 1})
    file = write_rows(tmp_path / "train.csv", 24)

    def make(*overrides: str) -> Config:
        return configure(f"model.source={model}", f"data.source.train={file}", *overrides)

    begin_directory(prepare(make()))
    return make


def test_an_unchanged_run_may_go_on(begun: Make):
    """C11: the same configuration, data and weights are accepted again, also where what is free to differ differs."""
    begin_directory(prepare(begun()))
    begin_directory(prepare(begun("mesh.data=2", "train.log_every=5", "data.prefetch=1", "run.resume=must")))


def test_changed_rows_are_refused(begun: Make, tmp_path: Path):
    """C11, R52: one changed word in the training file, and the run does not go on."""
    file = tmp_path / "train.csv"
    text = file.read_text()
    file.write_text(text.replace("bara", "bare", 1) if "bara" in text else text.replace("bare", "bara", 1))
    with pytest.raises(RunError, match="1 problem\n  - data: not what the run began with"):
        begin_directory(prepare(begun()))


def test_changed_weights_are_refused(begun: Make, tmp_path: Path):
    """C11, R52: other pretrained weights of the same shapes under the same name, and the run does not go on."""
    write_model(tmp_path / "model", {"num_hidden_layers": 1}, seed=1)
    with pytest.raises(RunError, match="1 problem\n  - weights: not what the run began with"):
        begin_directory(prepare(begun()))


def test_other_settings_are_refused_by_name(begun: Make):
    """C11: every setting that changes the result is named, with both values."""
    with pytest.raises(RunError) as caught:
        prepare(begun("optim.lr=0.5", "seed.dropout=3", "mesh.data=2"))
    assert str(caught.value).splitlines()[1:] == [
        "  - optim.lr: 0.001 there, 0.5 now",
        "  - seed.dropout: 0 there, 3 now",
    ]


def test_never_and_must(begun: Make, tmp_path: Path):
    """C11: `never` refuses a used directory, `must` an empty one."""
    with pytest.raises(RunError, match=r"holds a run, and run\.resume is never"):
        prepare(begun("run.resume=never"))
    with pytest.raises(RunError, match=r"holds no run, and run\.resume is must"):
        prepare(begun("run.resume=must", f"run.dir={tmp_path / 'empty'}"))


def test_differences_are_named_by_their_whole_key():
    """R52: keys are dotted, in order, and what stands in one of the two alone is None in the other."""
    one = {"a": {"b": 1, "c": [1, 2]}, "d": {"e": "x"}, "f": 1}
    other = {"a": {"b": 1, "c": [2, 1]}, "d": {"e": "x"}, "g": {"h": True}}
    assert differences(one, one) == {}
    assert list(differences(one, other).items()) == [
        ("a.c", ([1, 2], [2, 1])),
        ("f", (1, None)),
        ("g.h", (None, True)),
    ]


def test_differences():
    """R52: what differs between plain data is named by its dotted key, with every value, and nothing else is."""
    one = {"seeds": {"init": 0, "data": 0}, "versions": {"jax": "1", "numpy": "2"}, "flags": {}, "git": None}
    other = {**one, "seeds": {"init": 3, "data": 0}, "flags": {"XLA_FLAGS": "x"}}
    third = {**one, "versions": {"jax": "1"}}
    assert differences(one, one, dict(one)) == {}
    assert differences(one, other) == {"flags.XLA_FLAGS": (None, "x"), "seeds.init": (0, 3)}
    assert differences(one, third, one) == {"versions.numpy": ("2", None, "2")}
