"""What a disk can do to a checkpoint, and what a run makes of it."""

import json
import os
import random
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax import mesh as meshes
from sft_jax.config.schema import MeshSection, RunSection
from sft_jax.errors import RunError
from sft_jax.train import checkpoint
from sft_jax.train.checkpoint import Checkpoints, Progress
from sft_jax.train.resume import newest, resume
from sft_jax.train.state import TrainState

SCORES = (0.5, 0.9, 0.7, 0.6)  # of the steps


def state(step: int, shape: tuple[int, ...] = (40, 24)) -> TrainState:
    """A state of numbers that storage cannot shorten, others at each step."""
    draw = np.random.default_rng(step)
    params = {name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name in ("blocks/0/kernel", "head/kernel")}
    opt = ({"mu": {name: array * 2 for name, array in params.items()}}, None)
    return TrainState(jnp.asarray(step, jnp.int32), params, opt)


def read(checkpoints: Checkpoints, like: TrainState | None = None) -> Callable[[int], tuple[TrainState, Progress]]:
    """How a step is restored: as `state` is, on one device."""
    like, lies = like or state(0), meshes.replicated(meshes.make_mesh(MeshSection(data=1)))
    return lambda step: checkpoints.restore(like, jax.tree.map(lambda leaf: lies, like), step)


def same(one: TrainState, other: TrainState) -> bool:
    """Whether two states are equal bit for bit."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of four steps, the second of them the best."""
    home = tmp_path_factory.mktemp("written") / "checkpoints"
    checkpoints, progress = Checkpoints(home, 4), Progress()
    for step, score in enumerate(SCORES, 1):
        progress.step = step
        progress.evaluations.append({"step": step, "split": "validation", "f1": score})
        if score > (progress.best_value or 0):
            progress.best_step, progress.best_value = step, score
        checkpoints.save(state(step), progress)
    checkpoints.close()
    return home


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """A copy of them that a test may damage."""
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def arrays_in(step: Path) -> list[Path]:
    """The files that hold arrays, the largest first."""
    files = [file for file in (step / "state").glob("**/d/*") if file.is_file()]
    return sorted(files, key=lambda file: (-file.stat().st_size, file.name))


def flip(file: Path, bit: int) -> None:
    """Change one bit."""
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


def bits_of(file: Path) -> int:
    """How many bits a file has."""
    return 8 * file.stat().st_size


def unchecked(step: Path) -> TrainState | None:
    """What comes back of a step where no digest is looked at: what orbax makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "digests", lambda tree: {})
        try:
            return read(Checkpoints(step.parent, 4))(int(step.name))[0]
        except RunError:
            return None


def silently(step: Path, seed: int) -> None:
    """Flip a bit of an array that orbax does not notice."""
    draw, file = random.Random(seed), arrays_in(step)[0]
    for _ in range(100):
        bit = draw.randrange(bits_of(file))
        flip(file, bit)
        found = unchecked(step)
        if found is not None and not same(found, state(int(step.name))):
            return
        flip(file, bit)
    raise AssertionError("orbax notices everything now")


def turn(file: Path, before: bytes, after: bytes) -> None:
    """Change some bytes where they stand first."""
    raw = file.read_bytes()
    assert before in raw
    file.write_bytes(raw.replace(before, after, 1))


def half(file: Path) -> None:
    """Keep the first half of a file."""
    os.truncate(file, file.stat().st_size // 2)


def emptied(directory: Path) -> None:
    """Leave only the directory."""
    shutil.rmtree(directory)
    directory.mkdir()


def replaced_by_a_file(directory: Path) -> None:
    """A file where the directory was."""
    shutil.rmtree(directory)
    directory.write_text("12")


def half_deleted(step: Path) -> None:
    """As a removal leaves it that was interrupted."""
    files = sorted(file for file in step.rglob("*") if file.is_file())
    for file in files[::2]:
        file.unlink()


def of_other_parameters(step: Path) -> None:
    """A whole checkpoint, and of another model."""
    other = Checkpoints(step.parent.parent / "other", 1)
    other.save(state(4, shape=(40, 8)), Progress(step=4))
    other.close()
    shutil.rmtree(step)
    shutil.move(step.parent.parent / "other" / "4", step)


def forbidden(step: Path) -> None:
    """Nobody may read the manifest."""
    file = step / "manifest" / "metadata"
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root may read everything")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit of an array": (lambda step: silently(step, 0), "/kernel: not what was written"),
    "a bit of another array": (lambda step: silently(step, 1), "/kernel: not what was written"),
    "a bit of a third one": (lambda step: silently(step, 2), "/kernel: not what was written"),
    "a bit of the progress": (
        lambda step: turn(step / "manifest" / "metadata", b'"step": 4', b'"step": 5'),
        "manifest: not what was written",
    ),
    "a bit of a digest": (
        lambda step: turn(step / "manifest" / "metadata", b'"digest": "', b'"digest": "0'),
        "manifest: not what was written",
    ),
    "a bit of the manifest's form": (lambda step: flip(step / "manifest" / "metadata", 0), "manifest: not JSON"),
    "a manifest that is something else": (
        lambda step: (step / "manifest" / "metadata").write_text("[]"),
        "manifest: not what was written",
    ),
    "an empty manifest": (lambda step: os.truncate(step / "manifest" / "metadata", 0), "manifest: not JSON"),
    "half a manifest": (lambda step: half(step / "manifest" / "metadata"), "manifest: not JSON"),
    "no manifest": (lambda step: shutil.rmtree(step / "manifest"), "manifest: is not there"),
    "half an array": (lambda step: half(arrays_in(step)[0]), "state: cannot be read ("),
    "no array": (lambda step: arrays_in(step)[0].unlink(), "state: cannot be read ("),
    "no arrays": (lambda step: shutil.rmtree(step / "state"), "state: cannot be read ("),
    "no metadata": (lambda step: (step / "state" / "_METADATA").unlink(), "state: cannot be read ("),
    "half the metadata": (lambda step: half(step / "state" / "_METADATA"), "state: cannot be read ("),
    "an empty directory": (emptied, "manifest: is not there"),
    "a directory half deleted": (half_deleted, ": "),
    "a file in its place": (replaced_by_a_file, "is a file, not a checkpoint"),
    "other parameters": (of_other_parameters, "head/kernel: saved as float32[40, 8], expected float32[40, 24]"),
    "no permission": (forbidden, "manifest: cannot be read (Permission denied)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_step_that_is_whole_wins(copy: Path, damage: str):
    """R8, C14: whatever was done to the newest step, it is refused with a named reason, the one before is taken, and
    saving goes on as if it had not been there; `run.resume=strict` refuses, and touches nothing."""
    do, reason = DAMAGES[damage]
    do(copy / "4")
    checkpoints, told = Checkpoints(copy, 4), []
    with pytest.raises(RunError, match=r"the newest one cannot be restored, and run\.resume is strict") as caught:
        resume(checkpoints, RunSection(resume="strict"), read(checkpoints), told.append)
    assert reason in str(caught.value) and caught.value.exit_code == 65
    assert told == [] and checkpoints.steps() == [1, 2, 3, 4]

    found = resume(checkpoints, RunSection(), read(checkpoints), told.append)
    assert found and same(found[0], state(3)) and (found[1].step, found[1].best_step) == (3, 2)
    (text,) = told
    assert text.startswith(f"{copy}: step 4: ") and reason in text
    assert text.endswith("moved to damaged/4; going on after step 3")
    assert checkpoints.steps() == [1, 2, 3] and (copy / "damaged" / "4").exists()
    checkpoints.save(state(4), Progress(step=4))
    checkpoints.wait()
    assert same(read(checkpoints)(4)[0], state(4))
    checkpoints.close()


def test_no_bit_that_matters_is_missed(copy: Path):
    """R8: of 150 flipped bits and cut files none brings back a number that was not written, and none ends in anything
    but a RunError. Control: without the digests, wrong numbers come back for some of them."""
    draw, refused, missed = random.Random(0), 0, 0
    step, checkpoints = copy / "4", Checkpoints(copy, 4)
    files = sorted(file for file in step.rglob("*") if file.is_file())
    for number in range(150):
        file = draw.choice(files)
        raw = file.read_bytes()
        if number % 5:
            flip(file, draw.randrange(8 * len(raw)))
        else:
            os.truncate(file, draw.randrange(len(raw)))
        found = unchecked(step)
        missed += found is not None and not same(found, state(4))
        try:
            assert same(read(checkpoints)(4)[0], state(4))
        except RunError as error:
            assert str(error).startswith(f"{copy}: step 4: ")
            refused += 1
        file.write_bytes(raw)
    assert refused > missed > 2


def test_what_a_killed_save_leaves_is_in_nobodys_way(copy: Path):
    """R8, R3: the directory of a save that was not finished is no checkpoint; the next save of the step clears it."""
    shutil.copytree(copy / "4", copy / "5.orbax-checkpoint-tmp")
    shutil.rmtree(copy / "5.orbax-checkpoint-tmp" / "manifest")
    checkpoints, told = Checkpoints(copy, 4), []
    found = resume(checkpoints, RunSection(resume="strict"), read(checkpoints), told.append)
    assert found and found[1].step == 4 and told == []
    assert (copy / "5.orbax-checkpoint-tmp").exists()  # looking changes nothing
    checkpoints.save(state(5), Progress(step=5))
    checkpoints.close()
    assert sorted(entry.name for entry in copy.iterdir()) == ["2", "3", "4", "5"]


def test_several_damaged_steps_are_all_named(copy: Path):
    """R8: each step that is left out is told of, newest first, and what was moved aside once may be again."""
    checkpoints, told = Checkpoints(copy, 4), []
    emptied(copy / "4")
    resume(checkpoints, RunSection(), read(checkpoints), told.append)
    checkpoints.save(state(4), Progress(step=4))
    checkpoints.close()
    for step in ("4", "3"):
        emptied(copy / step)
    found = resume(checkpoints, RunSection(), read(checkpoints), told.append)
    assert found and found[1].step == 2
    assert [text.split(": ")[1] for text in told] == ["step 4", "step 4", "step 3"]
    assert sorted(entry.name for entry in (copy / "damaged").iterdir()) == ["3", "4", "4-2"]


def test_without_a_whole_one_nothing_begins(copy: Path):
    """R9: where checkpoints stand and none can be restored, that is an error that names each and the way on, and
    nothing is touched; `restart` keeps them all aside and begins again. Without any, a run just begins."""
    for step in "1234":
        (copy / step / "manifest" / "metadata").write_text("{")
    checkpoints, told = Checkpoints(copy, 4), []
    with pytest.raises(RunError) as caught:
        resume(checkpoints, RunSection(), read(checkpoints), told.append)
    first, *lines = str(caught.value).splitlines()
    what = "none can be restored; run.resume=restart moves them all aside and begins again: 4 problems"
    assert first == f"{copy}: {what}" and caught.value.exit_code == 65
    assert lines == [f"  - step {step}: manifest: not JSON" for step in (4, 3, 2, 1)]
    assert told == [] and checkpoints.steps() == [1, 2, 3, 4]
    assert resume(checkpoints, RunSection(resume="restart"), read(checkpoints), told.append) is None
    assert told == [f"{copy}: 4 checkpoint(s) moved to archive-1: step 1, 2, 3, 4"]
    assert resume(checkpoints, RunSection(), read(checkpoints), told.append) is None
    assert resume(checkpoints, RunSection(resume="restart"), read(checkpoints), told.append) is None and len(told) == 1
    with pytest.raises(RunError, match="no checkpoint yet; train first"):
        newest(checkpoints, read(checkpoints))


def test_going_back_to_a_step(copy: Path):
    """R12: `run.resume_step` archives the later steps, brings back what was known at that step and no more, and saving
    goes on; a second time the archive has another name, and a step that there is not is answered with those there are.
    """
    checkpoints, told = Checkpoints(copy, 4), []
    back = RunSection(resume_step=1)
    found = resume(checkpoints, back, read(checkpoints), told.append)
    assert found and same(found[0], state(1))
    assert found[1] == Progress(1, 1, 0.5, False, [{"step": 1, "split": "validation", "f1": 0.5}])
    assert sorted(entry.name for entry in (copy / "archive-1").iterdir()) == ["2", "3", "4"]
    for step in (2, 3):
        checkpoints.save(state(10 + step), Progress(step=step))
    checkpoints.close()
    assert same(read(checkpoints)(3)[0], state(13))
    with pytest.raises(RunError) as caught:
        resume(checkpoints, RunSection(resume_step=4), read(checkpoints), told.append)
    what = f"run.resume_step: no checkpoint of step 4 in {copy}; there are 1, 2, 3; name one of them"
    assert str(caught.value) == what
    resume(checkpoints, back, read(checkpoints), told.append)
    assert checkpoints.steps() == [1] and sorted(e.name for e in (copy / "archive-2").iterdir()) == ["2", "3"]
    assert told[0] == f"{copy}: 3 checkpoint(s) moved to archive-1: step 2, 3, 4"


def test_a_best_step_that_is_gone_is_forgotten(copy: Path):
    """R12, R11: going on from a step whose best step has been removed since, the next evaluation makes a new best."""
    shutil.rmtree(copy / "2")
    checkpoints, told = Checkpoints(copy, 4), []
    found = resume(checkpoints, RunSection(resume_step=3), read(checkpoints), told.append)
    assert found and (found[1].best_step, found[1].best_value) == (None, None) and len(found[1].evaluations) == 3
    assert told[-1] == f"{copy}: the best step, 2, is gone; the next evaluation begins anew"


# Saves that fail.


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """While inside, no file can become larger: the write fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
        for thread in threading.enumerate():  # the write in the background is over
            if thread.name == "save_finalize":
                threading.Thread.join(thread)  # orbax's own would raise what went wrong
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_save_is_known_at_the_next_step(copy: Path):
    """R10: what fails in the background is an error the next time that is looked; its step is no checkpoint, neither
    before nor after, and the message says from where the same command goes on."""
    checkpoints = Checkpoints(copy, 4)
    with largest_file(1000):
        checkpoints.save(state(5), Progress(step=5))
    assert checkpoints.steps() == [1, 2, 3, 4]
    with pytest.raises(
        RunError, match=r"step 5 could not be saved \(File too large\); make room for it, and the same"
    ) as caught:
        checkpoints.check()
    assert str(caught.value).endswith("goes on after step 4") and caught.value.exit_code != 0
    assert checkpoints.steps() == [1, 2, 3, 4] and same(read(checkpoints)(4)[0], state(4))


def test_a_failed_save_may_be_passed_over(copy: Path):
    """R10: with a `warn`, it is told and the next save works; nothing older was removed for it, and a step that could
    not be saved is not the best one."""
    told: list[str] = []
    checkpoints, progress = Checkpoints(copy, 2, told.append), Progress(5, best_step=5, best_value=0.99)
    with largest_file(1000):
        checkpoints.save(state(5), progress)
    checkpoints.check()
    assert len(told) == 1 and "step 5 could not be saved (File too large)" in told[0]
    assert (progress.best_step, progress.best_value) == (None, None) and checkpoints.steps() == [1, 2, 3, 4]
    progress.step = 6
    checkpoints.save(state(6), progress)
    checkpoints.close()
    assert checkpoints.steps() == [4, 6] and same(read(checkpoints)(6)[0], state(6)) and len(told) == 1


def test_a_save_that_cannot_begin(tmp_path: Path):
    """R10: what fails before anything is in the background is told in the same words."""
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError, match=r"checkpoints: step 1 could not be saved \(.*\); mend what is in its way, and"):
        Checkpoints(tmp_path / "checkpoints", 1).save(state(1), Progress(step=1))


def test_a_full_disk(tmp_path: Path):
    """R10: on a disk that is really full the save is refused, and the checkpoint before it stays whole."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        checkpoints = Checkpoints(tmp_path / "checkpoints", 4)
        checkpoints.save(state(1), Progress(step=1))
        checkpoints.wait()
        left = os.statvfs(tmp_path)
        (tmp_path / "filler").write_bytes(bytes(left.f_bavail * left.f_bsize - 8192))
        with pytest.raises(RunError, match=r"step 2 could not be saved \(No space left on device\)"):
            for step in (2, 3):
                checkpoints.save(state(step), Progress(step=step))
            checkpoints.wait()
        assert checkpoints.steps() == [1] and same(read(checkpoints)(1)[0], state(1))
        (tmp_path / "filler").unlink()
        checkpoints.save(state(2), Progress(step=2))
        checkpoints.close()
        assert (
            json.loads((tmp_path / "checkpoints" / "2" / "manifest" / "metadata").read_text())["progress"]["step"] == 2
        )
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
