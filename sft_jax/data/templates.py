"""Chat templates, which are programs that strangers wrote: rendered in a process of its own, within bounds.

The process that renders has jinja2's sandbox, nothing of our environment, and limits on memory, on the time and the
output of each rendering; it is asked for thousands of conversations in one call. A conversation that goes beyond them
is refused alone, and the template is blamed where most do. What a template is given, globals and filters, is what
`transformers` gives it (`utils/chat_template_utils.py`), so that it renders the same text. The day is said by the
configuration and never asked of the clock, or tokens would change overnight.

`main` is the whole of that process. Imports nothing heavy.
"""

import contextlib
import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from sft_jax.errors import ModelError, reason

MEMORY, SECONDS = 384 << 20, 2.0  # of the process; of its own time, for each rendering
MOST_SECONDS = 60.0  # of its own time, for all renderings of one conversation
FEW = 10  # conversations that may go beyond the limits before the template is blamed, if they are most of all
MOST_GROWTH = 8  # characters of a rendering for each one of the conversation as JSON, and of the template
REASONING = ("reasoning_content", "thinking", "reasoning")  # under which messages carry it; templates read the first
# -P: nothing is imported from where the command is given; our code is what this process has.
RENDERER = "import sys; sys.path.insert(0, sys.argv[1]); from sft_jax.data.templates import main; main()"
ROOT = Path(__file__).parents[2]
REMEDY = "do not trust it, or give another one by task.template"


class View(NamedTuple):
    """One rendering of a conversation."""

    count: int  # of its messages, from the first on
    asks: bool = False  # whether the text asks for an answer
    changed: Mapping[int, Mapping[str, Any]] = {}  # number of a message -> what stands in its place
    without: str | None = None  # "tools", or what the template is not given of `settings`


class Request(NamedTuple):
    """A conversation and how it is to be rendered."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    views: Sequence[View]
    settings: Mapping[str, Any] = {}  # what the template is given besides, by name
    template: str = "default"


@dataclass(frozen=True)
class Refused:
    """Why there is no rendering: what the template says of a conversation that it does not take, or our limits."""

    why: str
    limit: bool = False


def render(
    templates: Mapping[str, str], special: Mapping[str, str], requests: Sequence[Request], today: date | None
) -> list[list[str | Refused]]:
    """The renderings of each conversation by the template of a name, or why there is one not.

    Raises ModelError for a template that is broken, that asks for what it must not have, or that goes beyond the limits
    with most conversations.
    """
    given = {"templates": dict(templates), "special": dict(special), "today": today and today.isoformat()}
    lines = [json.dumps(request._asdict()) for request in requests]
    found: list[list[str | Refused]] = []
    beyond: list[str] = []
    while len(found) < len(lines):
        done = _run([json.dumps(given), *lines[len(found) :]])
        said = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
        if not said:  # not even the templates could be read
            raise ModelError(f"chat template: {_stopped(done)}; {REMEDY}")
        for one in said[1:]:
            if "error" in one:
                raise ModelError(f"chat template: {one['error']}; {REMEDY}")
            found.append(_texts(one["made"]))
            beyond += [made.why for made in found[-1] if isinstance(made, Refused) and made.limit][:1]
        if "error" in said[0]:
            raise ModelError(f"chat template: {said[0]['error']}; {REMEDY}")
        if len(found) < len(lines):  # the process was ended by what it rendered last; the next goes on behind it
            beyond.append(_stopped(done))
            found.append([Refused(beyond[-1], limit=True)] * len(requests[len(found)].views))
        if 2 * len(beyond) > len(found) and (len(beyond) > FEW or len(found) == len(lines)):
            raise ModelError(f"chat template: {beyond[0]}; {REMEDY}")
    return found


def _run(lines: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-P", "-c", RENDERER, str(ROOT)]
    quiet = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}  # and no more of the environment, which holds credentials
    return subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, env=quiet, encoding="utf-8")


def _texts(made: Sequence[Any]) -> list[str | Refused]:
    """Renderings of what the process says of them: each text by what it shares with the one before, or why not."""
    found: list[str | Refused] = []
    before = ""
    for one in made:
        if isinstance(one, dict):
            found.append(Refused(**one))
        else:
            before = before[: one[0]] + one[1]
            found.append(before)
    return found


def _stopped(done: "subprocess.CompletedProcess[str]") -> str:
    """Why the process ended before its work did."""
    if done.returncode == -signal.SIGPROF:
        return f"a conversation takes it more than {SECONDS:g} s"
    last = done.stderr.strip().splitlines()[-1:] or ["no word"]
    return f"rendering was stopped with {done.returncode} ({reason(last[0])})"


def main() -> None:
    """Render what standard input asks, a conversation a line; the first line is the template and what it is given."""
    for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a lower bound stands already, or the system has none
            resource.setrlimit(limit, (most, most))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process wherever it is, in the C code of a power too
    given = json.loads(sys.stdin.readline())
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        made = environment(given["today"])
        templates = {name: made.from_string(text) for name, text in given["templates"].items()}
    except Exception as error:  # of its syntax, or of what is computed while it is read
        _say({"error": f"cannot be read ({reason(error)})"})
        return
    _say({})
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        asked = Request(**json.loads(line))
        most = MOST_GROWTH * (len(line) + len(given["templates"][asked.template]))
        try:
            _say({"made": list(_rendered(templates[asked.template], given["special"], asked, most))})
        except _Forbidden as error:
            _say({"error": reason(error)})
            return


def environment(today: str | None) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What a template is rendered in, the same as in `transformers` but for the clock."""
    extensions: list[Any] = [_Generation, jinja2.ext.loopcontrols]
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _refuse, "strftime_now": _clock(today)}
    return made


def words(template: str) -> frozenset[str]:
    """The names and texts in the code of a template, among which are all keys that it reads; runs nothing of it."""
    try:
        found = [(kind, text) for _, kind, text in environment(None).lex(template)]
    except jinja2.TemplateError:
        return frozenset()  # which is said where it is rendered
    return frozenset(text.strip("'\"") for kind, text in found if kind in ("name", "string"))


class _Forbidden(Exception):
    """What a template must not have without a word of the user."""


class _Beyond(Exception):
    """What a template takes more of than it may have of one conversation."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what is inside, and no more; our masks need no such tag."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _clock(today: str | None) -> Callable[[str], str]:
    def now(form: str) -> str:
        if today is None:
            raise _Forbidden("it asks for the day (strftime_now), which would change from run to run; set task.today")
        return date.fromisoformat(today).strftime(form)

    return now


def _rendered(
    template: jinja2.Template, special: Mapping[str, str], asked: Request, most: int
) -> Iterator[tuple[int, str] | dict[str, Any]]:
    """Of each view the characters that it shares with the one before and what follows, or why there is no text."""
    before, begun = "", time.process_time()
    for view in (View(*one) for one in asked.views):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        random.seed(0)  # jinja2 has a filter that draws
        try:
            if time.process_time() - begun > MOST_SECONDS:
                raise _Beyond(f"a conversation takes it more than {MOST_SECONDS:g} s")
            text = _text(template, special, asked, view, most)
        except _Forbidden:
            raise
        except (_Beyond, jinja2.sandbox.SecurityError, MemoryError, RecursionError, OverflowError) as error:
            yield {"why": reason(error), "limit": True}
        except Exception as error:  # its own word, or a message that it cannot use
            yield {"why": reason(error)}
        else:
            same = shared(before, text)
            yield same, text[same:]
            before = text


def _text(template: jinja2.Template, special: Mapping[str, str], asked: Request, view: View, most: int) -> str:
    changed = {int(number): message for number, message in view.changed.items()}
    messages = [_taken(changed.get(n, message)) for n, message in enumerate(asked.messages[: view.count])]
    settings = {name: value for name, value in asked.settings.items() if name != view.without}
    tools = None if view.without == "tools" else asked.tools
    given = {**special, "documents": None, **settings, "messages": messages, "tools": tools}
    parts: list[str] = []
    total = 0
    for part in template.generate(**{**given, "add_generation_prompt": view.asks}):
        parts.append(part)
        total += len(part)
        if total > most:
            raise _Beyond(f"it makes more than {MOST_GROWTH} characters of one")
    return "".join(parts)


def shared(before: str, text: str) -> int:
    """How many characters two texts begin with that are the same."""
    low, high = 0, min(len(before), len(text))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if before[low:middle] == text[low:middle] else (low, middle - 1)
    return low


def _taken(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as `transformers` gives it: without keys that are null, its reasoning under each name that templates
    know."""
    given = {name: value for name, value in message.items() if value is not None}
    found = next((given[name] for name in REASONING if name in given), None)
    return given if found is None else {"thinking": found, **given, "reasoning_content": found}


def _say(said: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
