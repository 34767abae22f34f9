"""The page of all options, `docs/configuration.md`, which is made from the schema."""

import importlib.util
import typing
from pathlib import Path

import sft_jax
from sft_jax.config.read import known_keys, sections

DOCS = Path(sft_jax.__file__).parents[1] / "docs"


def page() -> str:
    """The page as the script would write it now."""
    spec = importlib.util.spec_from_file_location("make_configuration", DOCS / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.page()


def test_page_is_up_to_date():
    """C26: the committed page is what the schema says; if not: python docs/make_configuration.py"""
    assert (DOCS / "configuration.md").read_text(encoding="utf-8") == page()


def test_page_has_every_key():
    """C26: every key of the schema has a row with a meaning in the table of its section."""
    tables = [part.splitlines() for part in page().split("\n## ")[1:]]
    for key, _, section in known_keys():
        name, kind = (
            key.rpartition(".")[2],
            typing.get_args(getattr(section.model_fields.get("kind"), "annotation", None)),
        )
        doc = " ".join((section.__doc__ or "").split())
        (table,) = (table for table in tables if table[2] == doc)
        assert len(kind) != 1 or table[0].endswith(f"`kind: {kind[0]}`")
        (row,) = (line for line in table if line.startswith(f"| `{name}` |"))
        assert row.endswith(" |") and len(row.split("|")[-2].strip()) > 10, key


def test_page_shows_a_section_once():
    """C26: a section that may stand in several places is shown at the first, and named at the others."""
    headings = [line for line in page().splitlines() if line.startswith("## ")]
    assert len(set(headings)) == len(headings) == len({section for _, section in sections()})
    assert sum("`kind: files`" in heading for heading in headings) == 1
    assert "| `source` | section, see `data.source` | *needed* | Where its rows come from;" in page()
