"""What others call things: names of `transformers`, PEFT and TRL, and what stands for them here.

Said wherever a name is not known, and listed in `docs/coming-from-hf.md`. One table for both; knows nothing of the rest
of the package, so that a test sees whether all that it names is there.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

TRAINING, PEFT, TRL = "TrainingArguments", "LoraConfig", "TRL"


class Name(NamedTuple):
    """A setting of another library."""

    theirs: str
    ours: str | None  # `key` or `key: value`; None where there is no such setting
    note: str = ""
    library: str = TRAINING
    older: bool = False  # of a version that is not the latest


SETTINGS = (
    Name("output_dir", "run.dir"),
    Name("overwrite_output_dir", "run.resume: restart", "checkpoints are moved aside, not deleted", older=True),
    Name("resume_from_checkpoint", "run.resume", "the default; `run.resume_step` goes on from one of them"),
    Name("seed", "seed", "sets `seed.init`, `seed.data` and `seed.dropout`"),
    Name("data_seed", "seed.data"),
    Name("full_determinism", "run.deterministic"),
    Name("num_train_epochs", "train.epochs"),
    Name("max_steps", "train.steps"),
    Name("per_device_train_batch_size", "train.batch_size", "of a step in all: over devices and microbatches"),
    Name("per_gpu_train_batch_size", "train.batch_size", "of a step in all", older=True),
    Name("per_device_eval_batch_size", "eval.batch_size"),
    Name("gradient_accumulation_steps", "train.accumulate", "microbatches of the same `train.batch_size`"),
    Name("learning_rate", "optim.lr"),
    Name("lr_scheduler_type", "optim.schedule.kind"),
    Name("lr_scheduler_kwargs", "optim.schedule", "`end`, `decay`"),
    Name("warmup_steps", "optim.schedule.warmup", "a number of steps from 1 on, a share below"),
    Name("warmup_ratio", "optim.schedule.warmup", "a share below 1", older=True),
    Name("optim", "optim.name", "any optimizer of optax"),
    Name("optim_args", "optim.options"),
    Name("weight_decay", "optim.weight_decay", "off biases and norms by `optim.groups`, as there"),
    Name("adam_beta1", "optim.options.b1"),
    Name("adam_beta2", "optim.options.b2"),
    Name("adam_epsilon", "optim.options.eps"),
    Name("max_grad_norm", "optim.clip"),
    Name("label_smoothing_factor", "task.label_smoothing"),
    Name("neftune_noise_alpha", "model.embedding_noise"),
    Name("bf16", "train.compute_dtype: bfloat16"),
    Name("fp16", "train.compute_dtype: bfloat16", "bfloat16 needs no scaling of the loss; float16 is not there"),
    Name("gradient_checkpointing", "train.remat: full", "`dots` keeps products"),
    Name("activation_checkpointing", "train.remat: full", "`dots` keeps products"),
    Name("logging_steps", "train.log_every"),
    Name("report_to", "report.wandb", "the project; TensorBoard's events are always written"),
    Name("run_name", "run.dir"),
    Name("eval_strategy", "eval.every", "`epoch`, `never` or a number of steps"),
    Name("evaluation_strategy", "eval.every", "`epoch`, `never` or a number of steps", older=True),
    Name("eval_steps", "eval.every"),
    Name("save_steps", "checkpoint.every", "left out, each validation saves"),
    Name("save_strategy", "checkpoint.every", "left out, each validation saves"),
    Name("save_total_limit", "checkpoint.keep", "the best one stays besides"),
    Name("metric_for_best_model", "eval.best_metric"),
    Name("greater_is_better", "eval.best_mode"),
    Name("early_stopping_patience", "eval.patience", "of EarlyStoppingCallback", older=True),
    Name("early_stopping_threshold", "eval.min_delta", "of EarlyStoppingCallback", older=True),
    Name("group_by_length", "data.layout.kind: packed", "the default; there is less padding still", older=True),
    Name("train_sampling_strategy", "data.layout.kind: packed", "the default; there is less padding still"),
    Name("dataloader_num_workers", "data.workers"),
    Name("dataloader_prefetch_factor", "data.prefetch"),
    Name("fsdp", "mesh.fsdp", "the number of devices that parameters are divided over"),
    Name("load_best_model_at_end", None, "always: the best step is tested and exported"),
    Name("remove_unused_columns", None, "always: columns that no setting names are not read"),
    Name("torch_compile", None, "always: a step is one compiled program"),
    Name("use_liger_kernel", None, "always: logits over a vocabulary are computed in chunks"),
    Name("push_to_hub", None, "`run.dir/model` is a directory to upload"),
    Name("deepspeed", "mesh.fsdp", "parameters and moments divided over devices"),
    Name("r", "adapter.rank", library=PEFT),
    Name("lora_r", "adapter.rank", library=PEFT, older=True),
    Name("lora_alpha", "adapter.alpha", library=PEFT),
    Name("target_modules", "adapter.match", "patterns over paths of layers: `**/attn/{q,v}`", library=PEFT),
    Name("modules_to_save", "adapter.also", "a new head is trained in any case", library=PEFT),
    Name("use_rslora", "adapter.scaling: root", library=PEFT),
    Name("use_dora", "adapter.kind: dora", library=PEFT),
    Name("lora_dropout", "model.dropout", "an adapter has none of its own", library=PEFT),
    Name("layers_to_transform", "adapter.match", "as part of the pattern: `blocks/{8..11}/attn/q`", library=PEFT),
    Name("layers_pattern", "adapter.match", "as part of the pattern: `blocks/*/attn/q`", library=PEFT),
    Name("load_in_4bit", "adapter.base: nf4", "of BitsAndBytesConfig", library=PEFT, older=True),
    Name("load_in_8bit", "adapter.base: int8", "of BitsAndBytesConfig", library=PEFT, older=True),
    Name("bnb_4bit_quant_type", "adapter.base: nf4", "of BitsAndBytesConfig", library=PEFT, older=True),
    Name("base_model_name_or_path", "model.source", library=PEFT),
    Name("model_name_or_path", "model.source", library=TRL),
    Name("model_name", "model.source", library=TRL),
    Name("tokenizer_name", "model.source", "the tokenizer that belongs to the model", library=TRL),
    Name("dataset_name", "data.source", "`kind: hub`, `name`", library=TRL),
    Name("train_file", "data.source.train", "with `kind: files`", library=TRL),
    Name("validation_file", "data.source.validation", "with `kind: files`", library=TRL),
    Name("test_file", "data.source.test", "with `kind: files`", library=TRL),
    Name("max_length", "data.max_length", library=TRL),
    Name("max_seq_length", "data.max_length", library=TRL),
    Name("max_source_length", "data.max_length", library=TRL),
    Name("max_train_samples", "data.max_rows", library=TRL),
    Name("packing", "data.layout.kind: packed", "the default; packed documents do not see each other", library=TRL),
    Name("dataset_text_field", "task.text", library=TRL),
    Name("text_column", "task.text", library=TRL),
    Name("label_column", "task.label", library=TRL),
    Name("completion_only_loss", "task.loss_on", library=TRL),
    Name("assistant_only_loss", "task.loss_on: answers", "the default of chats", library=TRL),
    Name("chat_template_path", "task.template", library=TRL),
    Name("torch_dtype", "train.compute_dtype", library=TRL),
    Name("attn_implementation", "train.attention", library=TRL),
    Name("max_new_tokens", "task.generate.max_new_tokens", library=TRL),
    Name("use_peft", "adapter", library=TRL),
    Name("peft_config", "adapter", library=TRL),
)
TASKS = {
    "sequence_classification": ("text_classification", "classification", "sentiment_analysis", "seq_cls", "glue"),
    "multi_label_classification": ("multilabel", "multi_label", "multilabel_classification"),
    "regression": ("text_regression", "sts", "scoring"),
    "token_classification": ("ner", "named_entity_recognition", "pos", "tagging", "token_cls"),
    "question_answering": ("qa", "extractive_question_answering", "squad", "reading_comprehension"),
    "causal_lm": ("text_generation", "language_modeling", "clm", "sft", "chat", "instruction_tuning", "lm"),
    "image_classification": ("vision_classification", "image"),
    "seq2seq": ("text2text_generation", "translation", "summarization", "seq2seq_lm"),
}  # ours -> what others call it
VALUES = {
    "float32": ("fp32", "float", "no"),
    "bfloat16": ("bf16", "fp16", "float16", "half"),
    "constant": ("constant_with_warmup",),
    "cosine": ("cosine_with_min_lr", "cosine_with_restarts"),
    "wsd": ("warmup_stable_decay",),
    "adamw": ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"),
    "files": ("file", "local", "csv", "json", "jsonl", "parquet", "text"),
    "hub": ("huggingface", "hf", "datasets", "dataset"),
    "full": ("true", "gradient_checkpointing"),
    "never": ("no",),
    "epoch": ("epochs",),
    "max": ("greater",),
    "min": ("lower", "less"),
    "nf4": ("4bit", "int4", "fp4"),
    "int8": ("8bit",),
    "xla": ("eager", "sdpa"),
    "flash": ("flash_attention_2", "flash_attention_3"),
}
# The last part of the name of a module -> our layers, as a pattern. Those of several families, so that each is tried.
MODULES = {
    "attn/q": ("q_proj", "query", "q_lin", "q"),
    "attn/k": ("k_proj", "key", "k_lin", "k"),
    "attn/v": ("v_proj", "value", "v_lin", "v"),
    "attn/o": ("o_proj", "out_proj", "out_lin", "o", "attention.output.dense", "attn.c_proj"),
    "attn/{q,k,v}": ("qkv_proj", "c_attn", "query_key_value", "qkv"),
    "attn": ("self_attn", "attention", "attn", "SelfAttention", "self_attention", "self"),
    "cross": ("encoder_attn", "EncDecAttention", "crossattention"),
    "mlp/up": ("up_proj", "fc1", "c_fc", "wi", "lin1", "intermediate.dense", "intermediate"),
    "mlp/gate": ("gate_proj",),
    "mlp/{gate,up}": ("gate_up_proj",),
    "mlp/down": ("down_proj", "fc2", "wo", "lin2", "output.dense", "mlp.c_proj", "c_proj"),
    "mlp": ("mlp", "ffn", "feed_forward", "DenseReluDense"),
    "embed": ("embeddings", "embedder", "embed"),
    "embed/word": ("embed_tokens", "word_embeddings", "wte", "shared"),
    "embed/position": ("position_embeddings", "wpe"),
    "head": ("classifier", "lm_head", "score", "qa_outputs", "fc", "head"),
    "head/dense": ("pooler", "pre_classifier"),
    "blocks": ("encoder", "all-linear", "layers", "layer", "h", "transformer"),
}
BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+|\*|\{[^{}]*\})(?=\.|$)")
_SETTINGS: Mapping[str, Name] = {name.theirs: name for name in SETTINGS}


def setting(name: str) -> str:
    """`; did you mean 'optim.lr'?` for a setting of another library, or why there is none; else nothing."""
    found = _SETTINGS.get(name.removeprefix("--").replace("-", "_"))
    if found is None:
        return ""
    return f"; did you mean '{found.ours}'?" if found.ours else f"; there is no such setting, {found.note}"


def task(word: str) -> str | None:
    """Our kind of task for what others call theirs, by its name or by that of a class of `transformers`."""
    plain = _plain(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word)).removeprefix("auto_model_for_")
    kinds = {**_turned(TASKS), **{kind: kind for kind in TASKS}}
    return kinds.get(plain) or next(
        (ours for theirs, ours in kinds.items() if _plain(theirs, "") == _plain(plain, "")), None
    )


def value(word: str, known: Iterable[str]) -> str | None:
    """Which of the known words stands for one that others use."""
    return next((ours for ours in known if _plain(word) in VALUES.get(ours, ())), None)


def metric(word: str, known: Iterable[str]) -> str | None:
    """Which of the known metrics is meant by one that `transformers` or scikit-learn would call so."""
    plain = _plain(word).removeprefix("eval_")
    turned = "_".join(reversed(plain.split("_")))  # macro_f1
    others = {"acc": "accuracy", "f1": "f1_macro", "matthews_correlation": "matthews", "mcc": "matthews"}
    others |= {"auc": "roc_auc", "pearsonr": "pearson", "spearmanr": "spearman", "em": "exact_match"}
    others |= {"rouge_l": "rougeL", "rougel": "rougeL", "sacrebleu": "bleu", "overall_f1": "span_f1"}
    given = [*known]
    return next((name for name in (plain, turned, others.get(plain, "")) if name in given), None)


def layers(pattern: str, fits: Callable[[str], bool]) -> str | None:
    """Our pattern for a module of another library's, such as `q_proj` or `vit.encoder.layer.*`; it fits something."""
    return next((found for found in _candidates(pattern) if fits(found)), None)


def _candidates(pattern: str) -> Iterator[str]:
    plain = pattern.strip("*.").removesuffix(".weight").removesuffix(".bias") if "/" not in pattern else ""
    if not plain:
        return
    block = BLOCK.search(pattern)
    rest = plain[min(block.end(), len(plain)) :].strip(".") if block else plain
    ours = _turned(MODULES)
    ending = next((ours[end] for end in _endings(rest) if end in ours), None) if rest else None
    place = (
        f"blocks/{block[1]}" if block else ("**" if ending and ending.startswith(("attn", "mlp", "cross")) else None)
    )
    if block and rest and not ending:
        return
    parts = [part for part in (place, ending) if part]
    for side in ("", "**/", "stages/*/"):
        for end in ("", "/**"):
            yield f"{side if place != '**' else ''}{'/'.join(parts)}{end}"


def _endings(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[begin:]) for begin in range(max(0, len(parts) - 2), len(parts)))


def _turned(table: Mapping[str, Iterable[str]]) -> dict[str, str]:
    return {theirs: ours for ours, names in table.items() for theirs in names}


def _plain(word: str, between: str = "_") -> str:
    return re.sub(r"[\s_-]+", between, word.strip().lower())
