"""Writes `docs/configuration.md` from the schema: python docs/make_configuration.py"""

import types
import typing
from datetime import date
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sft_jax.config.read import sections, sections_of
from sft_jax.config.section import Section

PAGE = Path(__file__).with_name("configuration.md")
HEADER = """\
# Configuration

A run is described by YAML files, merged key by key from left to right (lists are replaced whole), and by overrides,
which come last: `sft-jax train base.yaml mine.yaml optim.lr=3e-5 'train.freeze=[embed/**]'`. Values are plain YAML 1.2:
`2e-5` is a number and `no` is a word; tags, aliases and `${...}` are refused. `sft-jax config check` lists all that is
wrong before anything is started, and `sft-jax config show` prints the whole result, defaults included. A key whose
default is *needed* has to be given; any other can be left out.

This page is made from `sft_jax/config/` by `python docs/make_configuration.py`.
"""
WORDS = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "`true` or `false`",
    date: "day such as 2026-01-31",
    type(None): "`null`",
}
BOUNDS = (("ge", "at least {}"), ("gt", "above {}"), ("le", "at most {}"), ("lt", "below {}"))


def page() -> str:
    """The whole page."""
    first: dict[type[Section], str] = {}  # where a section stands first; it is shown there alone
    for name, section in sections():
        first.setdefault(section, name)
    return "\n".join([HEADER, *(_section(name, section, first) for section, name in first.items())])


def _section(name: str, section: type[Section], first: dict[type[Section], str]) -> str:
    doc = " ".join((section.__doc__ or "").split())
    kind = section.model_fields.get("kind")
    choices = typing.get_args(kind.annotation) if kind else ()
    which = f", `kind: {choices[0]}`" if len(choices) == 1 else ""
    heading = f"## `{name}`{which}" if name else "## The sections"
    fields = sorted(section.model_fields.items(), key=lambda item: len(choices) == 1 and item[0] != "kind")
    rows = [
        (
            f"`{key}`",
            _type(field.annotation, field.metadata) + _elsewhere(name, key, field, first),
            _default(field),
            _cell(_meaning(field)),
        )
        for key, field in fields
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([heading, "", doc, "", "| key | type | default | meaning |", "|---|---|---|---|", *lines, ""])


def _type(annotation: Any, bounds: typing.Iterable[Any] = ()) -> str:
    """What may stand for a key, in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0], [b for extra in inner[1:] for b in getattr(extra, "metadata", [extra])])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(part, bounds) for part in inner))
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if origin is list:
        return f"list of {_type(inner[0])}s"
    if origin is dict:
        return "keys with values"
    if issubclass(annotation, BaseModel):
        return "section"
    limits = [text.format(getattr(b, at)) for b in bounds for at, text in BOUNDS if hasattr(b, at)]
    return (
        f"{WORDS[annotation]} ({', '.join(limits)})" if limits and annotation is not type(None) else WORDS[annotation]
    )


def _elsewhere(name: str, key: str, field: FieldInfo, first: dict[type[Section], str]) -> str:
    """Under which name the sections of a key are shown, where that is another one."""
    own = f"{name}.{key}" if name else key
    return "".join(f", see `{place}`" for place in sorted({first[s] for s in sections_of(field.annotation)} - {own}))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "*needed*"
    if isinstance(value, BaseModel):
        return "its defaults"
    plain = [item.model_dump(exclude_none=True) for item in value] if _holds_sections(value) else value
    return f"`{_cell(_yaml(plain))}`"


def _meaning(field: FieldInfo) -> str:
    section = _of_section(field.annotation)
    return " ".join((field.description or (section and section.__doc__) or "Tells this section apart.").split())


def _of_section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _holds_sections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], BaseModel)


def _yaml(value: Any) -> str:
    number = isinstance(value, float)  # 2e-05 as people write it
    return f"{value:g}" if number else yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
