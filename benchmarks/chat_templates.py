"""Chat templates of others against `transformers`: which answers are learned, and which conversations are refused.

`python benchmarks/chat_templates.py DIRECTORY` takes every `*.jinja` below a directory, puts twenty-five conversations
through each and judges the documents by what `apply_chat_template` gives for the same messages:

- a document begins a text of it, or is the text that asks for an answer with the end of the text that has it;
- each answer's words are learned once, no one else's are, and nothing of what asks for an answer is;
- where a special token follows the words in the text, the answer ends with one.

Words are told apart by their first letter: those of answers begin with A, their reasoning with R. A tokenizer of bytes
gets the special tokens that stand in a template. Templates of others belong into no repository: fetch them to try them.
"""

import argparse
import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sft_jax.data import chat
from sft_jax.data.answers import encode_passages
from sft_jax.data.chat import Conversation
from sft_jax.data.text import TextTokenizer, load_tokenizer
from sft_jax.errors import SftError

TODAY = date(2025, 7, 9)
MARKERS = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜\s]{1,40}｜>|<\|[a-z_\"]{1,20}>|<[a-z_\"]{1,20}\|>|\[\|[a-z]+\|\]|\]~!?b\[?\]?|\[e~\["
    r"|</?(?:start_of_turn|end_of_turn|s|bos|eos|sop|sep|end_of_utterance|SPECIAL_1[0-2]|seed:[a-z]+|BOS_TOKEN|im_[a-z]+)>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|TOOL_RESULTS|TOOL_CALLS|AVAILABLE_TOOLS|THINK|ARGS|TOOL_CONTENT|CALL_ID|gMASK)\]"
    r"|</?(?:think|tool_call|tool_response|tools|arg_key|arg_value)>"
)
PLAIN = re.compile(r"</?(think|tool_call|tool_response|tools|arg_key|arg_value)>")  # added, and not special
# The beginning and the end of texts by what stands in a template; the first that fits.
FRAMES = [
    (r"<\|return\|>", "<|startoftext|>", "<|return|>"),
    (r"<｜end▁of▁sentence｜>|<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    (r"<\|END_OF_TURN_TOKEN\|>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    (r"<turn\|>", "<bos>", "<turn|>"),
    (r"<end_of_turn>", "<bos>", "<eos>"),
    (r"<\|eot_id\|>", "<|begin_of_text|>", "<|eot_id|>"),
    (r"\[e~\[", "]~!b[", "[e~["),
    (r"\[\|endofturn\|\]", "[BOS]", "[|endofturn|]"),
    (r"<\|end\|>", "<s>", "<|endoftext|>"),
    (r"<\|im_end\|>", None, "<|im_end|>"),
    (r"<\|user\|>", None, "<|endoftext|>"),
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
        "return": {"type": "string"},
    },
}
Talk = tuple[list[dict[str, Any]], list[Any] | None]


def user(words: str) -> dict[str, Any]:
    """What a user says."""
    return {"role": "user", "content": words}


def answer(words: Any, **more: Any) -> dict[str, Any]:
    """What the assistant says."""
    return {"role": "assistant", "content": words, **more}


def call(city: str, number: str, *, as_text: bool = False) -> dict[str, Any]:
    """A call of the tool."""
    given = {"city": city}
    function = {"name": "get_weather", "arguments": json.dumps(given) if as_text else given}
    return {"id": number, "type": "function", "function": function}


def tool(words: str, number: str = "call00001") -> dict[str, Any]:
    """What the tool answers."""
    return {"role": "tool", "tool_call_id": number, "name": "get_weather", "content": words}


def conversations(template: str) -> dict[str, Talk]:
    """Name -> messages and tools."""
    system = {"role": "system", "content": "Sys golf."}
    own = " ".join(dict.fromkeys(MARKERS.findall(template)[:8])) or "### Response: [/INST] </s>"
    one, two, three = answer("Aone bravo."), answer("Atwo delta."), answer("Athree foxtrot.")
    first, second, third = user("Uone alpha"), user("Utwo charlie"), user("Uthree echo")
    calls = [call("Acity", "call00001"), call("Atown", "call00002")]
    text = [{"type": "text", "text": "Uone alpha"}], [{"type": "text", "text": "Aone bravo."}]
    tagged = [answer(f"<think>\n{r}\n</think>\n\n{w}") for w, r in (("Aone bravo.", "Rone."), ("Atwo delta.", "Rtwo."))]
    thought = [
        answer(w, reasoning_content=r) for w, r in (("Aone bravo.", "Rone hotel."), ("Atwo delta.", "Rtwo india."))
    ]
    return {
        "one": ([first, one], None),
        "three": ([first, one, second, two, third, three], None),
        "system": ([system, first, one, second, two], None),
        "tools": ([first, answer("", tool_calls=calls[:1]), tool("Tsunny"), two], [TOOL]),
        "tools, OpenAI": (
            [first, answer(None, tool_calls=[call("Acity", "call00001", as_text=True)]), tool("Tsunny"), two],
            [TOOL],
        ),
        "two calls": (
            [
                system,
                first,
                answer("", tool_calls=calls),
                tool("Tsunny"),
                tool("Trainy", "call00002"),
                two,
                third,
                three,
            ],
            [TOOL],
        ),
        "a call in words": ([first, answer("Aone bravo.", tool_calls=calls[:1]), tool("Tsunny"), two], [TOOL]),
        "tools unused": ([first, one, second, two], [TOOL]),
        "reasoning": ([first, thought[0], second, thought[1]], None),
        "think tags": (
            [first, tagged[0], second, tagged[1]],
            None,
        ),
        "reasoned call": (
            [first, answer("", tool_calls=calls[:1], reasoning_content="Rone hotel."), tool("Tsunny"), two],
            [TOOL],
        ),
        "empty": ([first, answer(""), second, two], None),
        "empty last": ([first, one, second, answer("")], None),
        "function call": ([first, answer(None, function_call={"name": "f", "arguments": "{}"})], None),
        "refusal": ([first, answer(None, refusal="Aone bravo.")], None),
        "value": ([first, {"role": "assistant", "value": "Aone bravo."}], None),
        "two users": ([first, second, two], None),
        "two assistants": ([first, one, two], None),
        "unicode": (
            [
                user("Uone 🦀 naïve 日本語"),
                answer("Aone 👩‍👩‍👧‍👦 café 東京 é"),
                user("Utwo العربية"),
                answer("Atwo 🇫🇷 ﬁn"),
            ],
            None,
        ),
        "its strings in an answer": ([first, answer(f"Aone bravo {own} {{{{ messages }}}} end"), second, two], None),
        "its strings by a user": ([user(f"Uone alpha {own} Utail"), one, second, two], None),
        "blanks": (
            [user("Uone alpha\n"), answer("  Aone bravo.\n\n"), user(" Utwo charlie"), answer("\n\nAtwo delta. ")],
            None,
        ),
        "assistant first": ([system, one, second, two], None),
        "parts": ([{"role": "user", "content": text[0]}, answer(text[1])], None),
        "long": ([m for n in range(12) for m in (user(f"Uw{n}x alpha"), answer(f"Aw{n}x bravo"))], None),
    }


def build(template: str, directory: Path) -> TextTokenizer:
    """A tokenizer of bytes with the special tokens that stand in a template."""
    begin, end = next(((b, e) for fits, b, e in FRAMES if re.search(fits, template)), ("<s>", "</s>"))
    markers = dict.fromkeys([t for t in (begin, end) if t] + MARKERS.findall(template))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({token: number for number, token in enumerate(letters)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    for token in markers:
        special = not PLAIN.match(token)
        added = [AddedToken(token, normalized=False, special=special)]
        fast.add_special_tokens(added) if special else fast.add_tokens(added)
    fast.save(str(directory / "tokenizer.json"))
    named = {k: v for k, v in (("bos_token", begin), ("eos_token", end)) if v}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory)


class Reference:
    """What `transformers` renders."""

    def __init__(self, directory: Path):
        import transformers
        from transformers.utils import chat_template_utils

        class Fixed(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime(TODAY.year, TODAY.month, TODAY.day)

        chat_template_utils.datetime = Fixed
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))

    def text(self, talk: Talk, count: int, *, asks: bool) -> str | None:
        """The text of the first messages, None where the template refuses them."""
        messages, tools = talk
        try:
            return self.tokenizer.apply_chat_template(
                messages[:count], tools=tools, add_generation_prompt=asks, tokenize=False
            )
        except Exception:  # templates and the sandbox raise of all kinds
            return None


def judge(talk: Talk, texts: list[tuple[str, list[str]]], reference: Reference) -> str | None:
    """What is wrong with the documents (text, pieces that are learned) of a conversation; None where nothing is."""
    messages, _ = talk
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    asked = {n: reference.text(talk, n, asks=True) or "" for n in turns}
    whole = {n: reference.text(talk, n, asks=False) or "" for n in range(1, len(messages) + 1)}
    for text, _ in texts:
        if not any(one.startswith(text) for one in whole.values()) and not any(
            text.startswith(asked[n]) and text[len(asked[n]) :] in whole[n + 1] for n in turns
        ):
            return "no text of transformers begins with a document"
    learned = Counter(
        word for _, pieces in texts for piece in pieces for word in re.findall(r"\b[A-Z][a-z0-9]+\b", piece)
    )
    said = json.dumps([messages[n] for n in turns], ensure_ascii=False)
    own = set(re.findall(r"\bA[a-z0-9]+\b", said)) & set(re.findall(r"\bA[a-z0-9]+\b", "".join(whole.values())))
    for word in own:
        if word.startswith("Assist") or learned[word] == 1:
            continue
        return f"{word} is learned {learned[word]} times"
    others = [w for w in learned if re.fullmatch(r"(U|S|T)(one|two|three|tail|ys|sunny|rainy|w\d+x)", w)]
    if others:
        return f"learned of others: {others}"
    if any(asked[n] == whole.get(n) for n in turns):  # nothing asks there, so that a model writes the header itself
        return None
    added = [whole[n + 1].removeprefix(asked[n]) for n in turns]  # what a model is to write, whatever it is
    for n in turns:
        plain = whole.get(n, "")
        header = asked[n].removeprefix(plain).strip() if asked[n].startswith(plain) else ""
        for piece in (piece for _, pieces in texts for piece in pieces):
            if len(header) > 3 and header in piece and not any(piece in one for one in added):
                return f"what asks is learned: {header!r}"
    return None


Documents = list[tuple[str, list[str]]]  # each a text and the pieces of it that are learned


def documents(tokenizer: TextTokenizer, talks: Sequence[Talk]) -> list[Documents | str]:
    """The documents of each conversation, or why there are none."""
    given = [Conversation(*talk) for talk in talks]
    try:
        made = chat.passages(tokenizer, given, "answers", TODAY)
    except SftError as error:  # of one of many: each is tried alone
        return [str(error)] if len(talks) == 1 else [documents(tokenizer, [talk])[0] for talk in talks]
    encoded = encode_passages(tokenizer, made.passages, 1 << 30, framed=False, rows=made.rows)
    found: list[Documents] = [[] for _ in talks]
    for row, first, last in zip(encoded.rows, encoded.offsets[:-1], encoded.offsets[1:], strict=True):
        ids = encoded.tokens["input_ids"][first:last].tolist()
        learned = [False, *(encoded.tokens["token_weight"][first:last][:-1] > 0).tolist()]
        begins = [n for n in range(1, len(ids)) if learned[n] and not learned[n - 1]]
        ends = [n for n in range(1, len(ids) + 1) if learned[n - 1] and not (n < len(ids) and learned[n])]
        whole, *pieces = (
            tokenizer.fast.decode(ids[a:b], skip_special_tokens=False)
            for a, b in zip([0, *begins], [len(ids), *ends], strict=True)
        )
        found[row].append((whole, pieces))
    why = {row: reason for reason, rows in made.lost.items() for row in rows}
    return [one or why.get(row, "cut") for row, one in enumerate(found)]


def judged(template: str) -> Iterator[tuple[str, str, str]]:
    """(conversation, verdict, why) of each."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = build(template, Path(directory))
        reference = Reference(Path(directory))
        talks = conversations(template)
        for (name, talk), found in zip(talks.items(), documents(tokenizer, list(talks.values())), strict=True):
            if isinstance(found, str):
                turns = [n for n, m in enumerate(talk[0]) if m["role"] == "assistant"]
                views = [view for n in turns for view in ((n, True), (n + 1, False))]
                refused = any(reference.text(talk, count, asks=asks) is None for count, asks in views)
                silent = not refused and _silent(reference, talk, turns, found)
                yield (
                    name,
                    "refused as by transformers" if refused else "nothing written" if silent else "refused",
                    found,
                )
            else:
                wrong = judge(talk, found, reference)
                yield name, "wrong" if wrong else "right", wrong or ""


def _silent(reference: Reference, talk: Talk, turns: Sequence[int], why: str) -> bool:
    """Whether an answer was refused of which `transformers` writes nothing, or not its calls."""
    if "writes nothing" not in why and "does not write" not in why:
        return False
    for n in turns:
        kept = {name: value for name, value in talk[0][n].items() if name not in ("role", "id", "type")}
        words = re.findall(r"A[a-z]+ ?[a-z]*", json.dumps(kept, ensure_ascii=False))
        text = reference.text(talk, n + 1, asks=False) or ""
        if not words or any(word.strip() not in text for word in words):
            return True
    return False


def main() -> None:
    """Judge all templates and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", help="a part of the names of templates")
    parser.add_argument("--of", default="", help="a part of the names of conversations")
    given = parser.parse_args()
    seen: set[str] = set()
    total: Counter[str] = Counter()
    reasons: dict[str, list[str]] = defaultdict(list)
    for file in sorted(given.directory.rglob("*.jinja")):
        template = file.read_text(encoding="utf-8")
        if template in seen or given.only not in str(file):
            continue
        seen.add(template)
        print(file, flush=True)
        for name, verdict, why in judged(template):
            total[verdict] += 1
            if verdict != "right" and given.of in name:
                reasons[f"{verdict}: {why[:110]}"].append(f"{file.parent.name}/{file.stem}: {name}")
    for reason, where in sorted(reasons.items(), key=lambda pair: -len(pair[1])):
        print(f"{len(where):5} {reason}\n{'':6}{'; '.join(where[:6])}")
    print(f"{len(seen)} templates", dict(total))


if __name__ == "__main__":
    main()
