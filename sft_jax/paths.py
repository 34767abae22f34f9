"""Patterns over parameter paths: the one language that picks parameters.

A path is `blocks/3/attn/q/kernel`. In a pattern `*` stands for any part of one segment, `**` for any number of
segments, `{a,b}` for alternatives and `{0..5}` for a range of whole numbers. Knows nothing of arrays.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from sft_jax import names
from sft_jax.errors import ConfigError, listing

_TOKEN = re.compile(r"\*\*/|/\*\*|\*\*|\*|\{([^{}]*)\}|/|[^*{}/]+|[{}]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@lru_cache(maxsize=1024)
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern; raises ConfigError where braces do not close."""
    parts = []
    for token in _TOKEN.finditer(pattern):
        text = token.group(0)
        if text == "**/":
            parts.append(r"(?:[^/]+/)*")
        elif text == "/**":
            parts.append(r"(?:/[^/]+)*")
        elif text == "**":
            parts.append(r".*")
        elif text == "*":
            parts.append(r"[^/]*")
        elif token.group(1) is not None:
            parts.append(f"(?:{'|'.join(_alternatives(token.group(1)))})")
        elif text in "{}":
            raise ConfigError(f"pattern '{pattern}': a brace is not closed; write {{a,b}} or {{0..5}}")
        else:
            parts.append(re.escape(text))
    return re.compile("".join(parts))


def alternatives(pattern: str) -> list[str]:
    """The paths that a pattern with braces and no stars stands for, in order."""
    begin, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inside, _, end = rest.partition("}")
    return [f"{begin}{word}{after}" for word in _alternatives(inside) for after in alternatives(end)]


def _alternatives(inside: str) -> list[str]:
    words = []
    for word in inside.split(","):
        span = _RANGE.fullmatch(word.strip())
        if span:
            words.extend(str(i) for i in range(int(span.group(1)), int(span.group(2)) + 1))
        else:
            words.append(re.escape(word.strip()).replace(r"\*", "[^/]*"))
    return words


def matches(pattern: str, path: str) -> bool:
    """Whether the whole path fits the pattern."""
    return compiled(pattern).fullmatch(path) is not None


def select(patterns: Sequence[str], paths: Iterable[str], where: str) -> frozenset[str]:
    """The paths that any of the patterns fits; a pattern that fits none is an error with near misses."""
    paths = list(paths)
    problems = [unmatched(p, paths) for p in patterns if not any(matches(p, q) for q in paths)]
    if problems:
        raise ConfigError(listing(where, problems))
    return frozenset(q for q in paths if any(matches(p, q) for p in patterns))


def first_match(patterns: Sequence[str], paths: Iterable[str], where: str) -> Mapping[str, int | None]:
    """For each path the index of the first pattern that fits it, or None; an idle pattern is an error.

    A pattern is idle when it fits no path at all; one that is shadowed by earlier patterns is allowed.
    """
    paths = list(paths)
    select(patterns, paths, where)
    return {q: next((i for i, p in enumerate(patterns) if matches(p, q)), None) for q in paths}


def unmatched(pattern: str, paths: Sequence[str], what: str = "parameter") -> str:
    """`'pattern' matches no parameter`, with what it may mean: ours for the module of another library, the nearest
    paths, or all kinds of layers there are."""
    known = names.layers(pattern, lambda found: any(matches(found, path) for path in paths))
    if known:
        return f"'{pattern}' matches no {what}; did you mean '{known}'?"
    if what == "layer":
        kinds = dict.fromkeys(re.sub(r"(?<=/)\d+(?=/)", "*", path) for path in paths)
        return f"'{pattern}' matches no layer; there are {', '.join(kinds)}"
    close = difflib.get_close_matches(pattern.replace("*", "0"), paths, n=3, cutoff=0.3)
    near = f"; the nearest are {', '.join(close)}" if close else ""
    return f"'{pattern}' matches no {what}{near}; sft-jax model show lists them"
