"""A conversation by lines: what a person says is answered with all that was said before it."""

import re
from collections.abc import Callable, Iterable

from sft_jax.errors import DataError
from sft_jax.infer.records import TRUNCATED, Answers

RESET, QUIT = "/reset", "/quit"
COMMAND = re.compile(r"/[a-z]+")


def converse(
    model: Answers,
    lines: Iterable[str],
    say: Callable[[str], None],
    tell: Callable[[str], None],
    system: str | None = None,
) -> None:
    """Answer each line by what `say` is given; `tell` hears what is no answer. Ends with the lines, or at /quit.

    An answer is that which `predict` gives for the same messages.
    """
    begin = [] if system is None else [{"role": "system", "content": system}]
    messages = [*begin]
    for line in lines:
        said = line.strip()
        if said == QUIT:
            return
        if said == RESET:
            messages = [*begin]
            tell("all that was said is forgotten")
        elif COMMAND.fullmatch(said):
            tell(f"{said} is no command; {RESET} forgets what was said, {QUIT} ends")
        elif said:
            asked = [*messages, {"role": "user", "content": said}]
            try:
                record = model({model.task.texts[0]: asked}, batch_size=1)
            except DataError as error:
                tell(str(error))
                continue
            if TRUNCATED in record:
                tell(f"the beginning was left out: the model reads {model.longest:,} tokens; {RESET} begins anew")
            say(record["answer"])
            messages = [*asked, {"role": "assistant", "content": record["answer"]}]
