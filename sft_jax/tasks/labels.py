"""What tasks with named labels share: names and numbers, weights by name, and their place in a `config.json`."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft_jax.errors import ConfigError, ModelError, did_you_mean, listing

MOST_SHOWN = 10  # labels in one message
GAPS = {"", "?", "na", "n/a", "<na>", "nan", "none", "null", "nil", "missing", "unknown", "#n/a"}
FEW, MANY = 5, 100  # rows of a class that is hardly learned; classes that are seldom meant


def given(names: Sequence[str], least: int) -> tuple[str, ...]:
    """The names of `task.labels`, each of them once."""
    if len(names) < least or len(set(names)) < len(names):
        count = {1: "one label", 2: "two labels"}[least]
        raise ConfigError(f"task.labels: {names}; give {count} or more, each once")
    return tuple(names)


def weights(named: str | Mapping[str, float] | None, labels: Sequence[str]) -> np.ndarray | None:
    """`task.class_weights` as float32 [c], 1 where not named; None where there are none, or none given by name."""
    if not isinstance(named, Mapping):
        return None
    known = f"(known: {', '.join(labels[:MOST_SHOWN])}{', …' if len(labels) > MOST_SHOWN else ''})"
    unknown = [f"'{name}' is no label{did_you_mean(name, labels)} {known}" for name in named if name not in labels]
    if unknown:
        raise ConfigError(listing("task.class_weights", unknown))
    found = np.asarray([named.get(label, 1.0) for label in labels], np.float32)
    if not found.any():
        raise ConfigError("task.class_weights: every label weighs 0, so there is nothing to learn; give one more")
    return found


def doubts(counts: Mapping[str, int | float]) -> list[str]:
    """What should be said of labels before they are learned, given how often each is among the training rows."""
    found = []
    alike: dict[str, list[str]] = {}
    for name in counts:
        alike.setdefault(_bare(name), []).append(name)
    for names in (names for names in alike.values() if len(names) > 1):
        shown = ", ".join(f"{name!r} ({counts[name]})" for name in names[:MOST_SHOWN])
        found.append(
            f"labels {shown} are alike but for case, blanks, punctuation or the form of a letter, and are classes of "
            f"their own; write them alike, or name in task.labels those that are meant"
        )
    gaps = [f"{name!r} ({counts[name]})" for name in counts if name.strip().lower() in GAPS]
    if gaps:
        found.append(f"labels {', '.join(gaps)} may stand for no label; if they do, leave their cells empty")
    rare = [name for name, count in counts.items() if count < FEW]
    if rare:
        shown = ", ".join(f"{name!r} ({counts[name]})" for name in rare[:MOST_SHOWN])
        more = f" and {len(rare) - MOST_SHOWN} more" if len(rare) > MOST_SHOWN else ""
        found.append(f"labels with fewer than {FEW} training rows: {shown}{more}; such a class is hardly learned")
    if len(counts) > MANY:
        found.append(f"there are {len(counts)} labels; check that the column holds classes, and not texts or numbers")
    return found


def _bare(name: str) -> str:
    """A name without what is easily written otherwise; signs that tell C from C++ and 1 from -1 stay."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    bare = "".join(c for n, c in enumerate(plain) if c.isalnum() or c in "+#" or (c == "-" and not n))
    return bare or plain


def names_in(config: Mapping[str, Any]) -> list[str]:
    """Names of the outputs of the model that a `config.json` describes; their numbers where it has no names."""
    named, count = config.get("id2label"), config.get("num_labels", 2)
    if named is None and isinstance(count, int) and count > 0:
        return [str(number) for number in range(count)]
    try:
        names = {int(number): str(name) for number, name in dict(named or {}).items()}
        return [names[number] for number in range(len(names) or 1)]
    except (KeyError, TypeError, ValueError):
        raise ModelError(
            f"config.json: id2label is {named!r:.60}; expected a name for each number from 0, as 'id2label': {{'0': …}}"
        ) from None


def to_hf(names: Sequence[str], problem: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Names and kind of problem where `transformers` looks for them, and what our own `predict` needs besides."""
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": problem,
        "sft_jax_task": dict(ours),
    }
