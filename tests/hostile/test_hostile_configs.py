"""Configurations that nobody would write: whatever stands in one, it is read or refused in words."""

import types
import typing
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import budget, junk, mutated, numbers, told, words
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from sft_jax.config.read import known_keys, read_config, write_config
from sft_jax.config.schema import Config
from sft_jax.errors import ConfigError

GOOD: dict[str, Any] = {
    "model": {"source": "some/model"},
    "task": {"kind": "sequence_classification"},
    "data": {"source": {"kind": "hub", "name": "some/data", "validation": "test"}},
}
WHOLE = yaml.safe_load(write_config(Config.model_validate(GOOD)))
KEYS = sorted({key for key, _, _ in known_keys()})


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """What might stand for a key of this type, and what might not."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return values(inner[0])
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(part) for part in inner])
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is list:
        return st.lists(values(inner[0]), max_size=2)
    if origin is dict:
        return st.dictionaries(words, junk, max_size=2)
    if issubclass(annotation, BaseModel):
        return st.deferred(lambda: tree(annotation))
    return {str: words, int: numbers, float: numbers, bool: st.booleans(), date: st.dates(), type(None): st.none()}[
        annotation
    ]


def tree(section: type[BaseModel]) -> st.SearchStrategy[Any]:
    """A section with some of its keys, right and wrong values for them, and now and then a key that is none."""
    each = {name: st.one_of(values(field.annotation), values(field.annotation), junk)
            for name, field in section.model_fields.items()}  # fmt: skip
    stray = st.dictionaries(words | st.sampled_from([key.rpartition(".")[2] for key in KEYS]), junk, max_size=1)
    return st.builds(lambda known, more: {**more, **known}, st.fixed_dictionaries({}, optional=each), stray)


def read(files: list[Path], overrides: list[str]) -> Config | None:
    """The configuration, or None where it is refused in the right form."""
    try:
        return read_config(files, overrides)
    except ConfigError as error:
        told(error)
        return None


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that each example writes anew."""
    return tmp_path_factory.mktemp("configs") / "any.yaml"


@given(tree(Config))
@budget(150)
def test_any_tree_of_known_keys(file: Path, content: Any):
    """R29: any tree made of the schema's own keys is read or refused in words."""
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    read([file], [])


@given(mutated(WHOLE))
@budget(150)
def test_a_whole_configuration_with_a_few_mistakes(file: Path, content: Any):
    """R29: a right configuration in which a few values are wrong; what is read can be written and read again."""
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    config = read([file], [])
    if config is not None:
        file.write_text(write_config(config), encoding="utf-8")
        assert read([file], []) == config


@given(st.binary(max_size=200) | st.binary(max_size=40).map(lambda b: yaml.safe_dump(WHOLE).encode() + b))
@budget(100)
def test_any_bytes(file: Path, content: bytes):
    """R29: any bytes, alone and behind a right configuration."""
    file.write_bytes(content)
    read([file], [])


@given(st.data())
@budget(100)
def test_any_bytes_in_a_right_file(file: Path, data: st.DataObject):
    """R29: a right file in which some bytes were changed."""
    content = bytearray(yaml.safe_dump(WHOLE).encode())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content))
    read([file], [])


@given(
    st.lists(st.tuples(st.sampled_from(KEYS) | words, st.sampled_from(["=", ""]), words | junk.map(str)), max_size=4)
)
@budget(150)
def test_any_override(file: Path, given_overrides: list[tuple[str, str, str]]):
    """R29: overrides of any key with any text."""
    file.write_text(yaml.safe_dump(GOOD), encoding="utf-8")
    read([file], ["".join(parts) for parts in given_overrides])


def test_many_mistakes_make_no_long_message(file: Path):
    """R29: thousands of unknown keys, and a word of a million characters, are counted and cut."""
    file.write_text("\n".join(f"k{n}: 1" for n in range(5000)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"\.yaml \+ 1 override: 5004 problems\n") as caught:
        read_config([file], ["x" * 1_000_000])
    assert told(caught.value).splitlines()[-1].endswith(" more")
