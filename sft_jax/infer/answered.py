"""Answers in evaluation: the first rows of a split, answered by what is being trained, shown and scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sft_jax.data.prepare import Prepared
from sft_jax.infer.generate import Generator
from sft_jax.models.family import Model
from sft_jax.nn.template import Params
from sft_jax.tasks.task import Task


@dataclass(frozen=True)
class Answered:
    """What was answered, and how well."""

    samples: list[dict[str, Any]]  # of the first rows, for people
    metrics: dict[str, float]  # of a task that scores its answers
    answers: list[str]  # of all rows that were answered


def answering(
    model: Model,
    task: Task,
    tokenizer: Any,
    rows: Prepared | None,
    usable: Sequence[int],
    max_length: int,
    dtype: Any,
    *,
    scored: int,
    shown: int,
    batch_size: int,
) -> Callable[[Params], Answered] | None:
    """What answers rows, of a task that answers in words: so many to be scored, if it does that, and to be shown.

    `usable` are the rows that became documents: what a template refuses cannot be asked either.
    """
    scored = scored if task.answer_metrics else 0
    if task.generation is None or task.prompt is None or rows is None or not max(scored, shown):
        return None
    picked = list(usable[: max(scored, shown)])
    texts = [[column[row] for row in picked] for column in rows.texts]
    prompts = task.prompt(texts, tokenizer, max_length)
    stop, rules = tuple(task.stops(tokenizer)), task.rules(tokenizer)
    generator = Generator(model, task.generation, stop, rules, dtype)
    generator.check(int(prompts.lengths.max()))  # before anything is trained
    asked = [task.asked(texts, number) for number in range(min(shown, len(picked)))]
    targets = [rows.targets[row] for row in picked[:scored]]

    def answered(params: Params) -> Answered:
        records = [answer.record(tokenizer) for answer in generator(params, prompts, batch_size)]
        metrics = {}
        if task.answer_metrics and scored:
            metrics = task.answer_metrics([record["answer"] for record in records[:scored]], targets)
        samples = [{"prompt": prompt, **record} for prompt, record in zip(asked, records, strict=False)]
        return Answered(samples, metrics, [record["answer"] for record in records])

    return answered
