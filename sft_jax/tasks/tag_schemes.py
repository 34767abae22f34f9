"""Tags of words and the spans that they mean: BIO, BIOES, IO, and tags that are no spans at all.

A tag is `O`, or a prefix and a type (`B-PER`). Spans are (type, first word, word after the last).
"""

from collections.abc import Callable, Iterable, Sequence

from sft_jax.tasks import metrics

Span = tuple[str, int, int]
OUTSIDE = "O"
PREFIXES = {"BIO": "BI", "BIOES": "BIES", "IO": "I"}  # scheme -> the prefixes that it has


def scheme_of(labels: Sequence[str]) -> str:
    """The scheme that names of labels are of: the smallest that has all their prefixes; `none` if there is none."""
    spans = [label for label in labels if label != OUTSIDE]
    if not spans or not all(label[1:2] == "-" and label[0] in "BIES" and len(label) > 2 for label in spans):
        return "none"
    used = {label[0] for label in spans}
    return next(scheme for scheme in ("IO", "BIO", "BIOES") if used <= set(PREFIXES[scheme]))


def spans(tags: Sequence[str]) -> list[Span]:
    """The spans of a row, whatever its transitions: one that does not begin where it should begins all the same.

    As the CoNLL-2000 evaluation script has it: a span begins at B or S, after O, E or S, or where the type changes.
    """
    found: list[Span] = []
    begin, before, kind = 0, OUTSIDE, ""  # of the word before
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, of = (OUTSIDE, "") if tag == OUTSIDE else (tag[0], tag[2:])
        begins = prefix != OUTSIDE and (prefix in "BS" or before in "OES" or of != kind)
        if before != OUTSIDE and (begins or prefix == OUTSIDE):
            found.append((kind, begin, place))
        if begins:
            begin = place
        before, kind = prefix, of
    return found


def strict_spans(tags: Sequence[str], scheme: str) -> list[Span]:
    """The spans of a row that are spelled as the scheme has them; all others are none."""
    if scheme == "IO":
        return spans(tags)
    found: list[Span] = []
    begin: int | None = None
    kind = ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, of = (tag[0], tag[2:]) if tag != OUTSIDE else (OUTSIDE, "")
        goes_on = begin is not None and of == kind and prefix in ("I", "E")
        if begin is not None and not goes_on:
            if scheme == "BIO":
                found.append((kind, begin, place))
            begin = None
        if begin is not None and prefix == "E":
            found.append((kind, begin, place + 1))
            begin = None
        if prefix == "B":
            begin, kind = place, of
        if prefix == "S":
            found.append((of, place, place + 1))
    return found


def span_scores(
    truth: Iterable[Sequence[str]], said: Iterable[Sequence[str]], read: Callable[[Sequence[str]], list[Span]] = spans
) -> dict[str, tuple[int, int, int]]:
    """Type -> (spans that are right, spans that were said, spans that there are), types in order."""
    counts: dict[str, list[int]] = {}
    for true_tags, said_tags in zip(truth, said, strict=True):
        there, found = set(read(true_tags)), set(read(said_tags))
        for place, group in enumerate((there & found, found, there)):
            for kind, _, _ in group:
                counts.setdefault(kind, [0, 0, 0])[place] += 1
    return {kind: (counts[kind][0], counts[kind][1], counts[kind][2]) for kind in sorted(counts)}


def summary(scores: dict[str, tuple[int, int, int]]) -> dict[str, float]:
    """Precision, recall and F1 over all spans, and the mean F1 of the types."""
    totals = [sum(column) for column in zip(*scores.values(), strict=True)] or [0, 0, 0]
    precision, recall, f1 = (float(value) for value in metrics.precision_recall_f1(*totals))
    each = [float(metrics.precision_recall_f1(*counts)[2]) for counts in scores.values()]
    macro = sum(each) / max(len(each), 1)
    return {"span_precision": precision, "span_recall": recall, "span_f1": f1, "span_f1_macro": macro}
