"""The page of all options, `docs/configuration.md`, which is made from the schema."""

import importlib.util
from pathlib import Path

import sft_jax
from sft_jax.config.read import known_keys

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
    """C26: every key of the schema has a row in the table of its section, with a meaning."""
    tables = {part.split("`")[1] if part.startswith("`") else "": part for part in page().split("\n## ")[1:]}
    for key, _, _ in known_keys():
        section, _, name = key.rpartition(".")
        rows = [line for line in page().splitlines() if line.startswith(f"| `{name}` |")]
        assert f"| `{name}` |" in tables[section] or section == "data.source", key
        assert rows and all(len(row.split("|")[-2].strip()) > 10 for row in rows), key
