"""The model of a run as directories: adapters merged, described, written for others to load, and compared with the run.

What is published is what the run has: the model that the exported `config.json` describes gives the run's own outputs
on real documents, and what was written is opened again and holds the same numbers and gives the same tokens.
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sft_jax import mesh as meshes
from sft_jax.adapt.merge import merge
from sft_jax.config.adapter import AdapterSection
from sft_jax.data.batch import Batch, Shape, collate
from sft_jax.errors import RunError, listing
from sft_jax.export import About, base_name, described, export_adapter, export_model, model_card
from sft_jax.models.family import build_model, load_model, settled
from sft_jax.nn.heads import ON_VOCABULARY, LazyLogits
from sft_jax.nn.lora import HEAD, is_adapter
from sft_jax.nn.template import Params, Template
from sft_jax.run import Run
from sft_jax.train.state import TrainState
from sft_jax.weights.files import open_checkpoint

MOST = 1e-4  # of the difference of outputs, relative to the largest of them
OF_IMAGES = ("resize", "crops", "resample", "table")  # what a processor does
ROWS = 4  # documents that are compared, short and long, and rows whose tokens are
TOKENS = 256  # of each document, whose logits over a vocabulary are compared
ON_DOCUMENTS = ("sequence_classification", "image_classification")  # kinds of heads; the others are on tokens
LOOKED_AT = 512  # documents among which they are chosen


def publish(
    run: Run, state: TrainState, frozen: Params, out: Path, metrics: Mapping[str, float], *, replace: bool
) -> None:
    """Write the model, and its adapter beside it where it has one; `metrics` are those of its card.

    Raises RunError where it would not be what was trained: before anything is written, or with what was written aside.
    """
    config, source, params = run.config, run.checkpoint, {**state.weights, **frozen}
    card = model_card(config.model.source, run.task, _facts(run, int(state.step)), metrics)
    about = About(
        source.config,
        run.task,
        source.directory,
        config.data.max_length,
        card,
        config.data.clean,
        run.tokenizer,
        _last_tokens(run),
    )
    host = run.model.template.unstack(meshes.to_host(params))
    whole = merge(run.model.adapters, host) if run.model.adapters else host
    compare(run, params, whole, described(run.model, about))
    if not meshes.is_first_process():
        return
    export_model(out, run.model, whole, about, replace=replace, check=partial(_reopened, run, whole, out))
    if run.model.adapters and config.adapter:
        own = [path for path in run.model.template.paths(run.trainable) if not is_adapter(path)]
        head = [] if run.task.head.kind in ON_VOCABULARY else [p for p in whole if p.startswith(f"{HEAD}/")]
        base = base_name(config.model.source, source.directory)
        facts = _facts(run, int(state.step), merged=False)
        beside = model_card(config.model.source, run.task, facts, metrics, adapter_of=base)
        export_adapter(
            adapter_directory(out),
            run.model,
            host,
            dataclasses.replace(about, card=beside),
            whole={*own, *head, *run.matched.initialised},
            base=base,
            root=config.adapter.scaling == "root",
            replace=replace,
        )


def adapter_directory(out: Path) -> Path:
    """Where the adapter of a run is exported, beside its merged model."""
    return out.with_name("adapter" if out.name == "model" else f"{out.name}-adapter")


def compare(run: Run, params: Params, whole: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise RunError where the model of an exported `config.json` with the exported numbers and the run's own differ on
    documents of it, in float32 (C19)."""
    plain = build_model(dict(config), run.task.head, run.config.model.source)
    batch = documents(run)
    lying = meshes.param_shardings(run.mesh, plain.table.axes, plain.template.shapes)
    try:
        here = _outputs(run.model.template)
        there = here if _alike(run.model.template, plain.template) else _outputs(plain.template)
        rows = run.put(batch)
        ours, theirs = (
            meshes.to_host(forward(dict(own), dict(rows)))
            for forward, own in ((here, params), (there, meshes.put(whole, lying)))
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("export: outputs were not compared, for want of memory on the devices", file=sys.stderr)
        return
    real = _real(batch, run.task.head.kind, ours.shape[1])
    apart = float(np.abs(ours - theirs)[real].max() / max(np.abs(ours[real]).max(), 1e-6))
    if not apart <= MOST:  # nor where it is not a number
        raise RunError(
            f"export: the exported model's logits differ from those of the run by {apart:.1e} of the largest, expected "
            f"at most {MOST}; nothing was written: use another checkpoint with --at"
        )


def documents(run: Run) -> Batch:
    """A few documents of training, short and long, each in a row of its own; as many rows as a mesh divides."""
    encoded = run.data["train"]
    first = np.argsort(encoded.lengths[:LOOKED_AT], kind="stable")
    fitting = first[encoded.lengths[first] <= TOKENS]
    chosen = fitting[np.linspace(0, len(fitting) - 1, ROWS).astype(int)] if len(fitting) else first[:1]
    chosen = np.unique(chosen)
    parts = meshes.batch_parts(run.mesh)
    rows, longest = -(-len(chosen) // parts) * parts, int(encoded.lengths[chosen].max())
    target = int(encoded.target.lengths[chosen].max()) if encoded.target else 0
    return collate(encoded, [[int(one)] for one in chosen], Shape(rows, longest, 1, target))


def _outputs(template: Template) -> Callable[[Params, Params], Float[Array, "r n_or_t c"]]:
    """Outputs in float32, compiled; of a head on a vocabulary those of the first tokens."""

    def outputs(params: Params, batch: Params) -> Float[Array, "r n_or_t c"]:
        found = template.bind({path: array.astype(jnp.float32) for path, array in params.items()})(batch)
        return found.of(found.hidden[:, :TOKENS]) if isinstance(found, LazyLogits) else found

    return jax.jit(outputs)


def _alike(one: Template, other: Template) -> bool:
    """Whether two templates are the same function of the same parameters, so that one program is enough for both."""
    return not one.held and one.keys == other.keys and one.treedef == other.treedef


def _real(batch: Batch, kind: str, count: int) -> Bool[np.ndarray, "r n_or_t"]:
    """Which of so many outputs of each row are of documents, or of their tokens."""
    if kind in ON_DOCUMENTS:
        return batch["index"] >= 0
    return (batch.get("decoder_segment_ids", batch["segment_ids"]) > 0)[:, :count]


def _reopened(run: Run, whole: Mapping[str, np.ndarray], out: Path, fresh: Path) -> None:
    """Open what was written as `predict` does, and see that it holds these numbers and gives the run's tokens; what
    does not is kept aside."""
    problems = [*_weights(run, whole, fresh), *_tokens(run, fresh)]
    if problems:
        aside = out.with_name(f"{out.name}-refused")
        shutil.rmtree(aside, ignore_errors=True)
        fresh.rename(aside)
        raise RunError(listing(f"export: {aside} holds what was written, which is not what was trained", problems))


def _weights(run: Run, whole: Mapping[str, np.ndarray], fresh: Path) -> list[str]:
    head = run.task.head
    written = open_checkpoint(fresh)
    checkpoint = settled(written, head)
    if checkpoint is not written:
        return [f"config.json and the tensors say different things: {'; '.join(checkpoint.remarks)}"]
    model = build_model(checkpoint.config, head, str(fresh))
    matched, found = load_model(model, checkpoint)
    same = {path for path, array in found.items() if np.array_equal(array, np.float32(whole[path]), equal_nan=True)}
    wrong = [path for path in model.template.keys if path not in same or path in matched.initialised]
    return [f"{path}: other numbers than the run's" for path in wrong]


def _tokens(run: Run, fresh: Path) -> list[str]:
    """What is wrong with the tokens that the exported files make of the first rows of a split."""
    name = next((split for split in ("validation", "test") if split in run.rows), "train")
    part, length = run.rows[name], run.config.data.max_length
    texts, targets = tuple(column[:ROWS] for column in part.texts), part.targets[:ROWS]
    reader = run.task.reader.load(fresh)
    if run.task.images:
        same = all(np.array_equal(getattr(reader, key), getattr(run.tokenizer, key)) for key in OF_IMAGES)
        return [] if same else ["preprocessor_config.json: images would be read otherwise"]
    ours = run.data[name].select(np.flatnonzero(run.data[name].rows < len(targets)))
    theirs = run.task.encode(texts, targets, reader, length)
    sides = [("", ours, theirs), *([("target: ", ours.target, theirs.target)] if ours.target and theirs.target else [])]
    return [
        f"{side}{key}: the exported tokenizer gives others for the first rows of {name}"
        for side, before, after in sides
        for key, array in before.tokens.items()
        if not np.array_equal(array, after.tokens[key])
    ]


def _last_tokens(run: Run) -> frozenset[int]:
    """The ids that documents end with, none of which may stand for padding."""
    ids = [(found.tokens.get("input_ids"), found.offsets) for found in run.data.values() if len(found)]
    return frozenset(int(i) for array, offsets in ids if array is not None for i in np.unique(array[offsets[1:] - 1]))


def _facts(run: Run, steps: int, *, merged: bool = True) -> dict[str, str]:
    """How the model was trained, for its card, or for that of its adapter, which is not merged."""
    config = run.config
    return {
        "training rows": f"{len(run.data['train']):,}",
        "steps": str(steps),
        "batch size": str(config.train.batch_size),
        "optimizer": f"{config.optim.name}, learning rate {config.optim.lr:g}",
        **_adapter_facts(config.adapter, merged),
        "seeds": ", ".join(f"{k} {v}" for k, v in config.seed.model_dump().items()),
    }


def _adapter_facts(section: AdapterSection | None, merged: bool) -> dict[str, str]:
    if section is None:
        return {}
    fact = f"{section.kind} of rank {section.rank} on {', '.join(section.match)}"
    held = "" if section.base == "same" else f"{'into' if merged else 'beside'} kernels rounded to {section.base}"
    how = [fact, *(["merged"] if merged else []), *([held] if held else [])]
    return {"adapter": ", ".join(how)}
