"""When a run may go on in a directory, and when that is refused."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_model, write_rows

from sft_jax import jobs
from sft_jax.config.read import write_config
from sft_jax.config.schema import Config
from sft_jax.errors import ConfigError, RunError
from sft_jax.jobs import begin_directory
from sft_jax.run import open_run, prepare
from sft_jax.train import directory
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
    with pytest.raises(RunError, match="1 problem\n  - data: train is not what the run was trained with"):
        begin_directory(prepare(begun()))


def test_changed_weights_are_refused(begun: Make, tmp_path: Path):
    """C11, R52: other pretrained weights of the same shapes under the same name, and the run does not go on."""
    write_model(tmp_path / "model", {"num_hidden_layers": 1}, seed=1)
    with pytest.raises(
        RunError, match=r"1 problem\n  - weights: model\.safetensors is not what the run was trained with"
    ):
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


@pytest.mark.parametrize("how", ["never", "restart"])
def test_going_on_and_not_going_on(configure: Make, how: str):
    """R12: a step to go on from contradicts what does not go on."""
    with pytest.raises(ConfigError, match=f"resume_step: 2 goes on, and resume={how} does not; keep one"):
        configure(f"run.resume={how}", "run.resume_step=2")


def test_one_run_at_a_time(tmp_path: Path):
    """R27: who comes second is refused with process and host of the holder; afterwards it is free, also when what the
    holder did ended in an error, and what an earlier one left in the file means nothing."""
    home = tmp_path / "new" / "run"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), directory.held(home):
            with pytest.raises(RunError) as caught, directory.held(home):
                raise AssertionError("two hold it")
            raise ZeroDivisionError
        what = f"{home}: process {os.getpid()} on {platform.node()}, since 20"
        assert str(caught.value).startswith(what) and caught.value.exit_code == 65
        assert str(caught.value).endswith(", is training in it; wait, stop it, or give another run.dir")


def test_another_run_that_began_meanwhile_is_seen(configure: Make, tmp_path: Path):
    """R27: two runs found the directory empty; the second one, once it may, sees that it is no longer its own."""
    first, second = prepare(configure()), prepare(configure("optim.lr=0.5"))
    begin_directory(first)
    with pytest.raises(RunError, match=r"holds another run; .*\n  - optim\.lr: 0\.001 there, 0\.5 now"):
        begin_directory(second)


@pytest.mark.parametrize("where", ["file/run", "/proc/run"])
def test_where_nothing_can_be_written(tmp_path: Path, where: str):
    """R27: a run directory that cannot be made is one message with its name, no traceback."""
    (tmp_path / "file").touch()
    what = rf"{where}: cannot be written \(.*\); give another run.dir"
    with pytest.raises(RunError, match=what), directory.held(tmp_path / where):
        raise AssertionError("held")


def test_no_room_while_training(tmp_path: Path):
    """R10: whatever cannot be written for want of room is told in one message; other errors are not taken for that."""
    what = r"File too large; make room, and the same command goes on"
    with pytest.raises(RunError, match=what), directory.held(tmp_path / "run"):
        raise OSError(27, "File too large")
    with pytest.raises(FileNotFoundError), directory.held(tmp_path / "run"):
        raise FileNotFoundError(2, "No such file")


@pytest.mark.parametrize("file", ["config.yaml", "manifest.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"a: &x b\nc: *x\n"])
def test_damaged_files_of_the_run(configure: Make, file: str, content: bytes):
    """R8: a configuration or manifest that is no longer what was written is named, with the remedy."""
    config = configure()
    begun = prepare(config)
    begin_directory(begun)
    (begun.directory / file).write_bytes(content)
    with pytest.raises(RunError, match=rf"{file}: is damaged; put it back from a copy, or give another run.dir"):
        directory.check(config, begun.directory)
        directory.begin(config, begun.directory, {"data": {}, "weights": {}}, 14, 7)


def test_checkpoints_that_are_a_file(configure: Make):
    """R8: what stands where the checkpoints should be is named before anything is loaded."""
    config = configure()
    home = Path(config.run.dir)
    home.mkdir()
    (home / "checkpoints").touch()
    with pytest.raises(RunError, match=r"checkpoints: is a file; move it away, or give another run.dir"):
        prepare(config)


def test_best_and_latest_of_damaged_checkpoints(configure: Make, tmp_path: Path, capsys: pytest.CaptureFixture):
    """R8, R11: a best checkpoint that is damaged is an error that names `--at latest`; `latest` is the newest that is
    whole, and tells on stderr of what it left out; looking moves nothing, not even what a save has begun."""
    model = write_model(tmp_path / "model", {"num_hidden_layers": 1})
    config = configure(
        f"model.source={model}", "data.layout.kind=padded", "train.steps=3", "eval.every=1", "checkpoint.keep=3"
    )
    result = jobs.train(prepare(config))
    checkpoints, best = result.directory / "checkpoints", result.best_step
    assert best is not None
    (checkpoints / "9.orbax-checkpoint-tmp").mkdir()
    for step in {3, best}:
        (checkpoints / str(step) / "state" / "_METADATA").unlink()
    run = open_run(result.directory)
    with pytest.raises(RunError, match=rf"step {best}: 1 problem\n.*\n{best} is the best step; .* --at latest"):
        jobs.trained(run, "best")
    left = max({1, 2, 3} - {3, best})
    assert jobs.trained(run, "latest")[2] == left
    assert f"{checkpoints}: step 3: 1 problem\n  - state: cannot be read (" in capsys.readouterr().err
    assert {entry.name for entry in checkpoints.iterdir()} == {"1", "2", "3", "9.orbax-checkpoint-tmp"}
    assert write_config(config) == (result.directory / "config.yaml").read_text()
