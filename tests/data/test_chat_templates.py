"""Chat templates: the text that `transformers` renders, and nothing else that a template may try."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from datetime import date

import pytest
from chats import CHATML, CONVERSATIONS, FAMILIES, TOOL, said, tokenizer_of, write_bytes_tokenizer

from sft_jax.data import chat
from sft_jax.data.templates import Refused, Request, View, render
from sft_jax.data.text import fingerprint, load_tokenizer, tokenizer_files
from sft_jax.errors import ModelError

TALK = [said("user", "hi"), said("assistant", "yo")]
WHOLE = Request(TALK, None, [View(2)])
RICH = """\
{% for m in messages if m.role == 'user' %}{{ loop.index }}{% endfor %}
{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ {'b': '<é&>', 'a': 1} | tojson(sort_keys=True) }}
{% generation %}{% set x = 1 %}{{ messages[-1].content }}{% endgeneration %}{{ x }}
{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}
{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}
  {% if tools is not none %}{{ tools | length }}{% else %}no tools{% endif %}
{{ eos_token }}{{ nothing }}{{ messages[0].reasoning_content }}{{ messages[0].thinking }}{{ 'a b'.split() | join('-') }}
"""
# What a template may try (the usual ways out of a sandbox, and ways to take time and memory), and what is said.
HOSTILE = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ ().__class__.__base__.__subclasses__() }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": "unsafe",
    "{{ lipsum.__globals__['os'].system('id') }}": "unsafe",
    "{{ raise_exception.__globals__['os'] }}": "unsafe",
    "{{ self._TemplateReference__context.environment.globals }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ messages[0].update({}) }}": "unsafe",
    "{{ '{0.__class__.__mro__}'.format(1)[0].x.y }}": "",
    "{{ 'a' * 10**9 }}": "MemoryError",
    "{{ [1] * 10**9 }}": "MemoryError",
    "{{ '%0999999999d' % 1 }}": "MemoryError",
    "{{ range(10**9) | list }}": "Range too big",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "takes it more than 2 s",
    "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}": "characters",
    "{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}": "MemoryError",
    "{{ messages | length ** 99999999999 }}{{ 7 ** (10 ** messages | length ** 9) }}": "",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "cannot be read",
    "{{ (2**100000000) | string }}": "cannot be read",
    "{% for %}": "cannot be read",
}


@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_transformers(family, kind, prompt, tmp_path):
    """C7: every family's template gives what `apply_chat_template` gives, or is refused where that refuses."""
    transformers = pytest.importorskip("transformers")
    ours = tokenizer_of(family, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    messages, tools = CONVERSATIONS[kind]
    request = Request(messages, tools, [View(len(messages), prompt)])
    ((found,),) = render({"default": str(ours.template)}, ours.special, [request], None)
    settings = {"tools": tools, "add_generation_prompt": prompt, "tokenize": False}
    if isinstance(found, Refused):
        with pytest.raises(Exception, match=found.why):
            theirs.apply_chat_template(messages, **settings)
    else:
        assert found == theirs.apply_chat_template(messages, **settings)


def test_globals_and_filters_are_those_of_transformers(tmp_path):
    """C7: tojson, generation, break, namespace, undefined names and reasoning fields render the same characters."""
    transformers = pytest.importorskip("transformers")
    ours = tokenizer_of("chatml", tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), chat_template=RICH)
    messages = [said("user", "<ü> 'quoted' \"twice\"\n", reasoning="why"), *TALK]
    ((found,),) = render({"default": RICH}, ours.special, [Request(messages, None, [View(3)])], None)
    assert found == theirs.apply_chat_template(messages, tokenize=False)
    assert isinstance(found, str) and "no tools" in found and "whywhy" in found


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_contained(template):
    """R34: what reaches out of the sandbox, or for all time and memory, is one line within 5 s of processor time."""
    begin = spent()
    try:
        found = render({"default": template}, {}, [WHOLE], None)
    except ModelError as error:
        assert str(error).startswith("chat template: ") and "\n" not in str(error) and HOSTILE[template] in str(error)
        assert str(error).endswith("; do not trust it, or give another one by task.template")
    else:
        assert HOSTILE[template] == "" and isinstance(found[0][0], Refused), f"rendered {str(found)[:200]}"
    assert 0 < spent() - begin < 5


def spent() -> float:
    """Processor time of this process and of its children that have ended, in seconds, however busy the machine is."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def test_memory_is_bounded():
    """R34: no process that renders a template holds 512 MB; told by a small process, since a child begins as large."""
    program = (
        "import json, resource, sys\n"
        "from sft_jax.data.templates import Request, View, render\n"
        "for template in json.loads(sys.argv[1]):\n"
        "    hi = Request([{'role': 'user', 'content': 'hi'}], None, [View(1)])\n"
        "    try: render({'default': template}, {}, [hi], None)\n"
        "    except Exception: pass\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    hungry = [template for template, said in HOSTILE.items() if "MemoryError" in said]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(hungry)], capture_output=True, text=True, check=True
    )
    assert len(hungry) == 4 and 10 << 10 < int(done.stdout) < 512 << 10, "KiB of the largest child"


def test_files_and_the_environment_are_out_of_reach(monkeypatch):
    """R34: even outside the sandbox there would be nothing to take: the process has no environment of ours."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    ((found,),) = render({"default": "{% include '/etc/passwd' %}"}, {}, [WHOLE], None)
    assert isinstance(found, Refused) and "loader" in found.why
    from sft_jax.data import templates

    monkeypatch.setattr(
        templates, "RENDERER", "import os, json; print('{}\\n' + json.dumps({'made': [[0, str(os.environ)]]}))"
    )
    ((names,),) = render({"default": ""}, {}, [WHOLE], None)
    assert isinstance(names, str)
    assert "HF_TOKEN" not in names and "HOME" not in names


def test_thousands_are_rendered_in_one_process(monkeypatch):
    """Conversations share one process, and come back in their order, those that are refused in their places."""
    from sft_jax.data import templates

    started = []
    real = templates.subprocess.run
    monkeypatch.setattr(templates.subprocess, "run", lambda *a, **k: started.append(1) or real(*a, **k))
    template = "{% if messages[0].content == 7 %}{{ raise_exception('seven') }}{% endif %}{{ messages[0].content }}"
    requests = [Request([said("user", number)], None, [View(1)]) for number in range(3000)]
    found = render({"default": template}, {}, requests, None)
    assert found == [[Refused("seven") if n == 7 else str(n)] for n in range(3000)] and len(started) == 1


def test_the_day_is_said_and_not_asked():
    """A template that asks for the day is refused without one, and gets the one that the configuration says."""
    template = "{{ strftime_now('%d %b %Y') }}"
    assert render({"default": template}, {}, [WHOLE], date(2026, 1, 2)) == [["02 Jan 2026"]]
    with pytest.raises(ModelError, match=r"strftime_now\), which would change from run to run; set task.today"):
        render({"default": template}, {}, [WHOLE], None)


def test_chance_is_not_left_to_chance():
    """A template that draws (jinja2's `random`) draws the same each time, or tokens would change from run to run."""
    template = "{% for i in range(20) %}{{ range(9) | random }}{% endfor %}"
    assert render({"default": template}, {}, [WHOLE], None) == render({"default": template}, {}, [WHOLE], None)
    twice = Request(TALK, None, [View(1), View(1)])
    ((first, second),) = render({"default": template}, {}, [twice], None)
    assert first == second, "two views of a conversation are not told apart by what was drawn"


def test_a_conversation_beyond_the_limits_is_refused_alone():
    """F10: what takes too long, too much memory or what is unsafe costs a conversation; those after it are rendered."""
    template = (
        "{% if messages[0].content == 1 %}{% for a in range(99999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
        "{% elif messages[0].content == 2 %}{{ messages.append(1) }}"
        "{% elif messages[0].content == 3 %}{{ 'a' * 10**9 }}{% endif %}{{ messages[0].content }}"
    )
    requests = [Request([said("user", number)], None, [View(1)]) for number in range(8)]
    found = [one for (one,) in render({"default": template}, {}, requests, None)]
    assert [one for one in found if isinstance(one, str)] == ["0", *"4567"]
    reasons = [one.why for one in found if isinstance(one, Refused) and one.limit]
    assert [word in why for word, why in zip(("more than 2 s", "unsafe", "MemoryError"), reasons, strict=True)] == [
        True
    ] * 3
    with pytest.raises(ModelError, match="more than 2 s; do not trust it"):
        render({"default": template}, {}, requests[1:2], None)


def test_texts_are_told_by_what_they_share():
    """F10: views of a conversation come back whole, however little of each is sent."""
    talk = [said("user", "a" * n) for n in range(5)]
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ tools }}{{ word }}{{ add_generation_prompt }}"
    views = [View(3), View(5), View(2, asks=True), View(2, changed={1: said("user", "é")}), View(1, without="word")]
    (found,) = render({"default": template}, {}, [Request(talk, [{"b": 1}], views, {"word": "W"})], None)
    end = "[{'b': 1}]W"
    assert found[:2] == [f"<><a><aa>{end}False", f"<><a><aa><aaa><aaaa>{end}False"]
    assert found[2:] == [f"<><a>{end}True", f"<><é>{end}False", "<>[{'b': 1}]False"]


@pytest.mark.parametrize("files", [False, True], ids=["list", "files"])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
def test_named_templates_are_taken_as_transformers_takes_them(files, tools, tmp_path):
    """F3, G: `tool_use` where there are tools, from a list in the settings or from files, and all of them exported."""
    transformers = pytest.importorskip("transformers")
    write_bytes_tokenizer(tmp_path)
    texts = {"default": CHATML.replace("Tools: ", "Lost: "), "tool_use": CHATML, "rag": "{{ messages | length }}"}
    if files:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "chat_template.jinja").write_text(texts["default"])
        for name in ("tool_use", "rag"):
            (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(texts[name])
    else:
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        listed = [{"name": name, "template": text} for name, text in texts.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": listed}))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    (text,) = chat.prompts(ours, [chat.Conversation(TALK[:1], tools)], None)
    assert text == theirs.apply_chat_template(TALK[:1], tools=tools, add_generation_prompt=True, tokenize=False)
    assert ("Tools: " in text) == bool(tools) and "Lost" not in text and set(ours.named) == {"tool_use", "rag"}
    written = tokenizer_files(tmp_path)
    for name, content in written.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert load_tokenizer(tmp_path / "copy").named == ours.named
    assert fingerprint(written) == fingerprint(tokenizer_files(tmp_path / "copy"))
    if files:
        (tmp_path / "copy/additional_chat_templates/tool_use.jinja").write_text("another")
        assert fingerprint(written) != fingerprint(tokenizer_files(tmp_path / "copy")), "a template is what is read"


def test_names_without_a_default_say_so(tmp_path):
    """F3: templates by name alone are refused as `transformers` refuses them, with the names."""
    ours = replace(write_bytes_tokenizer(tmp_path), named={"rag": "a", "tool_use": CHATML})
    with pytest.raises(
        ModelError, match=r"templates by name \(rag, tool_use\) and none that is the default; name a file"
    ):
        chat.passages(ours, [chat.Conversation(TALK)], "answers", None)
    assert len(chat.passages(ours, [chat.Conversation(TALK, [TOOL])], "answers", None).passages) == 1
