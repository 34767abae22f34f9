"""One family of errors for what a user can mend, and the form they are written in.

Every message reads *where: what; remedy*. Several problems found together are shown together. Knows nothing of the
rest of the package. The exit code of each class is what `sft-jax` leaves with.
"""

import difflib
import errno
import os
import re
from collections.abc import Iterable
from itertools import accumulate

# What a quoted message may hold of credentials, and what is shown in its place.
SECRETS = (
    (re.compile(r"(?<=://)[^\s/]+@"), "***@"),
    (re.compile(r"(?i)\b(bearer|authorization\W+\w+)\s+\S{8,}"), r"\1 ***"),
    (re.compile(r"(?i)([?&][\w-]*(?:token|key|secret|password|signature|credential)[\w-]*=)[^\s&'\"]+"), r"\1***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_***"),
)
# What `sft-jax` leaves with, and what that means.
EXITS = {
    0: "done",
    1: "another mistake that can be mended, which is named",
    2: "the configuration or the command line is wrong; trying again cannot help",
    42: "stopped by SIGTERM after saving; the same command goes on",
    65: "rows, a checkpoint or a run directory cannot be used as asked",
    69: "an asset could not be fetched, or is not what it was",
    74: "a file or a disk cannot be read or written",
    76: "loss or gradient became NaN or infinite",
    130: "stopped by Ctrl-C after saving; the same command goes on",
    141: "who read the output has stopped reading",
}
MOST_OF_LINE, MOST_OF_ALL = 600, 2_800  # characters of one problem, and of all problems of a message
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a system says where a disk is full
SECRET_VARIABLES = ("TOKEN", "SECRET", "PASSWORD", "_KEY")  # endings of names in the environment


class SftError(Exception):
    """A mistake that the user can mend; shown as one message, never as a traceback."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__("\n".join(map(_shown, message.split("\n"))))


class ConfigError(SftError):
    """The configuration or the command line is wrong; trying again cannot help."""

    exit_code = 2


class DataError(SftError):
    """Rows, columns, labels or files are not what the configuration says."""

    exit_code = 65


class ModelError(SftError):
    """A checkpoint, its `config.json` or its tokenizer cannot be used."""

    exit_code = 65


class RunError(SftError):
    """A run directory or its checkpoints cannot be used as asked."""

    exit_code = 65


class ProcessError(SftError):
    """Another process of the run cannot be reached, or is gone; the same command may do better another time."""

    exit_code = 69


class NonFiniteError(SftError):
    """Loss or gradient became NaN or infinite."""

    exit_code = 76


class Interrupted(SftError):
    """The user or the machine's owner asked to stop; the state was saved first."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def listing(where: str, problems: Iterable[str], more: int = 0) -> str:
    """`where: n problems` and a line for each problem, in the order given; `more` are counted, and not shown.

    So are those that would make the message longer than anyone reads.
    """
    lines = [_shown(line) for line in problems]
    total = len(lines) + more
    count = f"{total} problem" + ("s" if total != 1 else "")
    shown = [line for line, size in zip(lines, accumulate(map(len, lines)), strict=True) if size <= MOST_OF_ALL]
    rest = [f"and {total - len(shown)} more"] if total > len(shown) else []
    return "\n".join([f"{_shown(where)}: {count}", *(f"  - {line}" for line in [*shown, *rest])])


def reason(error: BaseException | str, most: int = 150) -> str:
    """What another program says, to be quoted in a message of ours: on one line, at most so many characters.

    An error that says nothing is called by its type. Credentials are taken out before anything is cut.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    for name, value in os.environ.items():
        if name.upper().endswith(SECRET_VARIABLES) and len(value) >= 16:
            text = text.replace(value, "***")
    for pattern, shown in SECRETS:
        text = pattern.sub(shown, text)
    return text[:most]


def _shown(line: str) -> str:
    """A line as a terminal may show it: control characters written out, and its middle left out where it is too long.

    Where and remedy stand at the ends.
    """
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= MOST_OF_LINE else f"{line[: MOST_OF_LINE - 250]} … {line[-240:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known spelling, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
