"""The metrics of each task by name, so that a configuration is checked before anything is read.

The tasks compute them; a test holds this list and theirs to be the same.
"""

from collections.abc import Sequence
from typing import Any

from sft_jax import names
from sft_jax.errors import did_you_mean

AVERAGES = {"macro": "mean over labels", "micro": "over all answers", "weighted": "mean over labels by their rows"}
AVERAGED = {
    f"{name}_{average}": f"{name if name != 'f1' else 'F1'}, {meaning}"
    for name in ("precision", "recall", "f1")
    for average, meaning in AVERAGES.items()
}
RANKING = {
    "roc_auc": "area under the ROC curve, mean over labels",
    "average_precision": "area under precision by recall, mean over labels",
}
LOSSES = {"loss": "what is trained on", "log_loss": "cross-entropy, without smoothing or weights of classes"}
CLASSES = {
    **LOSSES,
    "accuracy": "share of right answers",
    **AVERAGED,
    "matthews": "Matthews' correlation",
    "ece": "expected calibration error (arXiv 1706.04599)",
}
SPANS = {
    "span_precision": "share of predicted spans that are right in type and place, as seqeval",
    "span_recall": "share of spans that are found",
    "span_f1": "F1 of spans",
    "span_f1_macro": "F1 of spans, mean over types",
    "span_f1_strict": "F1 of spans, tags read strictly by their scheme",
}
TOKENS = {
    "loss": "mean negative log likelihood of a token that is learned",
    "perplexity": "its exponential",
    "token_accuracy": "share of tokens that are the likeliest, each after the right ones before it",
    "answer_accuracy": "share of documents of which every token is",
}
METRICS = {
    "sequence_classification": {
        **CLASSES,
        **RANKING,
        "top5_accuracy": "share of rows whose label is among the five likeliest; with more than five labels",
    },
    "multi_label_classification": {
        **LOSSES,
        "subset_accuracy": "share of rows whose labels are all right",
        "hamming_loss": "share of labels of rows that are wrong",
        **AVERAGED,
        **{f"{name}_samples": f"{name}, mean over rows" for name in ("precision", "recall", "f1")},
        **RANKING,
    },
    "regression": {
        "loss": "what is trained on",
        "mae": "mean absolute error",
        "mse": "mean squared error",
        "rmse": "root of the mean squared error",
        "pearson": "Pearson's correlation",
        "spearman": "Spearman's rank correlation",
        "r2": "share of the variance that is explained",
    },
    "token_classification": {**CLASSES, **SPANS},
    "question_answering": {
        "loss": "mean over begin and end of the answer",
        "exact_match": "share of answers that are one of the right ones, as SQuAD's own script has it",
        "f1": "F1 of their words",
        "exact_match_answered": "`exact_match` of rows with an answer; with `task.no_answer`",
        "f1_answered": "`f1` of rows with an answer; with `task.no_answer`",
        "exact_match_unanswered": "`exact_match` of rows without one; with `task.no_answer`",
    },
    "causal_lm": TOKENS,
    "seq2seq": {
        **TOKENS,
        "bleu": "sacreBLEU of the first `eval.answers` answers",
        "chrf": "chrF of them",
        "rouge1": "ROUGE of words",
        "rouge2": "ROUGE of pairs of words",
        "rougeL": "ROUGE of the longest common sequence",
    },
}
METRICS["image_classification"] = METRICS["sequence_classification"]
HEADLINES = {
    "sequence_classification": "accuracy",
    "image_classification": "accuracy",
    "multi_label_classification": "f1_micro",
    "regression": "pearson",
    "token_classification": "span_f1",
    "question_answering": "f1",
    "causal_lm": "token_accuracy",
    "seq2seq": "chrf",
}  # what a run is compared by, and its best step picked by unless `eval.best_metric` says otherwise


def metric_names(task: Any) -> list[str]:
    """The metrics that a section of `config/tasks.py` can have, as far as it says without rows."""
    spans = task.kind == "token_classification" and task.scheme == "none"
    apart = task.kind == "question_answering" and not task.no_answer
    without = SPANS if spans else ("exact_match_answered", "f1_answered", "exact_match_unanswered") if apart else ()
    return [name for name in METRICS[task.kind] if name not in without]


def unknown_metric(kind: str, name: str, known: Sequence[str]) -> str:
    """That a task has no such metric, what may be meant, and those there are."""
    hint = did_you_mean(names.metric(name, known) or name, known)
    return f"{kind} has no metric '{name}'{hint} (known: {', '.join(known)})"
