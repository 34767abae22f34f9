"""What the hostile tests share: values of the wrong kind, and what a message to a user has to look like.

Budgets are small and fixed; `pytest tests/hostile --hypothesis-profile=long` draws ten times as much, anew each time.
"""

import json
import re
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sft_jax.errors import SftError

LONGEST = 4_000  # characters of a message
# A problem reads `where: what`, and what is to be done stands behind a semicolon or is said by what was expected.
PROBLEM = re.compile(r"\S.*?: \S", re.DOTALL)
REMEDY = re.compile(r"; \S|expected \S|\(known: |needed, but not given")

words = st.text(max_size=12) | st.sampled_from(
    ["", " ", "\0", "é", "😀" * 9, "\u202eabc", "x" * 5000, "../..", "${HOME}", "a.b"]
)
numbers = (
    st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**12, 10**400, 1 << 200])
    | st.floats()
    | st.sampled_from([1e308, -0.0, 5e-324])
)
plain = st.none() | st.booleans() | numbers | words
junk = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)


def budget(examples: int) -> settings:
    """So many examples, the same ones each time, unless the profile of hypothesis asks for more."""
    profile = settings.get_profile(settings.get_current_profile_name())
    return settings(
        max_examples=examples * profile.max_examples // 100,
        deadline=None,
        derandomize=profile.max_examples == 100,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def told(error: SftError) -> str:
    """The message of an error, which has to say where, what and what to do, within bounds."""
    message = str(error)
    first, *rest = message.split("\n")
    remedy = rest.pop() if rest and not rest[-1].startswith("  - ") else first  # for all problems together
    problems = [line.removeprefix("  - ") for line in rest if not re.fullmatch(r"  - and [\d,]+ more", line)] or [first]
    assert len(message) < LONGEST, f"{len(message)} characters"
    assert all(line.startswith("  - ") for line in rest) and message.replace("\n", "").isprintable(), message
    for problem in problems:
        assert PROBLEM.match(problem), f"no `where: what` in {problem!r}"
        assert REMEDY.search(problem) or remedy != first or REMEDY.search(first), f"no remedy in {problem!r}"
    assert "Traceback" not in message and "object at 0x" not in message, message
    return message


def mutated(content: Any) -> st.SearchStrategy[Any]:
    """Plain data with one to three of its values replaced by junk, left out, or doubled."""

    def walk(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        return [path, *(p for key, value in inner for p in walk(value, (*path, key)))]

    places = [path for path in walk(content) if path]

    def change(changes: list[tuple[tuple[Any, ...], str, Any]]) -> Any:
        copy = json.loads(json.dumps(content))
        for path, what, value in changes:
            node = copy
            try:
                for key in path[:-1]:
                    node = node[key]
                if what == "drop":
                    del node[path[-1]]
                else:
                    node[path[-1]] = value if what == "junk" else [node[path[-1]], node[path[-1]]]
            except (KeyError, IndexError, TypeError):
                continue
        return copy

    one = st.tuples(st.sampled_from(places), st.sampled_from(["junk", "junk", "drop", "double"]), junk)
    return st.lists(one, min_size=1, max_size=3).map(change)
