"""YAML files and `key.path=value` overrides in, a `Config` out; every problem in one message.

Files are merged left to right, then the overrides. Only plain YAML is read: no tags, no aliases, nothing taken from
the environment. Never imports jax, so that `config check` answers at once.
"""

import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sft_jax import assets, names
from sft_jax.config.schema import Config, Seeds
from sft_jax.config.section import Section
from sft_jax.errors import ConfigError, did_you_mean, listing, reason
from sft_jax.gguf import is_gguf

MAX_BYTES = 1 << 20
MOST_EXPLAINED = 50  # problems of one message; the rest is counted
# An access token of the hub, or the password in an address: what is in a configuration is in every run directory.
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}|://[^\s/:@]+:[^\s/]+@")
Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers and booleans as YAML 1.2 does, and refuses aliases and duplicate keys."""

    # YAML 1.1 takes 2e-5 for text, `no` for false and 1:30 for ninety; people mean a number and two words.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":bool", ":int", ":float"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not read; write it out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                mark = node.value[position][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"'{key}' stands twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


class _Texts(_Loader):
    """The same for lists of texts: every value is one, as it is written."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes a text such as "1e5", which `_Loader` would take for a number."""


for _tag, _pattern in dict.fromkeys(pair for pairs in _Loader.yaml_implicit_resolvers.values() for pair in pairs):
    _Dumper.add_implicit_resolver(_tag, _pattern, None)


def read_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """The configuration of these files and overrides; raises one ConfigError that lists every problem."""
    where = " + ".join(str(f) for f in files) or "no file"
    if overrides:
        where += f" + {len(overrides)} override" + ("s" if len(overrides) > 1 else "")
    tree: Tree = {}
    problems: list[str] = []
    for file in files:
        tree = _merged(tree, _one_seed(_read_file(Path(file))))
    for override in overrides:
        tree = _one_seed(tree)
        problem = _override(tree, override)
        problems += [problem] if problem else []
    secrets = list(_secrets(tree))
    if secrets:  # alone, since the other complaints quote values
        raise ConfigError(listing(where, secrets))
    problems += [*_variables(tree), *_missing_files(tree)]
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        explained, more = _explain(error, tree)
        raise ConfigError(listing(where, problems + explained, more)) from None
    if problems:
        raise ConfigError(listing(where, problems))
    return config


def read_settings(section: type[Section], where: str, words: Sequence[str]) -> Tree:
    """What `key=value` words say of the keys of one section; each is checked by itself, all problems in one message."""
    found: Tree = {}
    problems = [problem for word in words if (problem := _override(found, word, section))]
    for key, value in found.items():
        if key not in section.model_fields:
            known = ", ".join(section.model_fields)
            problems.append(f"{key}: no such setting{did_you_mean(key, section.model_fields)} (known: {known})")
            continue
        try:
            section.model_validate({key: value})
        except ValidationError as error:
            problems += [f"{key}: {details['msg']}" for details in error.errors() if details["loc"][:1] == (key,)]
    if problems:
        raise ConfigError(listing(where, problems))
    return found


def write_config(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `read_config` takes back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_value(text: str) -> Any:
    """One YAML value, as on the right of an override."""
    return yaml.load(text, _Loader)


def known_keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo, type]]:
    """Every key in dotted form with its field and the section that owns it, in the order of the schema.

    Keys of the sections in a list carry no number: `optim.groups.match`.
    """
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}", field, section
        for inner in sections_of(field.annotation):
            yield from known_keys(inner, f"{prefix}{name}.")


def sections() -> Iterator[tuple[str, type[Section]]]:
    """Every section with its dotted name, the root (named '') first."""
    yield "", Config
    for key, field, _ in known_keys():
        for section in sections_of(field.annotation):
            yield key, section


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that may stand where a field is so annotated: one, the kinds of a union, or that of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    several = typing.get_origin(annotation) in (typing.Union, types.UnionType, list)
    return [s for a in typing.get_args(annotation) for s in sections_of(a)] if several else []


def _read_file(file: Path) -> Tree:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{file}: {len(raw)} bytes; a configuration has at most {MAX_BYTES}")
    try:
        tree = yaml.load(raw.decode("utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{file}{line}: not plain YAML: {reason(problem)}; mend it") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deep; a configuration has a few levels") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: holds a {type(tree).__name__}; expected `section:` with keys below it")
    return tree


def _merged(below: Tree, above: Tree) -> Tree:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _one_seed(tree: Tree) -> Tree:
    """`seed: 7` written out, so that what is merged over one of the three seeds leaves the others at 7."""
    seed = tree.get("seed")
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    return {**tree, "seed": dict.fromkeys(Seeds.model_fields, seed)} if whole else tree


def _override(tree: Tree, text: str, root: type[Section] = Config) -> str | None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        return f"override '{text}': expected key.path=value"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"override {text!r}: holds bytes that are no UTF-8; write it in UTF-8"
    node, parts = tree, key.strip().split(".")
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    try:
        node[parts[-1]] = _value(value, _kinds_of_value(parts, tree, root))
    except (yaml.YAMLError, RecursionError):
        return f"override '{text}': the value is not plain YAML; quote it"
    return None


def _value(text: str, kinds: set[Any]) -> Any:
    """What is given to a setting of these types: a text as it is written, anything else as YAML.

    A text in quotes is what stands in them. A list of texts is written as YAML has it, `[a, b]`.
    """
    if str not in kinds and list not in kinds:
        return parse_value(text)
    try:
        found = yaml.load(text, _Texts if list in kinds else _Loader)
        if list in kinds and not isinstance(found, list):
            found = parse_value(text)
    except (yaml.YAMLError, RecursionError):
        if str in kinds:
            return text
        raise
    if str not in kinds:
        return found
    quoted = isinstance(found, str) and text.strip()[:1] in ("'", '"')
    listed = isinstance(found, list) and list in kinds and not Path(text).exists()
    # A number where a text is meant is the text: a commit such as 1234567.
    other = type(found) in kinds - {str, list} and not isinstance(found, list)
    return found if quoted or listed or other else text


def _kinds_of_value(parts: Sequence[str], tree: Tree, root: type[Section]) -> set[Any]:
    """The types that a setting may have: `str` also for words of a choice, `list` only for lists of texts."""
    owners = _owners(parts, tree, root)
    found = [section.model_fields[parts[-1]].annotation for section in owners if parts[-1] in section.model_fields]
    if not found and len(parts) > 1:  # a key of what has keys of its own, such as `optim.options.b2`
        above = _owners(parts[:-1], tree, root)
        given = [section.model_fields[parts[-2]].annotation for section in above if parts[-2] in section.model_fields]
        found = [typing.get_args(a)[1] for one in given for a in _parts_of(one) if typing.get_origin(a) is dict]
    kinds: set[Any] = set()
    for part in [part for annotation in found for part in _parts_of(annotation)]:
        origin, inner = typing.get_origin(part), typing.get_args(part)
        if origin is typing.Literal:
            kinds |= {type(choice) for choice in inner}
        elif origin is list:
            kinds |= {list} if {str} == {*_parts_of(inner[0])} else {tuple}
        elif origin is dict or sections_of(part):
            kinds.add(dict)
        else:
            kinds.add(part)
    return kinds


def _parts_of(annotation: Any) -> Iterator[Any]:
    """The types of a union, each without what is annotated to it."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _parts_of(inner[0])
    elif origin in (typing.Union, types.UnionType):
        for part in inner:
            yield from _parts_of(part)
    else:
        yield annotation


def _variables(tree: Tree) -> Iterator[str]:
    for path, text in _texts(tree):
        if "${" in text:
            yield f"{path}: '${{...}}' is not expanded; write the value, or give it as an override"


def _secrets(tree: Tree) -> Iterator[str]:
    for path, text in _texts(tree):
        if SECRET.search(text):
            yield f"{path}: holds what looks like a token or a password; give it in the environment (HF_TOKEN) instead"


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree with its dotted key."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(value, f"{path}.{_key(str(key))}" if path else _key(str(key)))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, f"{path}.{index}")
    elif isinstance(node, str):
        yield path, node


def _explain(error: ValidationError, tree: Tree) -> tuple[list[str], int]:
    """One line a key: several complaints about one value (the branches of a union) are one problem; how many more."""
    found: dict[str, list[str]] = {}
    for details in error.errors():
        parts = _path(details, tree)
        path = ".".join(map(_key, parts))
        said = found.setdefault(path, [])
        if len(found) <= MOST_EXPLAINED:
            said.append(_complaint(details, parts, tree))
    lines = [f"{path}: {_either(said)}" if path else said[0] for path, said in found.items() if said]
    return lines, len(found) - len(lines)


def _key(text: str) -> str:
    """A key as it is shown: quoted where it is no word."""
    return text if re.fullmatch(r"\S+", text) else repr(text)


def _either(complaints: Sequence[str]) -> str:
    """`expected A or B, got x` from what each branch of a union says."""
    if len(complaints) == 1:
        return complaints[0]
    wanted = [text.split(", got ")[0].removeprefix("expected ") for text in complaints]
    return f"expected {' or '.join(dict.fromkeys(wanted))}, got {complaints[-1].split(', got ')[-1]}"


def _path(details: ErrorDetails, tree: Tree) -> list[str]:
    """The keys down to a complaint, without the names of union branches that pydantic puts in."""
    node: Any = tree
    location = details["loc"]
    parts: list[str] = []
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(node, dict) and (part in node or (last and details["type"] in ("missing", "invalid_key"))):
            parts.append(str(part))
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            parts.append(str(part))
            node = node[part]
    return parts


def _complaint(details: ErrorDetails, path: Sequence[str], tree: Tree) -> str:
    kind, given, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, tree)
    if kind == "missing":
        fields = (section.model_fields.get(path[-1]) for section in _owners(path, tree))
        doc = next((field.description for field in fields if field and field.description), None)
        return f"needed, but not given ({doc.rstrip('.')})" if doc else "needed, but not given"
    if kind == "literal_error":
        expected = context["expected"]
        words = re.findall(r"'([^']*)'", expected)
        meant = names.value(str(given), words) or str(given)
        return f"expected {expected}, got {given!r}{did_you_mean(meant, words)}"
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", context["expected_tags"])
        meant = (names.task(context["tag"]) if path == ["task"] else None) or names.value(context["tag"], tags)
        hint = did_you_mean(meant or context["tag"], tags)
        return f"kind: expected one of {', '.join(tags)}, got '{context['tag']}'{hint}"
    if kind == "union_tag_not_found":
        return "kind: needed, but not given; say which of the known kinds this is"
    if kind in ("model_type", "model_attributes_type"):
        return f"expected keys below it, got {given!r:.60}"
    if kind == "invalid_key":
        return "expected a word for a key; quote it"
    if kind == "value_error":
        return str(context["error"])
    message = details["msg"].removeprefix("Input should be ").split(",")[0]
    return f"expected {message}, got {given!r:.60}"


def _unknown_key(path: Sequence[str], tree: Tree) -> str:
    name = path[-1]
    owners, others = _owners(path, tree), _owners(path, {})
    siblings = {key for section in owners for key in section.model_fields}
    kinds = [kind for section in others if name in section.model_fields for kind in _kinds(section)]
    known = f" (known: {', '.join(sorted(siblings))})" if siblings else "; take it out"
    if kinds:
        own = " or ".join(f"'{kind}'" for section in owners for kind in _kinds(section))
        return f"unknown key; it belongs to {' and '.join(map(repr, kinds))}, not to {own}{known}"
    hint = names.setting(name) or did_you_mean(name, siblings)
    if not hint:
        elsewhere = {key.rpartition(".")[2]: key for key, _, _ in known_keys()}
        hint = did_you_mean(name, elsewhere)
        for short, full in elsewhere.items():
            hint = hint.replace(f"'{short}'", f"'{full}'")
    return f"unknown key{hint}{known}"


def _owners(path: Sequence[str], tree: Tree, root: type[Section] = Config) -> list[type[Section]]:
    """The sections that the last key of a path may stand in; where there are several kinds, those of the tree's."""
    found: list[type[Section]] = [root]
    node: Any = tree
    for part in path[:-1]:
        if part.isdigit() and not isinstance(node, dict):  # a place in a list
            node = node[int(part)] if isinstance(node, list) and int(part) < len(node) else None
        else:
            fields = [section.model_fields[part] for section in found if part in section.model_fields]
            found = list(dict.fromkeys(s for field in fields for s in sections_of(field.annotation)))
            node = node.get(part) if isinstance(node, dict) else None
        kind = node.get("kind") if isinstance(node, dict) else None
        found = [section for section in found if kind in _kinds(section)] or found
    return found


def _kinds(section: type[Section]) -> tuple[Any, ...]:
    """The kind that tells a section apart from others at the same key; nothing where there is but one section."""
    field = section.model_fields.get("kind")
    choices = typing.get_args(field.annotation) if field else ()
    return choices if len(choices) == 1 else ()


def _missing_files(tree: Tree) -> Iterator[str]:
    """Local files and directories that are named but not there: found before anything is started."""
    source = _at(tree, "model", "source")
    if isinstance(source, str):
        if source.startswith(assets.SCHEME):
            yield from _missing_asset("model.source", source)
        elif source.startswith((".", "/", "~")) and not ((p := Path(source).expanduser()).is_dir() or is_gguf(p)):
            yield f"model.source: no directory '{source}'; give a directory, a GGUF file, a hub name or an asset"
    yield from _missing_in(_at(tree, "data", "source"), "data.source")


def _missing_in(source: Any, where: str) -> Iterator[str]:
    kind, parts = _at(source, "kind"), _at(source, "parts")
    if kind == "mixture":
        for number, part in enumerate(parts if isinstance(parts, list) else []):
            yield from _missing_in(_at(part, "source"), f"{where}.parts.{number}.source")
    for split in ("train", "validation", "test") if kind == "files" else ():
        given = _at(source, split)
        for file in [given] if isinstance(given, str) else given if isinstance(given, list) else []:
            key = f"{where}.{split}"
            if str(file).startswith(assets.SCHEME):
                yield from _missing_asset(key, file)
            elif not Path(str(file)).expanduser().exists():
                yield f"{key}: no file '{file}' (looked in {Path.cwd()}); check the path"


def _at(node: Any, *keys: str) -> Any:
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _missing_asset(key: str, name: str) -> list[str]:
    try:
        assets.find(name)
    except ConfigError as error:
        return [f"{key}: {error}"]
    return []
