"""Batches, initial values and checkpoints do not know how many hosts and devices there are.

Two hosts are two real processes over loopback. Other numbers of hosts are looked at as the slices that each would
hold: in every process `batches[k]` is the whole batch of step k, and `mesh.put` takes the process's rows out of it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import write_model
from exact_runs import (
    differing,
    digest,
    documents,
    losses_by_step,
    recorded,
    settings,
    train_until,
)

from sft_jax.config.read import write_config
from sft_jax.config.schema import Config
from sft_jax.jobs import train
from sft_jax.run import initial, prepare, restore
from sft_jax.train.checkpoint import Checkpoints, Progress
from sft_jax.train.state import TrainState

ROOT = Path(__file__).parents[2]
GRID = ("mesh.data=2", "mesh.fsdp=2")
STOP = 3


@dataclass(frozen=True)
class Story:
    """A run stopped on one device at step 3 and finished by two processes; and the same one, never stopped.

    The former holds its layers in one array and scans over them, the latter does not.
    """

    make: Callable[..., Config]
    alone: Path  # the uninterrupted run, on one device, its layers looped over
    order: dict[int, list[int]]  # what it read at each step
    saved: TrainState  # on one device, at step 3
    hosts: Path  # run directory of the two processes
    reports: list[dict[str, Any]]  # what each process saw
    work: Path


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Story:
    """One launch of two processes, for all of the tests below."""
    work = tmp_path_factory.mktemp("hosts")
    model = write_model(work / "model")

    def make(directory: str, *more: str) -> Config:
        common = ("data.layout.kind=packed", "model.dropout=0.1", "train.scan=always")
        return settings(work / directory, model, rows, *common, *more)

    alone, order = recorded(prepare(make("alone", "train.scan=never")))
    train(alone)
    train_until(make("hosts"), STOP)
    saved, _ = restore(prepare(make("hosts")), Checkpoints(work / "hosts" / "checkpoints", 2), STOP)
    _through_a_grid(make("grid", *GRID), work / "hosts" / "checkpoints", work / "in", saved)
    (work / "config.yaml").write_text(write_config(make("hosts", "mesh.data=-1")), encoding="utf-8")
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # one device a process
        "PYTHONPATH": str(Path(__file__).parents[1]),  # as pytest has it for us
    }
    command = [sys.executable, str(Path(__file__).with_name("host_worker.py")), work / "config.yaml", work]
    launched = subprocess.run(
        [ROOT / "launch" / "local.sh", "2", *command],
        env={k: v for k, v in environment.items() if not k.startswith("SFT_")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert launched.returncode == 0, launched.stdout[-4000:] + launched.stderr
    reports = [json.loads((work / f"{number}.json").read_text()) for number in range(2)]
    return Story(make, work / "alone", order, saved, work / "hosts", reports, work)


def _through_a_grid(config: Config, checkpoints: Path, out: Path, saved: TrainState) -> None:
    """Restore a checkpoint onto a 2x2 mesh, see that it is the same and lies as asked, and write it from there."""
    run = prepare(config)
    state, progress = restore(run, Checkpoints(checkpoints, 2), STOP)
    assert state.params["blocks/{0..1}/mlp/up/kernel"].sharding.shard_shape((2, 16, 24)) == (2, 8, 24)
    assert _lies_as_placed(state, run.placement.state)
    assert differing(state, saved) == []
    written = Checkpoints(out, 1)
    written.save(state, progress)
    written.close()


def _lies_as_placed(state: TrainState, placement: TrainState) -> bool:
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(placement), strict=True)
    return all(leaf.sharding == wanted for leaf, wanted in pairs)


def test_two_processes_came_up_through_the_launcher(story: Story):
    """R47: `launch/local.sh 2` started two processes of one device each, which joined into one run."""
    assert [r["process"] for r in story.reports] == [0, 1]
    assert {(r["processes"], r["devices"]) for r in story.reports} == {(2, 2)}


def test_real_hosts_read_the_batches_of_one(story: Story):
    """C32, R15: what two processes hold of each step is together, in order, the batch of a run on one device."""
    first, second = (r["local_documents"] for r in story.reports)
    together = [[*a, *b] for a, b in zip(first, second, strict=True)]
    assert together == [story.order[step] for step in range(14)]
    assert min(sum(map(len, first)), sum(map(len, second))) > 14  # neither process holds next to nothing
    for epoch in (range(7), range(7, 14)):
        assert sorted(chain(*(together[step] for step in epoch))) == list(range(56))


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
def test_slices_of_any_number_of_hosts_make_up_the_same_batches(story: Story, hosts: int):
    """C32, R15: the slices of 1, 2, 3 and 4 hosts hold the same documents in the same order over two epochs."""
    run = prepare(story.make(f"slices-{hosts}", f"mesh.data={hosts}"))
    for step in range(14):
        shards = run.put(run.batches[step])["index"].addressable_shards
        assert len({shard.device for shard in shards}) == hosts
        ordered = sorted(shards, key=lambda shard: shard.index[0].start or 0)
        assert list(chain(*(documents({"index": s.data}) for s in ordered))) == story.order[step]


def test_a_checkpoint_goes_from_mesh_to_mesh_and_back(story: Story):
    """R13: written on 1x1, restored on 2x2, on two processes and on 1x1 again: bit-equal, and placed as asked."""
    wanted = digest(story.saved)
    assert [(r["restored"], r["placed"]) for r in story.reports] == [(wanted, True)] * 2
    run = prepare(story.make("back"))
    back, progress = restore(run, Checkpoints(story.work / "out", 1), STOP)
    assert differing(back, story.saved) == [] and progress == Progress(step=STOP)
    assert _lies_as_placed(back, run.placement.state)


def test_training_goes_on_across_meshes(story: Story):
    """R14, R2: stopped at step 3 on one device and finished by two processes, which scan over layers: the same losses
    within 1e-5."""
    one, two = losses_by_step(story.alone), losses_by_step(story.hosts)
    assert list(one) == list(two) == list(range(1, 15))
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert story.reports[0]["final"] == story.reports[1]["final"]
    assert story.reports[0]["test"] == story.reports[1]["test"]


@pytest.mark.parametrize("devices", [1, 4])
def test_the_data_position_survives_a_change_of_hosts(story: Story, devices: int):
    """R16: what two processes saved at step 7 goes on with 1 and 4 parts: the remaining documents are the same."""
    directory = story.work / f"again-{devices}"
    shutil.copytree(story.hosts, directory)
    shutil.rmtree(directory / "checkpoints" / "14")
    run, seen = recorded(prepare(story.make(directory.name, f"mesh.data={devices}")))
    train(run)
    for begin, found in ((7, seen), *((STOP, {int(k): v for k, v in r["seen"].items()}) for r in story.reports)):
        # Batches of the first epoch are also looked at for their shapes.
        assert {k: v for k, v in found.items() if k >= begin} == {k: v for k, v in story.order.items() if k >= begin}
    assert list(losses_by_step(directory).values()) == pytest.approx(
        list(losses_by_step(story.alone).values()), rel=1e-5
    )


@pytest.mark.parametrize("mesh", [(), ("mesh.data=4",), GRID], ids=["1x1", "4x1", "2x2"])
def test_initial_values_do_not_depend_on_the_mesh(story: Story, mesh: tuple[str, ...]):
    """R19, C23: the initial parameters, the drawn head among them, are bit-equal on 1x1, 1x4, 2x2 and two processes."""
    state, frozen = initial(prepare(story.make("initial", *mesh)))
    assert {digest({**state.params, **frozen})} == {r["initial"] for r in story.reports}
    other, _ = initial(prepare(story.make("initial", "seed.init=1", *mesh)))
    assert digest({**other.params}) not in {r["initial"] for r in story.reports}
