"""One of several real processes: `host_worker.py CONFIG OUT` writes what it saw of a run to OUT/<process>.json.

Started by `test_hosts_and_meshes.py` through `launch/local.sh`. OUT/in holds a checkpoint at step 1 that another mesh
wrote; it is restored here, compared and written again to OUT/out.
"""

import json
import sys
from pathlib import Path

import jax
from exact_runs import digest, documents, recorded

from sft_jax.config.read import read_config
from sft_jax.jobs import train
from sft_jax.mesh import to_host
from sft_jax.run import initial, prepare, restore
from sft_jax.train.checkpoint import Checkpoints


def main(config: Path, out: Path) -> None:
    """Look, restore, save, then train to the end."""
    run = prepare(read_config([config], []))
    found: dict = {"process": jax.process_index(), "processes": jax.process_count(), "devices": jax.device_count()}
    state, frozen = initial(run)
    found["initial"] = digest({**state.params, **frozen})
    found["local_documents"] = [
        documents({"index": run.put(run.batches[k])["index"].addressable_shards[0].data})
        for k in range(run.batches.steps)
    ]
    given = Checkpoints(out / "in", 1)
    state, progress = restore(run, given, given.steps()[-1])
    given.close()
    found["restored"] = digest(state)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(run.placement.state), strict=True)
    found["placed"] = all(leaf.sharding == wanted for leaf, wanted in pairs)
    written = Checkpoints(out / "out", 1)
    written.save(state, progress)
    written.wait()
    written.close()
    run, seen = recorded(run)
    result = train(run)
    found |= {"seen": seen, "steps": result.steps, "test": result.test.metrics if result.test else {}}
    found["final"] = digest(to_host(restore(run, Checkpoints(run.directory / "checkpoints", 2), result.steps)[0]))
    (out / f"{jax.process_index()}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
