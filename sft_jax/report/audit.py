"""What is supervised, token by token: as JSON lines that any program reads, and as a page for people.

A record is a document: the row that it is of, where that row stands, its tokens with their numbers, texts and weights,
and the same in pieces of one weight, whose texts are whole characters. Records are written as they come, so that those
of any number of rows take no memory.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from sft_jax.errors import RunError, reason

FILE, PAGE = "audit.jsonl", "audit.html"
Record = Mapping[str, Any]
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}
</style>
</head>
<body>
<div class="page">
<header><h1>{title}</h1>
<p class="muted">What is learned is marked; what counts for more or less than 1 says so.</p></header>
<main>
"""
TAIL = "</main>\n</div>\n</body>\n</html>\n"


def write_lines(records: Iterable[Record], file: Path) -> int:
    """Write records as JSON lines; gives how many there were."""
    return _write(file, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_page(records: Iterable[Record], file: Path, title: str) -> int:
    """Write records as a page that needs nothing else; gives how many there were."""
    style = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    return _write(file, map(_article, records), HEAD.format(title=escape(title), style=style), TAIL)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file that was written so; none without one."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
        return [json.loads(line) for line in lines if line]
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file}: is not JSON lines ({reason(error)}); train again, or take it away") from None


def pieces(tokens: Iterable[Any], decode: Any) -> Iterator[tuple[str, float, str | None]]:
    """(text, weight, label) of the tokens that stand together and are alike in both."""
    for (weight, label), alike in groupby(tokens, lambda token: (token.weight, token.label)):
        yield decode([token.id for token in alike]), weight, label


def _write(file: Path, parts: Iterable[str], head: str = "", tail: str = "") -> int:
    """Write a file whole or not at all; gives the number of parts."""
    count = 0
    fresh = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(fresh, "w", encoding="utf-8", errors="replace") as sink:
            sink.write(head)
            for part in parts:
                sink.write(part)
                count += 1
            sink.write(tail)
        fresh.replace(file)
    except OSError as error:
        raise RunError(f"{file}: cannot be written ({reason(error)}); name another file") from None
    finally:
        fresh.unlink(missing_ok=True)
    return count


def _article(record: Record) -> str:
    marked = "".join(_marked(*piece) for piece in record["pieces"])
    return f'<section><h2>{escape(record["place"])}</h2>\n<pre class="audit" dir="auto">{marked}</pre></section>\n'


def _marked(text: str, weight: float, label: str | None) -> str:
    if not weight:
        return escape(text)
    said = "".join([f" {label}" if label else "", "" if weight == 1 else f" ×{weight:g}"])
    return f"<mark>{escape(text)}</mark>" + (f"<small>{escape(said)}</small>" if said else "")
