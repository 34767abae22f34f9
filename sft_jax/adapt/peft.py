"""Adapters in the form of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Names are those of the weight table. Where a checkpoint keeps several layers of ours in one tensor (GPT-2's c_attn,
Phi-3's qkv_proj), PEFT has one adapter for all of them: their ranks are stacked when it is written, each of which
reaches the outputs of one layer alone, and when it is read each layer gets the ranks that reach its outputs.
Directories are untrusted: nothing in them is run, and patterns are taken as names.
"""

import fnmatch
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sft_jax.errors import ModelError, did_you_mean
from sft_jax.nn.lora import HEAD, SLOT, WORDS, Adapter, column_norms, kernel_of
from sft_jax.weights.files import check_links, open_tensors, read_json, some
from sft_jax.weights.table import SAME, Arrays, Row, Table, save, take

WORD_TABLE, LM_HEAD = f"{WORDS}/embedding", "lm_head"
EXPORTED = "adapter"  # where a run directory has the adapter that it came to
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
TASKS = {
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
    "causal_lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}  # kind of head -> PEFT's name; it has none for others
# What PEFT can do besides, and how a configuration says that it does not.
PLAIN = {
    "bias": "none",
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "use_qalora": False,
    "megatron_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "kasa_config": None,
    "use_bdlora": None,
}
# Beginnings of an adapter that leave the base as it is; the others take something from its kernels, which `peft` does
# again when it loads one, or cannot do again.
BEGINNINGS = ("gaussian", "eva", "orthogonal", "mica")
# What is computed, by these names or by what the file of tensors holds.
READ = (
    "alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
)  # fmt: skip
# What changes nothing of a trained adapter: where it is from, how it was trained, and settings of beginnings.
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
# Endings of names in the file -> what they are here; of tables the matrices have names of their own.
ENDINGS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


@dataclass(frozen=True)
class Found:
    """What a directory holds: which layers have an adapter, and arrays by our paths, a new head's too."""

    plan: dict[str, Adapter]
    arrays: Arrays


def write(
    directory: Path,
    table: Table,
    plan: Mapping[str, Adapter],
    params: Mapping[str, Any],
    whole: Collection[str],
    *,
    kind: str,
    base: str,
    root: bool,
) -> None:
    """Write adapters, and what of the model was trained whole, into a directory.

    `params` are all of the adapted model's; `kind` is that of the head, `base` the model that PEFT is to load, and
    `root` whether alphas are divided by the root of the rank.
    """
    tensors, ranks, alphas = {}, {}, {}
    for module, rows in _modules(table, plan).items():
        tensors |= {f"{PREFIX}{module}{name}": t for name, t in _stacked(rows, plan, params).items()}
        scale = next(plan[path].scale for path in map(_layer, rows) if path in plan)
        ranks[module] = sum(plan[path].rank for path in map(_layer, rows) if path in plan)
        alphas[module] = _plain(scale * (ranks[module] ** 0.5 if root else ranks[module]))
    saved = sorted({row.theirs.rpartition(".")[0] for row in table.rows if row.ours in whole})
    inside = tuple(row for row in table.rows if any(row.theirs.startswith(f"{module}.") for module in saved))
    wide = {row.ours: np.asarray(params[row.ours].astype(np.float32)[...]) for row in inside}
    kept = save(replace(table, rows=inside, counters=()), wide)
    if kind == "causal_lm" and WORD_TABLE in whole and not any(row.ours.startswith(f"{HEAD}/") for row in table.rows):
        kept[f"{LM_HEAD}.weight"] = wide[WORD_TABLE]  # so that PEFT ties what it saves, whatever it is called
        saved = [*saved, LM_HEAD]
    (rank, alpha), _ = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0]
    config = {
        "peft_type": "LORA",
        "task_type": TASKS.get(kind),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "modules_to_save": saved or None,
        "use_dora": any(adapter.dora for adapter in plan.values()),
        "use_rslora": root,
        "fan_in_fan_out": any(row.layout is SAME for row in table.rows if row.ours.removesuffix("/kernel") in plan),
        "ensure_weight_tying": LM_HEAD in saved and f"{HEAD}/embedding" not in whole,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    save_file(tensors | {f"{PREFIX}{n}": t for n, t in kept.items()}, directory / WEIGHTS, metadata={"format": "pt"})


def read(directory: Path, table: Table, shapes: Mapping[str, tuple[int, ...]]) -> Found:
    """The adapters that a directory holds for the model of this table, whose parameters have these shapes."""
    check_links(directory, (CONFIG, WEIGHTS))
    if not (directory / CONFIG).is_file() and (directory / EXPORTED / CONFIG).is_file():
        raise ModelError(f"{directory}: is a run, not an adapter; its adapter is in {directory / EXPORTED}")
    config = read_json(directory / CONFIG)
    _check(config, str(directory / CONFIG))
    file = directory / WEIGHTS
    if not file.is_file():
        raise ModelError(f"{directory}: no {WEIGHTS}; give a directory of an adapter that is kept as safetensors")
    rows = {name: [] for row in table.rows for name in _names(row, table)}
    for row in table.rows:
        for name in _names(row, table):
            rows[name].append(row)
    parts: dict[str, dict[str, np.ndarray]] = {}
    arrays: Arrays = {}
    problems: list[str] = []
    for name, tensor in open_tensors(file).items():
        bare = name.removeprefix(PREFIX).replace(".modules_to_save.", ".")
        ending = next((e for e in ENDINGS if bare.endswith(e)), None)
        if ".base_layer." in bare or any(fnmatch.fnmatchcase(bare, pattern) for pattern in table.ignore):
            continue  # PEFT's copy of a table, which is that of the base; of a tied head what the table is
        if ending and f"{bare.removesuffix(ending)}.weight" in rows:
            parts.setdefault(bare.removesuffix(ending), {})[ENDINGS[ending]] = tensor
            if not _targeted(bare.removesuffix(ending), config):
                problems.append(f"{name}: {CONFIG} does not name this layer as one with an adapter")
        elif not ending and bare in rows:
            wrong = [row.ours for row in rows[bare] if row.shape(tensor.shape) != shapes[row.ours]]
            problems += [f"{name}: shape {tensor.shape} does not fit {path}" for path in wrong]
            arrays |= {row.ours: take(row, tensor) for row in rows[bare] if not wrong}
        else:
            problems.append(f"{name}: the model has no such layer{did_you_mean(bare, rows)}")
    problems += [
        f"{module}: use_dora={bool(config.get('use_dora'))} in {CONFIG}, and the file of tensors says otherwise"
        for module, held in parts.items()
        if ("magnitude" in held) != bool(config.get("use_dora"))
    ]
    plan = {}
    for module, held in parts.items():
        try:
            for row, adapter, found in _divided(rows[f"{module}.weight"], held, _scale(module, held, config), shapes):
                plan[_layer(row)] = adapter
                arrays |= {f"{_layer(row)}/{SLOT}/{name}": array for name, array in found.items()}
        except (KeyError, ValueError) as error:
            problems.append(f"{module}: {f'no {error} of it' if isinstance(error, KeyError) else error}")
    if problems or not plan:
        raise ModelError(some(f"{directory}: is not of this model", problems or ["it holds no adapter"]))
    return Found(plan, arrays)


def _modules(table: Table, plan: Mapping[str, Adapter]) -> dict[str, list[Row]]:
    """The modules of the checkpoint that hold a layer with an adapter, and the matrices in each, in their order."""
    names = {kernel_of(path, {row.ours for row in table.rows}) for path in plan}
    held = {row.theirs for row in table.rows if row.ours in names}
    found: dict[str, list[Row]] = {theirs.removesuffix(".weight"): [] for theirs in sorted(held)}
    for row in table.rows:
        if row.theirs in held:
            found[row.theirs.removesuffix(".weight")].append(row)
    return found


def _stacked(rows: Sequence[Row], plan: Mapping[str, Adapter], params: Mapping[str, Any]) -> Arrays:
    """The adapters of the layers in one tensor as one: their ranks side by side, each for the outputs of its layer."""
    given = [row for row in rows if _layer(row) in plan]
    scale = plan[_layer(given[0])].scale
    a = np.concatenate([_of(row, "a", params) for row in given], axis=1)
    rank, place, columns, sizes = a.shape[1], 0, [], []
    for row in rows:
        adapter = plan.get(_layer(row))
        kernel = params[row.ours].astype(np.float32)
        b = np.zeros((rank, kernel.shape[1]), np.float32)
        if adapter:
            b[place : place + adapter.rank] = _of(row, "b", params) * (adapter.scale / scale)
            place += adapter.rank
        columns.append(b)
        sized = adapter is not None and adapter.dora
        sizes.append(_of(row, "magnitude", params) if sized else column_norms(np.asarray(kernel[...])))
    tables = rows[0].ours.endswith("/embedding")
    names = (".lora_embedding_A", ".lora_embedding_B") if tables else (".lora_A.weight", ".lora_B.weight")
    found = dict(zip(names, (a.T, np.concatenate(columns, axis=1).T), strict=True))
    dora = any(plan[_layer(row)].dora for row in given)
    return found | ({".lora_magnitude_vector": np.concatenate(sizes)} if dora else {})


def _divided(
    rows: Sequence[Row], held: Mapping[str, np.ndarray], scale: float, shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[Row, Adapter, Arrays]]:
    """(matrix, its adapter, the arrays) of each layer that one of PEFT's adapters reaches."""
    a, b = (held[name].astype(np.float32).T for name in "ab")
    rank, sizes = a.shape[-1], [shapes[row.ours][1] for row in rows]
    inputs = shapes[rows[0].ours][0]
    if a.shape != (inputs, rank) or b.shape != (rank, sum(sizes)):
        raise ValueError(f"matrices {a.shape} and {b.shape} do not fit {inputs} inputs and {sum(sizes)} outputs")
    magnitude = held["magnitude"].astype(np.float32) if "magnitude" in held else None
    if magnitude is not None and magnitude.shape != (sum(sizes),):
        raise ValueError(f"sizes {magnitude.shape} do not fit {sum(sizes)} outputs")
    found, begin = [], 0
    for row, size in zip(rows, sizes, strict=True):
        columns = slice(begin, begin + size)
        begin += size
        reaching = b[:, columns].any(axis=1) if len(rows) > 1 and b.any() else np.ones(rank, bool)
        if reaching.any():
            arrays = {"a": a[:, reaching], "b": b[reaching, columns]}
            arrays |= {} if magnitude is None else {"magnitude": magnitude[columns]}
            found.append((row, Adapter(int(reaching.sum()), scale, magnitude is not None), arrays))
    return found


def _scale(module: str, held: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> float:
    """What a module's product is multiplied by; an alpha is a module's own where its name ends as a pattern says."""
    own = [a for name, a in config.get("alpha_pattern", {}).items() if module == name or module.endswith(f".{name}")]
    rank = len(held["a"])
    return float(own[0] if own else config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)


def _check(config: Mapping[str, Any], where: str) -> None:
    """Refuse what would be computed otherwise than PEFT does."""
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type is {config.get('peft_type')!r:.60}, only LORA is supported")
    for key, plain in PLAIN.items():
        if config.get(key) not in (None, plain):
            raise ModelError(f"{where}: {key}={config[key]!r:.60} is not supported; only {plain!r} is")
    unknown = sorted(key for key in config if key not in (*READ, *HARMLESS, *PLAIN) and config[key])
    if unknown:
        said = f"{unknown[0]}={config[unknown[0]]!r:.60}"
        raise ModelError(f"{where}: {said} is not known here; remove it if it is of training alone")
    begun = config.get("init_lora_weights")
    if type(begun) is not bool and begun is not None and str(begun).lower() not in BEGINNINGS:
        raise ModelError(
            f"{where}: init_lora_weights={begun!r:.60} changed the base when the adapter was begun, so that it does "
            f"not belong to the base as it is; save it again with path_initial_model_for_weight_conversion of peft"
        )
    alphas = config.get("alpha_pattern") or {}
    known = isinstance(alphas, dict) and all(name.replace(".", "").replace("_", "").isalnum() for name in alphas)
    numbers = [config.get("lora_alpha"), *(alphas.values() if isinstance(alphas, dict) else [])]
    if not known or not all(type(n) in (int, float) and 0 < n < 1e6 for n in numbers):
        raise ModelError(f"{where}: lora_alpha and alpha_pattern are {numbers!r:.60}, expected numbers by names")


def _targeted(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a module is one that a configuration gives an adapter, where it names them; patterns are not run."""

    def among(names: Any) -> bool:
        return isinstance(names, list) and any(module == name or module.endswith(f".{name}") for name in names)

    layers = config.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    numbers = [int(part) for part in module.split(".") if part.isdecimal()][:1]
    chosen = not isinstance(layers, list) or not numbers or numbers[0] in layers
    listed = not isinstance(config.get("target_modules"), list) or among(config["target_modules"])
    return listed and chosen and not among(config.get("exclude_modules"))


def _names(row: Row, table: Table) -> set[str]:
    """What a tensor may be called: an adapter may be of the backbone alone."""
    return {row.theirs, row.theirs.removeprefix(table.prefix)}


def _layer(row: Row) -> str:
    return row.ours.rpartition("/")[0]


def _of(row: Row, name: str, params: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(params[f"{_layer(row)}/{SLOT}/{name}"], np.float32)


def _plain(number: float) -> int | float:
    return round(number) if abs(number - round(number)) < 1e-9 * abs(number) else number
