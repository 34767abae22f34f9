"""A trace of the steps that are asked for, what was compiled and what was kept, and how long steps waited for data."""

import json
import warnings
from pathlib import Path

import jax
import pytest
from conftest import ONE_SHAPE, SMALL, write_model

from sft_jax import jobs
from sft_jax.errors import ConfigError
from sft_jax.run import prepare
from sft_jax.train import profile
from sft_jax.train.ledger import read_account
from sft_jax.train.meter import Meter

STEPS = ("train.steps=5", "train.batch_size=4", "eval.every=never", ONE_SHAPE)


@pytest.fixture
def small(configure, tmp_path):
    """`small("key=value", ...)`: a run of one block and five steps."""
    model = write_model(tmp_path / "small", SMALL)
    return lambda *more: prepare(configure(f"model.source={model}", *STEPS, *more))


def traced(home: Path) -> set[int]:
    """The steps that a trace on the disk tells of, as xprof would read it."""
    (file,) = home.glob("plugins/profile/*/*.xplane.pb")
    warnings.simplefilter("ignore", DeprecationWarning)  # of how jaxlib makes its types, which as an error ends Python
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    ]
    return {int(dict(event.stats)["step_num"]) for event in events}


def test_a_trace_of_some_steps(small):
    """R38: `train.profile` leaves a trace that profilers open, of the steps asked for and of no other."""
    home = jobs.train(small("train.profile=[2, 3]")).directory / "profile"
    assert traced(home) == {2, 3}


def test_no_trace_unless_asked_for(small):
    """R38: without it nothing is recorded; the summary tells what waiting and compiling came to."""
    result = jobs.train(small())
    assert not (result.directory / "profile").exists()
    summary = json.loads((result.directory / "summary.json").read_text())
    waited = read_account(result.directory).seconds["wait"]
    assert summary["seconds"]["waiting"] == pytest.approx(waited, abs=0.05) and waited > 0
    assert summary["programs"].keys() == {"found", "compiled"}
    line = json.loads((result.directory / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 <= line["waiting"] < 1


def test_steps_that_are_none_of_the_run(small):
    """R38: a trace that would never end is refused before anything is compiled, and so is one that runs backwards."""
    with pytest.raises(ConfigError, match=r"train.profile: ends at step 6, but the run has 5; end it earlier"):
        small("train.profile=[2, 6]")
    with pytest.raises(ConfigError, match=r"profile: ends at step 2, before it begins; give the first step first"):
        small("train.profile=[3, 2]")


def test_an_error_ends_the_trace(tmp_path):
    """R38: a trace that a run broke off in is written, so that the next one can begin."""
    for name in ("one", "other"):
        with pytest.raises(KeyError), profile.Trace([1, 9], tmp_path / name) as trace, trace.over(1, 1):
            jax.block_until_ready(jax.numpy.arange(3) + 1)
            raise KeyError
        assert traced(tmp_path / name) == {1}


def test_programs_are_counted():
    """R38: what jax says of the programs that it keeps is counted, and nothing else."""
    before = profile.programs()
    jax.monitoring.record_event(profile.HIT)
    jax.monitoring.record_event("/jax/something/else")
    assert profile.programs() == {**before, "found": before["found"] + 1}


def test_waiting_is_a_share_of_each_interval():
    """R38: an interval tells which share of it was spent on waiting for batches, also one that was interrupted."""

    class Kept:
        """A sink."""

        values: dict = {}  # noqa: RUF012

        def emit(self, kind, values):
            """Keep it."""
            self.values = dict(values)

    import jax.numpy as jnp

    from sft_jax.tasks.task import Ratio

    def metrics():
        loss = Ratio(jnp.float32(1), jnp.float32(1))
        return {"loss": loss, "grad_norm": jnp.float32(1), "tokens": jnp.int32(1), "documents": jnp.int32(1)}

    waited, sink = [0.0], Kept()
    meter = Meter(9, 2, 9, lambda step: 0.0, [sink], {"seconds": 50.0, "waited": 20.0, "steps": []}, lambda: waited[0])
    waited[0] = 5.0
    meter.add(1, metrics())
    meter.add(2, metrics())
    meter.flush()
    assert sink.values["waiting"] == pytest.approx(0.5, abs=0.01)
