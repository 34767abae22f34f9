"""Answers are those of `transformers`: its model and tokenizer on windows, and the spans that its scripts pick."""

import numpy as np
import pytest
from datasets import Dataset
from test_parity_export import FAMILIES, source
from torch_reference import TOLERANCE, torch, transformers

from sft_jax.config.tasks import QuestionAnswering
from sft_jax.data.batch import Shape, collate
from sft_jax.data.contexts import tokenize_contexts
from sft_jax.data.rows import Rows
from sft_jax.data.text import load_tokenizer
from sft_jax.export import About, export_model
from sft_jax.infer.predict import load_predictor
from sft_jax.tasks.task import build_task
from sft_jax.weights.files import open_checkpoint

LENGTH, STRIDE = 24, 6
QUESTIONS = ["was the film good", "what was bad", "  is it naïve"]
CONTEXTS = [
    "the film was good and bad, goodly badly " * 4,
    "the film was, sadly, not good!",
    "naïve café — 漢字 and ½ " * 3,
]


def windows_of_transformers(directory):
    """(windows by its tokenizer, start and end logits by its model) of an exported or published directory."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    settings = {"truncation": "only_second", "max_length": LENGTH, "stride": STRIDE, "padding": True}
    more = {"return_overflowing_tokens": True, "return_offsets_mapping": True, "return_tensors": "pt"}
    found = tokenizer([q.strip() for q in QUESTIONS], CONTEXTS, **settings, **more)
    model, report = transformers.AutoModelForQuestionAnswering.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    fields = {k: v for k, v in found.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        outputs = model.eval()(**fields)
    return found, torch.stack([outputs.start_logits, outputs.end_logits], dim=-1).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_answers_as_in_transformers(family, tmp_path, record_property):
    """R57, C7: windows, places, logits and answers of an export are those that `transformers` has of it.

    What others wrote is asked by the same way.
    """
    pair = source(family, tmp_path / "source", labels=2, kind="question_answering")
    section = QuestionAnswering(kind="question_answering", stride=STRIDE)
    config = open_checkpoint(pair.directory).config
    out = tmp_path / "export"
    export_model(out, pair.model, pair.params, About(config, build_task(section, {}), pair.directory, LENGTH, "a card"))
    theirs, logits = windows_of_transformers(out)
    asked = [question.strip() for question in QUESTIONS]
    ours = tokenize_contexts(load_tokenizer(out), asked, CONTEXTS, LENGTH, STRIDE, cut=False)
    assert ours.rows.tolist() == theirs["overflow_to_sample_mapping"].tolist() and len(ours) > len(QUESTIONS)
    real = theirs["attention_mask"].numpy() > 0
    assert ours.tokens["input_ids"].tolist() == theirs["input_ids"].numpy()[real].tolist()
    of_context = np.stack([[s == 1 for s in theirs.sequence_ids(w)] for w in range(len(ours))])[real]
    places = theirs["offset_mapping"].numpy()[real]
    assert (
        np.stack([ours.beside["begin"], ours.beside["end"]], axis=1) == np.where(of_context[:, None], places, -1)
    ).all()

    batch = collate(ours, [[w] for w in range(len(ours))], Shape(len(ours), real.shape[1], 1))
    found = np.asarray(pair.forward(pair.params, batch))
    error = np.abs(found - logits)[real].max()
    record_property("parity", f"{family}|question_answering|export|{error:.1e}")
    assert error < TOLERANCE
    rows = Rows(Dataset.from_dict({"question": QUESTIONS, "context": CONTEXTS, "id": ["a", "b", "c"]}), "input")
    records = list(load_predictor(str(out))(rows))
    assert [r["answer"] for r in records] == best_answers(theirs, logits, section.max_answer_tokens)
    assert [r["id"] for r in records] == ["a", "b", "c"]
    foreign = load_predictor(str(pair.directory))
    assert foreign.task.kind == "question_answering" and len(list(foreign(rows))) == len(QUESTIONS)


def best_answers(windows, logits: np.ndarray, longest: int) -> list[str]:
    """The text of the span with the highest sum of logits in all windows of each row, by trying all."""
    best = [(-np.inf, "")] * len(QUESTIONS)
    for window, row in enumerate(windows["overflow_to_sample_mapping"].tolist()):
        context = [place for place, s in enumerate(windows.sequence_ids(window)) if s == 1]
        for i in context:
            for j in range(i, min(i + longest, context[-1] + 1)):
                begin, end = windows["offset_mapping"][window, i, 0], windows["offset_mapping"][window, j, 1]
                score = logits[window, i, 0] + logits[window, j, 1]
                best[row] = max(best[row], (score, CONTEXTS[row][begin:end].strip()))
    return [text for _, text in best]
