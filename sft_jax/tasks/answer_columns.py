"""From columns of rows to right answers in contexts: texts with their places, several in a row, in some rows none."""

from collections.abc import Mapping
from typing import Any

from sft_jax.data.rows import Bad, Rows
from sft_jax.data.structured import is_structured, read_structured
from sft_jax.tasks.task import Targets

Answers = tuple[tuple[int, str], ...]  # of each right answer the character of the context that it begins at, and itself
FORM = "{'text': [...], 'answer_start': [...]}"


def read_answers(rows: Rows, column: str, context: str, *, none: bool) -> Targets:
    """The answers of a column in the form of SQuAD, each where it says that it is; with `none` there may be none."""
    found, bad = list[Answers | None](), dict[int, Bad]()
    for row, (value, text) in enumerate(zip(rows.column(column), rows.texts(context), strict=True)):
        answers, wanted = None, f", expected {FORM}"
        try:
            answers = _pairs(read_structured(value) if isinstance(value, str) and is_structured(value) else value)
        except ValueError as error:
            wanted = f": {error}; write it as JSON"
        if answers is None:
            wrong = "no answers", f"{column} is {value!r:.60}{wanted}"
        else:
            wrong = _lacking(answers, column, none)
            if isinstance(text, str):  # else that is what is said of the row
                wrong = wrong or next(filter(None, (_misplaced(one, text, context) for one in answers)), None)
        if wrong:
            bad[row] = Bad(rows.place(row), *wrong)
        found.append(None if wrong else answers)
    return Targets(found, bad)


def read_texts(rows: Rows, column: str, context: str, *, none: bool) -> Targets:
    """The answers of a column of texts, each of which stands in its context once; with `none` it may be empty."""
    found, bad = list[Answers | None](), dict[int, Bad]()
    for row, (value, text) in enumerate(zip(rows.texts(column), rows.texts(context), strict=True)):
        wrong, answers = None, ()
        if value is not None and not isinstance(value, str):
            wrong = "no answers", f"{column} is {value!r:.60}, expected a text"
        elif isinstance(text, str):
            answer = (value or "").strip()
            places = _places(answer, text)
            answers = ((places[0], answer),) if places else ()
            if answer and len(places) != 1:
                often = "more than once" if places else "nowhere"
                wrong = "answer not found", f"{column} {answer!r:.60} stands {often} in {context}, expected once"
            wrong = wrong or _lacking(answers, column, none)
        if wrong:
            bad[row] = Bad(rows.place(row), *wrong)
        found.append(None if wrong else answers)
    return Targets(found, bad)


def _pairs(value: Any) -> Answers | None:
    """(begin, text) of each answer; None where they have another form."""
    if isinstance(value, Mapping):
        texts, begins = value.get("text"), value.get("answer_start")
        texts, begins = ([texts], [begins]) if isinstance(texts, str) else (texts, begins)
    elif value is None or (isinstance(value, list) and all(isinstance(part, Mapping) for part in value)):
        texts, begins = ([part.get(key) for part in value or []] for key in ("text", "answer_start"))
    else:
        return None
    if not isinstance(texts, list) or not isinstance(begins, list) or len(texts) != len(begins):
        return None
    given = zip(begins, texts, strict=True)
    pairs = [(begin, text) for begin, text in given if isinstance(begin, int) and isinstance(text, str)]
    return tuple(pairs) if len(pairs) == len(texts) else None


def _lacking(answers: Answers, column: str, none: bool) -> tuple[str, str] | None:
    if answers or none:
        return None
    return "no answer", f"{column} holds no answer; with task.no_answer=true rows may be without one"


def _misplaced(answer: tuple[int, str], text: str, context: str) -> tuple[str, str] | None:
    """What is wrong with the place of an answer, and where it stands if there is one such place."""
    begin, said = answer
    if not said.strip():
        return "blank answer", f"an answer is {said!r:.60}, expected a text; a row without an answer has an empty list"
    if begin >= 0 and text.startswith(said, begin):
        return None
    there = text[begin : begin + len(said)] if begin >= 0 else ""
    places = _places(said, text)
    hint = f"; it stands at {places[0]}" if len(places) == 1 else ""
    return "answer not at its place", f"{context}[{begin}:] is {there!r:.60}, expected {said!r:.60}{hint}"


def _places(part: str, text: str) -> list[int]:
    """Where a part begins in a text, at most two places."""
    first = text.find(part) if part else -1
    second = text.find(part, first + 1) if first >= 0 else -1
    return [place for place in (first, second) if place >= 0]
