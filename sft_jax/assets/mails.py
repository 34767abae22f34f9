"""Questions about the headers of real e-mails. The mails are real; the questions are made from templates."""

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_jax.archives import members
from sft_jax.assets.plain import write_json

QUESTIONS = {
    "From": "Who sent the message?",
    "To": "To whom was the message sent?",
    "Subject": "What is the message about?",
    "Date": "When was the message sent?",
}
MOST_CHARS = 100  # of a header's value that may stand in a context
BODY_WORDS, MOST_OF_WORD = 40, 30  # words of the body in a context, and characters of a word
FEWEST_HEADERS = 3  # of a mail that is asked about
TEST_SHARE, NO_ANSWER_SHARE = 0.2, 0.1
MAIL = re.compile(r"package/data/([^/]+/[^/]+)\.json")
HEADER = re.compile(r"^([!-9;-~]+):[ \t]*(.*(?:\n[ \t].*)*)", re.MULTILINE)


def header_questions(archive: Path, out: Path) -> None:
    """Questions about mails as JSON lines in the form of SQuAD, one for each mail; a fifth of the mails for the test.

    A context is the headers that `QUESTIONS` names, in a random order, and the first words of the body without mark-up.
    The answer is the value of a header. The files `no-answer-…` hold questions about a tenth of the same mails, of each
    side, in which the header that is asked for was left out: their lists of answers are empty.
    """
    mails: dict[tuple[object, ...], tuple[str, dict[str, str], str]] = {}
    for name, content in sorted(members(archive)):
        if mail := MAIL.fullmatch(name):
            headers, body = _read_mail(json.loads(content)["text"])
            if len(headers) >= FEWEST_HEADERS:
                mails.setdefault((*headers.items(), body), (mail[1], headers, body))
    draw = random.Random(0)
    order = draw.sample(list(mails.values()), len(mails))
    count = round(TEST_SHARE * len(order))
    for split, part in (("train", order[count:]), ("test", order[:count])):
        write_json(out / f"{split}.jsonl", [_question(*mail, draw) for mail in part])
        silent = part[: round(NO_ANSWER_SHARE * len(part))]
        write_json(out / f"no-answer-{split}.jsonl", [_question(*mail, draw, answered=False) for mail in silent])


def _read_mail(text: str) -> tuple[dict[str, str], str]:
    """(value of each header that is asked about and is short, first words of the body)."""
    top, _, body = text.replace("\r\n", "\n").partition("\n\n")
    first: dict[str, str] = {}
    for name, value in HEADER.findall(top):
        first.setdefault(name, " ".join(value.split()))
    headers = {n: v for n, v in first.items() if n in QUESTIONS and _is_plain(v) and len(v) <= MOST_CHARS}
    words = (word for word in re.sub(r"<[^<>]*>", " ", body).split() if len(word) <= MOST_OF_WORD and _is_plain(word))
    return headers, " ".join(word for word, _ in zip(words, range(BODY_WORDS), strict=False))


def _is_plain(text: str) -> bool:
    return text != "" and text.isprintable() and "\ufffd" not in text


def _question(
    name: str, headers: Mapping[str, str], body: str, draw: random.Random, *, answered: bool = True
) -> dict[str, Any]:
    asked = draw.choice(list(headers))
    lines = [f"{header}: {value}" for header, value in headers.items() if answered or header != asked]
    draw.shuffle(lines)
    context = "\n".join([*lines, body])
    answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
    if answered:
        begin = 0
        for line in lines[: lines.index(f"{asked}: {headers[asked]}")]:
            begin += len(line) + 1
        answers = {"text": [headers[asked]], "answer_start": [begin + len(asked) + 2]}
    suffix = "" if answered else "-no-answer"
    return {"id": f"{name}{suffix}", "question": QUESTIONS[asked], "context": context, "answers": answers}
