"""What of a rendered conversation is an answer, told by rendering it again with other words.

The text that asks for an answer must begin the text with it; what is added is the answer. Where the answer's own
words stand in it is seen by rendering the same turn with other words: what both share is the template's. So an answer
of which the template writes nothing is found out, whatever stands in its place, and where a turn ends is read off each.

Where a template asks for an answer otherwise than it writes it, the document is made of both: the text that asks, as
generation will meet it, and the answer as it is written behind what asks for it there.

A conversation is told in steps: each yields the views of it that are needed next and gets their texts, so that those of
thousands of conversations are rendered together. Knows no tokenizer but the names of its special tokens.
"""

import re
import sys
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from sft_jax.data.answers import WEIGHTLESS, Passage
from sft_jax.data.templates import REASONING, Refused, View, shared

Learned = Literal["answers", "last", "all"]
Masked = Literal["reasoning", "scaffold"]
Message = Mapping[str, Any]
Steps = Generator[Sequence[View], Sequence[str | Refused], Any]  # what is needed next, its texts, what comes of it

ASSISTANT = "assistant"
REFUSED = "refused by the template"
BEYOND = "the template takes too much of it"
OTHERWISE = "the template asks for its answer otherwise than it writes it"
NOTHING = "the template writes nothing of its answer"
TOOLLESS = "conversations of which the template does not write the tools"
SEVERAL = "its answers weigh differently, and the template writes earlier ones anew"
UNFOUND = "a part with a weight is not in the text that the template writes"
ASKED = "answers are trained after the text that asks for them, which the template writes otherwise later"
CALLS = ("tool_calls", "function_call")
THOUGHT = re.compile(r"(<think>|\[THINK\])(.*?)(</think>|\[/THINK\])", re.DOTALL)  # reasoning within the words
KEPT = ("role", "type", "id", "index", "tool_call_id")  # what templates look at, and which are no words
MARK = ord("‡")  # other words: the first character from here on that a message does not hold
EAGER = 8  # conversations whose template is tried out without first looking what others showed
MOST_CELLS = 1_000_000  # of a comparison of what asks for an answer and what stands before it


class _Lost(Exception):
    """Why a conversation becomes no document."""


@dataclass
class Known:
    """What a template has shown in the conversations of a call, and how they are learned."""

    learned: Learned
    masked: frozenset[str]
    special: tuple[str, ...]
    end: str | None  # the token that ends texts
    settings: Counter[str] = field(default_factory=Counter)  # what the template is given -> by how many
    seen: int = 0  # conversations that were begun
    scaffolds: set[tuple[str, str]] = field(default_factory=set)  # what stands before and behind the words of an answer
    tails: dict[str, str] = field(default_factory=dict)  # what ends a text -> what of it is of the conversation's end
    traced: set[str] = field(default_factory=set)  # what changed a text
    counts: Counter[str] = field(default_factory=Counter)

    @cached_property
    def tokens(self) -> re.Pattern[str]:
        """Finds special tokens."""
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def pieces(self) -> re.Pattern[str]:
        """Finds special tokens, tags, words, blanks and other characters."""
        return re.compile(rf"{self.tokens.pattern}|</?[^<>\s]+>|\w+|\s+|.", re.DOTALL)

    def noted(self) -> dict[str, int]:
        """What is to be said of the conversations that became documents."""
        idle = {
            f"conversations of which {name} of chat_template_kwargs changes no text": count
            for name, count in self.settings.items()
            if name not in self.traced
        }
        return {**dict(self.counts), **idle}


@dataclass
class _Answer:
    """An answer in a text; places are those of characters."""

    turn: int
    message: Message
    asked: str  # the text that asks for it
    written: str  # the text with it as the template writes it
    text: str = ""  # of its document
    begin: int = 0  # of its own words in that
    end: int = 0  # of them
    stop: int = 0  # of the answer, its end of turn included
    skipped: list[tuple[int, int]] = field(default_factory=list)  # what of it is not learned

    @property
    def shift(self) -> int:
        """How much further on things are in the document than in the text as the template writes it."""
        return len(self.text) - len(self.written)


def documents(
    known: Known,
    messages: Sequence[Message],
    weights: Sequence[Any] | None,
    template: str,
    tools: Any,
    settings: Mapping[str, Any],
) -> Steps:
    """The documents of a conversation, or why there are none: those answers together that one text has as they are
    asked for."""
    known.seen += 1
    try:
        turns = [n for n, message in enumerate(messages) if message["role"] == ASSISTANT]
        weighed = {turn: 1.0 if weights is None else weights[turn] for turn in turns}
        # Of a text that is learned whole, answers are told apart where they are not like the rest of it.
        whole = known.learned == "all" and not known.masked and all(weight == 1 for weight in weighed.values())
        turns = turns[-1:] if whole or known.learned == "last" else turns
        heavy = [turn for turn in turns if _heaviest(weighed[turn]) > 0]
        turns = turns if known.learned == "all" else heavy
        if not turns:
            raise _Lost(WEIGHTLESS)
        answers = yield from _written(known, messages, turns, heavy, asks=not whole)
        if tools:
            yield from _check_tools(known, answers)
        yield from _trace(known, template, settings, answers)
        yield from _check_fields(known, answers)
        if not whole:
            yield from _seamed(known, messages, answers)
        yield from _ended(known, answers)
        if whole:
            return [Passage(answer.text[: answer.stop], ((0, answer.stop),)) for answer in answers]
        yield from _masked(known, answers)
        made = _together([(answer, weighed[answer.turn]) for answer in answers])
        return made if known.learned != "all" else _filled(made)
    except _Lost as lost:
        return str(lost)


def _written(
    known: Known, messages: Sequence[Message], turns: Sequence[int], heavy: Sequence[int], *, asks: bool
) -> Steps:
    """The answers of these turns, as the template writes them, and where their words are: `heavy` ones must have some.

    `asks` says whether what asks for them is needed.
    """
    eager = known.seen <= EAGER
    eagerly = [turn for turn in turns if eager or not _plain(messages[turn])]
    views = [View(turn, asks=True) for turn in turns if asks] + [View(turn + 1) for turn in turns]
    texts = yield [*views, *(_other(messages, turn) for turn in eagerly)]
    asked = map(_sure, texts[: len(turns)]) if asks else [""] * len(turns)
    written = map(_sure, texts[len(views) - len(turns) : len(views)])
    answers = [_Answer(n, messages[n], a, w, w) for n, a, w in zip(turns, asked, written, strict=True)]
    others = dict(zip(eagerly, texts[len(views) :], strict=True))
    open_ones = [a for a in answers if a.turn not in others and not _as_others(known, a)]
    if open_ones:
        found = yield [_other(messages, answer.turn) for answer in open_ones]
        others |= dict(zip((answer.turn for answer in open_ones), found, strict=True))
    for answer in answers:
        if answer.turn in others:
            _place(known, answer, others[answer.turn])
        if answer.turn in heavy and not answer.written[answer.begin : answer.end].strip():
            raise _Lost(NOTHING)
    return answers


def _place(known: Known, answer: _Answer, other: str | Refused) -> None:
    """Find the words of an answer by a text that has others in their place."""
    written = answer.written
    if isinstance(other, Refused):  # then all that is added, but for the tokens that end it
        answer.begin = shared(written, answer.asked)
        answer.end = len(written.rstrip())
        while token := next((t for t in known.special if written[: answer.end].endswith(t)), None):
            answer.end = len(written[: answer.end - len(token)].rstrip())
        return
    answer.begin = shared(written, other)
    behind = shared(written[: answer.begin - 1 : -1] if answer.begin else written[::-1], other[::-1])
    answer.end = len(written) - min(behind, len(other) - answer.begin)
    if _plain(answer.message) and written.startswith(answer.asked) and answer.begin >= len(answer.asked):
        known.scaffolds.add((written[len(answer.asked) : answer.begin], written[answer.end :]))


def _as_others(known: Known, answer: _Answer) -> bool:
    """Whether an answer of words alone is written as others were: then its words are found without another text."""
    if not answer.written.startswith(answer.asked) or not answer.asked:
        return False
    added, words = answer.written[len(answer.asked) :], answer.message["content"].strip()
    for before, behind in known.scaffolds:
        own = added[len(before) : len(added) - len(behind)]
        if added.startswith(before) and added.endswith(behind) and own.strip() == words:
            answer.begin, answer.end = len(answer.asked) + len(before), len(answer.written) - len(behind)
            return True
    return False


def _check_tools(known: Known, answers: Sequence[_Answer]) -> Steps:
    """Count a conversation whose tools leave no trace."""
    for answer in dict.fromkeys((0, len(answers) - 1)):
        one = answers[answer]
        views = [View(one.turn, asks=True, without="tools"), View(one.turn + 1, without="tools")]
        asked, written = yield views
        if (one.asked and asked != one.asked) or written != one.written:
            return
    known.counts[TOOLLESS] += 1


def _trace(known: Known, template: str, settings: Mapping[str, Any], answers: Sequence[_Answer]) -> Steps:
    """See which of the settings change a text; a template cannot read one that it does not name."""
    for name in settings:
        if name in known.traced or not re.search(rf"\b{re.escape(name)}\b", template):
            continue
        one = answers[-1]
        asked, written = yield [View(one.turn, asks=True, without=name), View(one.turn + 1, without=name)]
        if (one.asked and asked != one.asked) or written != one.written:
            known.traced.add(name)


def _check_fields(known: Known, answers: Sequence[_Answer]) -> Steps:
    """Of answers in several fields, count those of which one is not written, and lose those whose calls are not."""
    changed = [(answer, name, message) for answer in answers for name, message in _by_field(answer.message)]
    if not changed:
        return
    texts = yield [View(answer.turn + 1, changed={answer.turn: message}) for answer, _, message in changed]
    for (answer, name, _), text in zip(changed, texts, strict=True):
        if text == answer.written and name in CALLS:
            raise _Lost(f"the template does not write {name} of its answer")
        if text == answer.written:
            known.counts[f"answers whose {name} the template does not write"] += 1
        elif name == "reasoning" and "reasoning" in known.masked and isinstance(text, str):
            begin = shared(answer.written, text)
            behind = shared(answer.written[::-1], text[::-1])
            end = len(answer.written) - min(behind, len(answer.written) - begin, len(text) - begin)
            answer.skipped.append((begin, end))


def _seamed(known: Known, messages: Sequence[Message], answers: Sequence[_Answer]) -> Steps:
    """Give answers that are asked for otherwise than they are written a text of both."""
    apart = [answer for answer in answers if not answer.written.startswith(answer.asked)]
    if not apart:
        return
    views: list[View] = []
    for answer in apart:
        before = {} if answer.turn == 0 else _other(messages, answer.turn - 1).changed
        views += [View(answer.turn, asks=True, changed=before), View(answer.turn + 1, changed=before)]
    texts = yield views
    for number, answer in enumerate(apart):
        asked, written = texts[2 * number : 2 * number + 2]
        if isinstance(asked, Refused) or isinstance(written, Refused):
            raise _Lost(OTHERWISE)
        seam = _seam(known, answer, asked, written)
        answer.text = answer.asked + answer.written[seam:]
        answer.begin = max(answer.begin + answer.shift, len(answer.asked))
        answer.end += answer.shift
        answer.skipped = [(begin + answer.shift, end + answer.shift) for begin, end in answer.skipped]
        known.counts[ASKED] += 1


def _seam(known: Known, answer: _Answer, asked: str, written: str) -> int:
    """Where in the text with an answer it goes on behind what asks for it.

    `asked` and `written` are both texts with other words in the message before, so what they share with ours at the end
    begins behind it: what asks, and what stands before the answer in its place. Both are laid beside each other.
    """
    last = len(answer.asked) - _common_end(answer.asked, asked) if answer.turn else 0
    begin = len(answer.written) - _common_end(answer.written, written) if answer.turn else 0
    if (answer.turn and not last) or begin > answer.begin or (answer.turn and not begin):
        raise _Lost(OTHERWISE)
    asks, stands = answer.asked[last:], answer.written[begin : answer.begin]
    places = _beside(known, asks, stands)
    if places is None:
        raise _Lost(OTHERWISE)
    rest, seam = asks[places[0] :], begin + places[1]
    if rest.strip() and answer.written[seam:].lstrip().startswith(rest.strip()):  # the answer has it in its own words
        seam += answer.written[seam:].index(rest.strip()) + len(rest.strip())
        blanks = rest[len(rest.rstrip()) :]
        seam += shared(answer.written[seam:], blanks)
    if any(token in answer.written[seam : answer.begin] for token in _opening(known, answer.asked)):
        raise _Lost(OTHERWISE)
    return seam


def _beside(known: Known, asks: str, stands: str) -> tuple[int, int] | None:
    """The places in two texts behind the last piece that both have in the same order, and the blanks behind it."""
    ours, theirs = (
        [(m[0], m.end()) for m in known.pieces.finditer(text) if not m[0].isspace()] for text in (asks, stands)
    )
    if len(ours) * len(theirs) > MOST_CELLS:
        return None
    longest = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i in range(len(ours) - 1, -1, -1):
        for j in range(len(theirs) - 1, -1, -1):
            same = ours[i][0] == theirs[j][0]
            longest[i][j] = 1 + longest[i + 1][j + 1] if same else max(longest[i + 1][j], longest[i][j + 1])
    i = j = 0
    place = (0, 0)
    while longest[i][j]:
        if ours[i][0] == theirs[j][0]:
            place = ours[i][1], theirs[j][1]
            i, j = i + 1, j + 1
        elif longest[i + 1][j] == longest[i][j]:
            i += 1
        else:
            j += 1
    if theirs and place == (0, 0):
        return None  # nothing of what stands there asks: it may be anyone's
    blanks = asks[place[0] : len(asks) - len(asks[place[0] :].lstrip())]
    same = shared(blanks, stands[place[1] :])
    return place[0] + same, place[1] + same


def _ended(known: Known, answers: Sequence[_Answer]) -> Steps:
    """Find where each answer ends: with the special tokens behind its words, without what begins another turn and what
    the template writes at the end of a conversation alone."""
    rests = {answer.turn: _before_openings(known, answer) for answer in answers}
    unknown = [a for a in answers if len(known.tokens.findall(rests[a.turn])) > 1 and rests[a.turn] not in known.tails]
    if unknown:
        views = [view for answer in unknown for view in (View(answer.turn, asks=True), View(answer.turn))]
        texts = yield views
        for number, answer in enumerate(unknown):
            known.tails[rests[answer.turn]] = _tail(known, *texts[2 * number : 2 * number + 2])
    for answer in answers:
        rest = rests[answer.turn]
        tail = known.tails.get(rest, "")
        if tail and rest.endswith(tail) and known.tokens.search(rest.removesuffix(tail)):
            rest = rest.removesuffix(tail)
        ends = [found.end() for found in known.tokens.finditer(rest)]
        last = rest[ends[-1] :] if ends else rest
        if last.strip() and answer.text[: answer.begin].rstrip().endswith(last.strip()):  # the header of a next turn
            rest = rest.removesuffix(last)
        if ends and not rest[ends[-1] :].strip():  # blanks behind the end of a turn are those of the next one
            rest = rest[: ends[-1]]
        answer.stop = answer.end + len(rest)


def _before_openings(known: Known, answer: _Answer) -> str:
    """What is written behind the words of an answer, up to a token that begins a turn."""
    rest = answer.text[answer.end :]
    opening = _opening(known, answer.text)
    return next((rest[: found.start()] for found in known.tokens.finditer(rest) if found[0] in opening), rest)


def _opening(known: Known, text: str) -> set[str]:
    """The special tokens that a text begins with, which end no turn; but one that ends texts may begin them too."""
    found: set[str] = set()
    place = 0
    while token := known.tokens.match(text, place):
        found.add(token[0])
        place = token.end() + len(text[token.end() :]) - len(text[token.end() :].lstrip())
    return found - {known.end}


def _tail(known: Known, asked: str | Refused, plain: str | Refused) -> str:
    """What a template writes at the end of a conversation alone, seen where it asks for no answer: special tokens."""
    if isinstance(asked, Refused) or isinstance(plain, Refused):
        return ""
    same = shared(asked, plain)
    for text in (asked, plain):  # no token is cut
        over = (t.start() for t in known.tokens.finditer(text, max(same - 100, 0)) if t.start() < same < t.end())
        same = min(same, next(over, same))
    tail = plain[same:]
    return "" if known.tokens.sub("", tail).strip() else tail


def _masked(known: Known, answers: Sequence[_Answer]) -> Steps:
    """Find what of the answers is not to be learned: what the template writes before an answer of words alone."""
    if "scaffold" not in known.masked:
        return
    texts = yield [
        View(a.turn + 1, changed={a.turn: {"role": ASSISTANT, "content": _mark(a.message)}}) for a in answers
    ]
    for answer, text in zip(answers, texts, strict=True):
        if isinstance(text, str):
            answer.skipped.append((len(answer.asked), shared(answer.written, text) + answer.shift))


def _together(answers: Sequence[tuple[_Answer, Any]]) -> list[Passage]:
    """The documents of answers with their weights, those in one that one text has as they are asked for."""
    made: list[Passage] = []
    for answer, weight in answers:
        text = answer.text[: answer.stop]
        spans = [span for span in _spans(answer, weight) if span[0] < span[1]]
        places, weights = tuple((begin, end) for begin, end, _ in spans), tuple(weight for _, _, weight in spans)
        before = made.pop() if made and text.startswith(made[-1].text) else Passage(text, (), (), ())
        seams = (*(before.seams or ()), len(answer.asked))
        made.append(Passage(text, (*before.answers, *places), (*before.weights, *weights), seams))
    return made


def _filled(made: Sequence[Passage]) -> list[Passage]:
    """The one document of a conversation of which all is learned that is no answer, and answers by their weights."""
    if len(made) > 1:
        raise _Lost(SEVERAL)
    (text, answers, weights, _) = made[0]
    places = [0, *(place for span in answers for place in span), len(text)]
    between = [(begin, end) for begin, end in zip(places[::2], places[1::2], strict=True) if begin < end]
    return [Passage(text, (*answers, *between), (*weights, *[1.0] * len(between)), ())]


def _spans(answer: _Answer, weight: Any) -> list[tuple[int, int, float]]:
    """The parts of an answer with their weights; what stands between parts belongs to the one before it."""
    first = len(answer.asked)
    begins, weighs = [first], [0.0]
    if isinstance(weight, list):
        place = answer.begin
        for number, (words, weighed) in enumerate(weight):
            place = answer.text.find(words.strip(), place, answer.end)
            if place < 0:
                raise _Lost(UNFOUND)
            begins, weighs = (begins, [weighed]) if number == 0 else ([*begins, place], [*weighs, weighed])
            place += len(words.strip())
    else:
        weighs = [float(weight)]
    found: list[tuple[int, int, float]] = []
    for begin, end, weighed in zip(begins, [*begins[1:], answer.stop], weighs, strict=True):
        for skip, until in sorted(answer.skipped):
            if begin < until and skip < end:
                first, last = max(skip, begin), min(until, end)
                found += [(begin, first, weighed), (first, last, 0.0)]
                begin = last
        found.append((begin, end, weighed))
    return found


def _heaviest(weight: Any) -> float:
    return max((w for _, w in weight), default=0.0) if isinstance(weight, list) else float(weight)


def _sure(text: str | Refused) -> str:
    if isinstance(text, Refused):
        raise _Lost(f"{BEYOND if text.limit else REFUSED}: {text.why}")
    return text


def _plain(message: Message) -> bool:
    """Whether an answer is words alone."""
    words = message.get("content")
    return isinstance(words, str) and bool(words.strip()) and len(_fields(message)) == 1


def _fields(message: Message) -> dict[str, tuple[str, ...]]:
    """The fields of an answer that have something -> the keys of each; reasoning may stand within the words."""
    found: dict[str, tuple[str, ...]] = {n: (n,) for n in ("content", *CALLS, "refusal") if message.get(n)}
    reasons = tuple(name for name in REASONING if message.get(name))
    words = message.get("content")
    within = isinstance(words, str) and THOUGHT.search(words) is not None
    return {**found, "reasoning": reasons} if reasons or within else found


def _other(messages: Sequence[Message], turn: int) -> View:
    """A turn with other words in all its fields, and all before it."""
    message = messages[turn]
    mark = _mark(message)
    changed = {name: value if name in (*KEPT, "name") else _with(value, mark) for name, value in message.items()}
    return View(turn + 1, changed={turn: changed})


def _by_field(message: Message) -> list[tuple[str, Message]]:
    """An answer of several fields with other words in one of them, for each."""
    fields = _fields(message)
    if len(fields) < 2:
        return []
    mark = _mark(message)
    found: list[tuple[str, Message]] = [
        (name, {**message, **{key: _with(message[key], mark) for key in keys}}) for name, keys in fields.items() if keys
    ]
    if not fields.get("reasoning", True):  # it stands within the words
        other = THOUGHT.sub(lambda thought: f"{thought[1]}{_with(thought[2], mark)}{thought[3]}", message["content"])
        found.append(("reasoning", {**message, "content": other}))
    return found


def _with(value: Any, mark: str) -> Any:
    """A value with other words: texts and numbers in it are this mark, empty ones stay."""
    if isinstance(value, Mapping):
        return {name: one if name in KEPT else _with(one, mark) for name, one in value.items()}
    if isinstance(value, list):
        return [_with(one, mark) for one in value]
    if isinstance(value, bool) or value is None or (isinstance(value, str) and not value.strip()):
        return value
    return mark


def _mark(message: Message) -> str:
    said = repr(message)
    return next(mark for mark in map(chr, range(MARK, sys.maxunicode)) if mark.isprintable() and mark not in said)


def _common_end(text: str, other: str) -> int:
    return shared(text[::-1], other[::-1])
