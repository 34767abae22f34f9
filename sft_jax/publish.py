"""The model of a run as directories: adapters merged and compared, described, and written for others to load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_jax import mesh as meshes
from sft_jax.adapt.merge import check, merge
from sft_jax.config.adapter import AdapterSection
from sft_jax.export import About, export_adapter, export_model, model_card
from sft_jax.models.family import build_model
from sft_jax.nn.heads import ON_VOCABULARY
from sft_jax.nn.lora import HEAD, is_adapter
from sft_jax.nn.template import Params
from sft_jax.run import Run
from sft_jax.train.state import TrainState


def publish(
    run: Run, state: TrainState, frozen: Params, out: Path, metrics: Mapping[str, float], *, replace: bool
) -> None:
    """Write the model, and its adapter beside it where it has one; `metrics` are those of its card."""
    params, adapted = _merged(run, {**state.weights, **frozen})
    if not meshes.is_first_process():
        return
    config, source = run.config, run.checkpoint
    card = model_card(config.model.source, run.task, _facts(run, int(state.step)), metrics)
    about = About(source.config, run.task, source.directory, config.data.max_length, card, config.data.clean)
    if adapted is not None and config.adapter:
        own = [path for path in run.model.template.paths(run.trainable) if not is_adapter(path)]
        head = [] if run.task.head.kind in ON_VOCABULARY else [p for p in params if p.startswith(f"{HEAD}/")]
        export_adapter(
            adapter_directory(out),
            run.model,
            adapted,
            about,
            whole={*own, *head, *run.matched.initialised},
            base=config.model.source,
            root=config.adapter.scaling == "root",
            replace=replace,
        )
    export_model(out, run.model, params, about, replace=replace)


def adapter_directory(out: Path) -> Path:
    """Where the adapter of a run is exported, beside its merged model."""
    return out.with_name("adapter" if out.name == "model" else f"{out.name}-adapter")


def _facts(run: Run, steps: int) -> dict[str, str]:
    """How the model was trained, for its card."""
    config = run.config
    return {
        "training rows": f"{len(run.data['train']):,}",
        "steps": str(steps),
        "batch size": str(config.train.batch_size),
        "optimizer": f"{config.optim.name}, learning rate {config.optim.lr:g}",
        **_adapter_facts(config.adapter),
        "seeds": ", ".join(f"{k} {v}" for k, v in config.seed.model_dump().items()),
    }


def _adapter_facts(section: AdapterSection | None) -> dict[str, str]:
    if section is None:
        return {}
    fact = f"{section.kind} of rank {section.rank} on {', '.join(section.match)}"
    held = "" if section.base == "same" else f", into kernels rounded to {section.base}"
    return {"adapter": f"{fact}, merged{held}"}


def _merged(run: Run, params: Params) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(parameters on the host as an export has them, those with adapters): what is merged is compared on rows first."""
    host = run.model.template.unstack(meshes.to_host(params))
    if not run.model.adapters:
        return host, None
    whole = merge(run.model.adapters, host)
    plain = build_model(run.checkpoint.config, run.task.head, run.config.model.source)
    rows = {name: array[: meshes.batch_parts(run.mesh)] for name, array in run.batches[0].items()}
    lying = meshes.param_shardings(run.mesh, plain.table.axes, plain.template.shapes)
    check(run.model.template, params, plain.template, meshes.put(whole, lying), run.put(rows))
    return whole, host
