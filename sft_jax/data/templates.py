"""Chat templates, which are programs that strangers wrote: rendered in a process of its own, within bounds.

The process that renders has jinja2's sandbox, nothing of our environment, and limits on memory, on the time and the
output of each rendering; it is asked for thousands of conversations in one call. What a template is given, globals and
filters, is what `transformers` gives it (`utils/chat_template_utils.py`), so that it renders the same text. The day is
said by the configuration and never asked of the clock, or tokens would change overnight.

`main` is the whole of that process. Imports nothing heavy.
"""

import contextlib
import json
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from sft_jax.errors import ModelError, reason

MEMORY, SECONDS = 384 << 20, 2.0  # of the process; of its own time, for all that is rendered of one conversation
MOST_GROWTH = 8  # characters of a rendering for each one of the conversation as JSON, and of the template
REASONING = ("reasoning_content", "thinking", "reasoning")  # under which messages carry it; templates read the first
# -P: nothing is imported from where the command is given; our code is what this process has.
RENDERER = "import sys; sys.path.insert(0, sys.argv[1]); from sft_jax.data.templates import main; main()"
ROOT = Path(__file__).parents[2]
REMEDY = "do not trust it, or give another one by task.template"


class Request(NamedTuple):
    """A conversation and how it is to be rendered."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None
    cuts: Sequence[tuple[int, bool]]  # for each rendering: how many messages, and whether an answer is asked for


@dataclass(frozen=True)
class Refused:
    """What a template says of a conversation that it does not take."""

    why: str


def render(
    template: str, special: Mapping[str, str], requests: Sequence[Request], today: date | None
) -> list[list[str] | Refused]:
    """The renderings of each conversation, or why the template refuses it.

    Raises ModelError for a template that is broken, or that reaches for what it must not have.
    """
    asked = [json.dumps({"template": template, "special": dict(special), "today": today and today.isoformat()})]
    asked += [json.dumps(request._asdict()) for request in requests]
    command = [sys.executable, "-P", "-c", RENDERER, str(ROOT)]
    quiet = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}  # and no more of the environment, which holds credentials
    done = subprocess.run(command, input="\n".join(asked), capture_output=True, text=True, env=quiet, encoding="utf-8")
    lines = done.stdout.split("\n")[:-1]
    found: list[list[str] | Refused] = []
    for line in lines:
        said = json.loads(line)
        if "error" in said:
            raise ModelError(f"chat template: {said['error']}; {REMEDY}")
        found.append(Refused(said["refused"]) if "refused" in said else said["texts"])
    if len(found) < len(requests):
        raise ModelError(f"chat template: {_stopped(done)}; {REMEDY}")
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
        template = environment(given["today"]).from_string(given["template"])
    except Exception as error:  # of its syntax, or of what is computed while it is read
        _say({"error": f"cannot be read ({reason(error)})"})
        return
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        random.seed(0)  # jinja2 has a filter that draws
        most = MOST_GROWTH * (len(line) + len(given["template"]))
        said = _rendered(template, given["special"], Request(**json.loads(line)), most)
        _say(said)
        if "error" in said:
            return


def environment(today: str | None) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What a template is rendered in, the same as in `transformers` but for the clock."""
    extensions: list[Any] = [_Generation, jinja2.ext.loopcontrols]
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _refuse, "strftime_now": _clock(today)}
    return made


class _Forbidden(Exception):
    """What a template must not have, or not without a word of the user."""


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


def _rendered(template: jinja2.Template, special: Mapping[str, str], asked: Request, most: int) -> dict[str, Any]:
    messages = [_with_reasoning(message) for message in asked.messages]
    texts: list[str] = []
    try:
        for count, prompt in asked.cuts:
            given = {"messages": messages[:count], "tools": asked.tools, "documents": None}
            parts, total = [], 0
            for part in template.generate(**special, **given, add_generation_prompt=prompt):
                parts.append(part)
                total += len(part)
                if total > most:
                    raise _Forbidden(f"it makes more than {MOST_GROWTH} characters of one")
            texts.append("".join(parts))
    except (_Forbidden, jinja2.sandbox.SecurityError, MemoryError, RecursionError, OverflowError) as error:
        return {"error": reason(error)}
    except Exception as error:  # its own word, or a message that it cannot use
        return {"refused": reason(error)}
    return {"texts": texts}


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under each name that templates know."""
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return dict(message) if found is None else {"thinking": found, **message, "reasoning_content": found}


def _say(said: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()
