"""Reading and writing configurations: merging, overrides, plain YAML, and the way back."""

import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sft_jax.config.read import known_keys, parse_value, read_config, sections, write_config
from sft_jax.config.schema import Config
from sft_jax.config.section import Section

BASE = """\
model: {source: some/model}
task: {kind: sequence_classification}
data: {source: {kind: hub, name: some/data, validation: test}}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A file with nothing but what is needed."""
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path / "base.yaml"


def test_merging(base):
    """Files are merged key by key from left to right, lists are replaced whole, and overrides come last."""
    above = base.with_name("above.yaml")
    above.write_text("train: {batch_size: 8, freeze: [a]}\noptim: {lr: 1e-3}\n")
    top = base.with_name("top.yaml")
    top.write_text("train: {batch_size: 16, freeze: [b, c]}\n")
    config = read_config([base, above, top], ["train.epochs=5", "train.epochs=7"])
    assert (config.train.batch_size, config.train.freeze, config.train.epochs) == (16, ["b", "c"], 7)
    assert config.optim.lr == 1e-3 and config.model.source == "some/model"


def test_override_makes_sections(base):
    """An override may name a section that no file has, and may hold a whole section."""
    config = read_config([base], ["data.layout.kind=padded", "optim.schedule={kind: wsd, decay: 0.5}"])
    assert config.data.layout.kind == "padded" and config.optim.schedule.decay == 0.5


def test_one_seed(base):
    """`seed: 7` sets all three, and one of them can then be set apart, in a later file or an override."""
    above = base.with_name("above.yaml")
    above.write_text("seed: 7\n")
    apart = base.with_name("apart.yaml")
    apart.write_text("seed: {dropout: 9}\n")
    assert set(read_config([base, above]).seed.model_dump().values()) == {7}
    seed = read_config([base, above, apart], ["seed.data=8"]).seed
    assert (seed.init, seed.data, seed.dropout) == (7, 8, 9)
    seed = read_config([base], ["seed=5", "seed.init=6"]).seed
    assert (seed.init, seed.data, seed.dropout) == (6, 5, 5)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("3", 3),
        ("no", "no"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("null", None),
        ("", None),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("[a, 1]", ["a", 1]),
        ("'true'", "true"),
    ],
)
def test_plain_values(text, value):
    """Numbers and booleans are those of YAML 1.2: 2e-5 is a number and `no` is a word."""
    found = parse_value(text)
    assert found == value and type(found) is type(value)


def test_written_and_read_back(base, tmp_path):
    """A written configuration holds every key and is read back as the same."""
    config = read_config([base], ["optim.options={b1: 0.8}", "optim.groups=[{match: '**', lr_scale: 0.5}]"])
    written = tmp_path / "written.yaml"
    written.write_text(write_config(config), encoding="utf-8")
    assert read_config([written]) == config
    assert read_config([written], ["train.steps=3"]) != config


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8), max_size=4),
    st.from_regex(r"\A[\d.eE+-]+\Z"),
)
@settings(max_examples=150, deadline=None, database=None)
def test_any_text_comes_back(tmp_path_factory, labels, revision):
    """Texts stay texts when written and read, those that look like numbers and commit hashes such as 12e4 too."""
    content = {
        "model": {"source": "some/model", "revision": revision},
        "task": {"kind": "sequence_classification", "labels": ["1e5", "no", "null", "2", *labels]},
        "data": {"source": {"kind": "hub", "name": "some/data", "validation": "test"}},
    }
    config = Config.model_validate(content)
    file = tmp_path_factory.getbasetemp() / "any_text.yaml"
    file.write_text(write_config(config), encoding="utf-8")
    if "${" not in "".join(labels):
        assert read_config([file]) == config


def test_frozen(base):
    """A configuration cannot be changed once it is read."""
    with pytest.raises(ValidationError, match="frozen"):
        read_config([base]).train.batch_size = 8


def test_every_key_says_what_it_means():
    """Every key has a line of doc that ends in a full stop, and every section one of its own."""
    silent = [key for key, field, _ in known_keys() if not _is_discriminator(field) and not _says(field.description)]
    assert set(silent) <= {section for section, _ in sections()}, silent
    assert all(_says(section.__doc__) and section.__doc__ != Section.__doc__ for _, section in sections())


def test_keys_of_lists_are_known():
    """The keys of sections that stand in a list are among the known ones, without a number."""
    assert "optim.groups.match" in {key for key, _, _ in known_keys()}


def test_schema_names_every_key():
    """The JSON Schema for editors has every key, with its doc, and lets no other in."""
    schema = Config.model_json_schema()
    definitions = [schema, *schema["$defs"].values()]
    for definition in definitions:
        if "properties" in definition:
            assert definition["additionalProperties"] is False
    for _, field, section in known_keys():
        properties = next(d for d in definitions if d.get("title") == section.__name__)["properties"]
        name = next(name for name, f in section.model_fields.items() if f is field)
        assert field.description is None or properties[name]["description"] == field.description


def _says(text: str | None) -> bool:
    return bool(text) and text.strip().endswith(".")


def _is_discriminator(field: FieldInfo) -> bool:
    return len(typing.get_args(field.annotation)) == 1  # one choice: it tells the section apart
