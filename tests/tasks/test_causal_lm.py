"""Causal language models: rows of each format, what is counted, the audit, and the way to disk and back."""

import json
import math
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chats import CHATML, CONVERSATIONS, LLAMA3, TOOL, said, tokenizer_of, write_bytes_tokenizer, write_decoder
from datasets import Dataset

from sft_jax.config.tasks import CausalLM
from sft_jax.data import chat
from sft_jax.data.batch import Shape, collate, lay_out
from sft_jax.data.rows import Rows
from sft_jax.data.text import load_tokenizer
from sft_jax.errors import ConfigError, DataError, ModelError
from sft_jax.export import About, export_model
from sft_jax.models.family import build_model
from sft_jax.nn.heads import LazyLogits
from sft_jax.tasks.baselines import commonest_next
from sft_jax.tasks.task import Examples, Task, build_task, restore_task

WHERE = "data.source.train"
TEXTS = ["ab", "abc", "b"]
PROMPTS = {"prompt": ["ab ", "c ", "ab "], "completion": ["x", "yz", "xy"]}
V, E = 300, 4


def task_of(**settings) -> Task:
    """The task of a section."""
    return build_task(CausalLM(kind="causal_lm", **settings), {})


def rows_of(columns: dict[str, list]) -> Rows:
    """Rows of these columns."""
    return Rows(Dataset.from_dict(columns), WHERE)


def examples_of(task: Task, columns: dict[str, list], tokenizer, max_length: int = 99) -> Examples:
    """The documents of rows, with what they are of."""
    rows = rows_of(columns)
    (texts, bad), targets = task.read(rows), task.targets(rows)
    assert not bad and not targets.bad
    return Examples(task.encode(texts, targets.values, tokenizer, max_length), texts, targets.values)


@pytest.fixture
def plain(tmp_path):
    """A tokenizer of bytes without a template."""
    return write_bytes_tokenizer(tmp_path / "plain")


@pytest.fixture
def chatml(tmp_path):
    """A tokenizer of bytes with a template."""
    return tokenizer_of("chatml", tmp_path / "chatml")


def learned(examples: Examples, tokenizer) -> list[str]:
    """What is supervised of each document."""
    encoded = examples.encoded
    spans = [slice(*encoded.offsets[d : d + 2]) for d in range(len(encoded))]
    picked = [encoded.tokens["label"][s][encoded.tokens["token_weight"][s] > 0].tolist() for s in spans]
    return [tokenizer.fast.decode(ids, skip_special_tokens=False) for ids in picked]


def test_a_text_is_learned_whole(plain):
    """C4, C5: of a plain text all but its first token is learned, its end too; it has no target of its own."""
    examples = examples_of(task_of(), {"text": TEXTS}, plain)
    assert learned(examples, plain) == ["b<|endoftext|>", "bc<|endoftext|>", "<|endoftext|>"]
    assert set(examples.targets or ()) == {""}


def test_of_a_prompt_its_completion_is_learned(plain):
    """C4, C5: of a prompt with its completion the completion and the end are learned, or all with `loss_on: all`."""
    examples = examples_of(task_of(format="completion"), PROMPTS, plain)
    assert learned(examples, plain) == ["x<|endoftext|>", "yz<|endoftext|>", "xy<|endoftext|>"]
    whole = examples_of(task_of(format="completion", loss_on="all"), PROMPTS, plain)
    assert learned(whole, plain)[1] == " yz<|endoftext|>"


def test_of_a_conversation_its_answers_are_learned(chatml):
    """C4: a conversation is its prompt as text and its last answer as target; nulls and tools come from columns."""
    task = task_of(format="chat", tools="tools")
    columns = {"messages": [m for m, _ in CONVERSATIONS.values()], "tools": [t for _, t in CONVERSATIONS.values()]}
    rows = [json.dumps(messages) for messages in columns["messages"]]
    examples = examples_of(task, {"messages": rows, "tools": [json.dumps(t) for t in columns["tools"]]}, chatml, 999)
    assert learned(examples, chatml)[1] == "Hello!<|im_end|>Sure.<|im_end|>So long.<|im_end|>"
    assert json.loads((examples.targets or [])[1]) == said("assistant", "So long.")
    structs = examples_of(task_of(format="chat"), {"messages": columns["messages"][:3]}, chatml)
    assert learned(structs, chatml) == learned(examples, chatml)[:3]
    assert "weather" in learned(examples, chatml)[3] and "null" not in learned(examples, chatml)[3]


@pytest.mark.parametrize(
    ("format", "columns", "reasons"),
    [
        ("text", {"text": ["a", None, " "]}, {1: "no text", 2: "no text"}),
        ("completion", {"prompt": ["a", "b", None], "completion": ["c", "", "d"]}, {1: "no text", 2: "no text"}),
        (
            "chat",
            {"messages": ["[nonsense", "[]", json.dumps([said("user", "a")])]},
            {0: "no conversation", 1: "no conversation", 2: "no answer"},
        ),
    ],
)
def test_rows_that_cannot_be_used_are_told_apart(format, columns, reasons):
    """C4: a row without a text, a completion or an answer is named by its place, and what was expected is said."""
    task, rows = task_of(format=format), rows_of(columns)
    bad = task.read(rows)[1] | task.targets(rows).bad
    assert {row: found.reason for row, found in bad.items()} == reasons
    assert all(found.place == f"row {row + 1}" and "expected" in found.text for row, found in bad.items())


@pytest.mark.parametrize("format", ["text", "completion", "chat"])
def test_prediction_begins_as_training_does(format, tmp_path):
    """C7: without targets a row is the prompt as training has it, with one beginning, up to where the answer begins."""
    task, tokenizer = task_of(format=format), tokenizer_of("llama3", tmp_path, puts_begin=True)
    columns = {
        "text": {"text": TEXTS},
        "completion": PROMPTS,
        "chat": {"messages": [json.dumps(CONVERSATIONS[kind][0]) for kind in ("one turn", "system", "three turns")]},
    }[format]
    examples = examples_of(task, columns, tokenizer, 999)
    prompts = task.encode(examples.texts, None, tokenizer, 999)
    assert task.prompt is not None and len(prompts) == 3
    for row in range(3):
        whole, given = (
            e.tokens["input_ids"][slice(*e.offsets[row : row + 2])].tolist() for e in (examples.encoded, prompts)
        )
        assert whole[: len(given)] == given and given.count(tokenizer.id("bos_token")) == 1
        answers = tokenizer.fast.decode(whole[len(given) :], skip_special_tokens=False)
        assert learned(examples, tokenizer)[row].endswith(answers) and answers


def batch_of(task: Task, examples: Examples, shape: Shape, seed: int = 0) -> tuple[LazyLogits, dict[str, np.ndarray]]:
    """(random logits, the documents laid out)."""
    encoded = examples.encoded
    batch = collate(encoded, lay_out(encoded, np.arange(len(encoded)), shape), shape)
    draw = np.random.default_rng(seed)
    hidden, embedding = draw.normal(size=(*shape[:2], E)), draw.normal(size=(V, E))
    return LazyLogits(jnp.asarray(hidden, jnp.float32), jnp.asarray(embedding, jnp.float32)), batch


@pytest.mark.parametrize("shape", [Shape(4, 16, 1), Shape(2, 24, 3)], ids=str)
def test_counts_are_those_of_a_plain_loop(plain, shape):
    """C16, C1: loss, perplexity, accuracy and what is kept are those of each token in turn; filler is not counted."""
    task = task_of(format="completion", label_smoothing=0.1)
    examples = examples_of(task, PROMPTS, plain)
    logits, batch = batch_of(task, examples, shape)
    dense = np.asarray(logits.dense(), np.float64)
    logs = dense - np.log(np.exp(dense).sum(-1, keepdims=True))
    kept = np.zeros((3, 3))
    smooth = 0.0
    for r, t in np.argwhere((batch["token_weight"] > 0) & (batch["segment_ids"] > 0)):
        document = batch["index"][r, batch["segment_ids"][r, t] - 1]
        label = batch["label"][r, t]
        kept[document] += -logs[r, t, label], 1, logs[r, t].argmax() == label
        smooth += -0.9 * logs[r, t, label] - 0.1 * logs[r, t].mean()
    loss, tokens, right = kept.sum(axis=0)
    assert tokens == 2 + 3 + 3
    found = task.metrics(jax.jit(task.count)(logits, batch))
    expected = {
        "loss": smooth / tokens,
        "perplexity": math.exp(loss / tokens),
        "token_accuracy": right / tokens,
        "answer_accuracy": float((kept[:, 1] == kept[:, 2]).mean()),
    }
    assert found == pytest.approx(expected, rel=1e-5) and tuple(found) == task.metric_names
    assert float(task.loss(logits, batch).value) == pytest.approx(smooth / tokens, rel=1e-5)
    here = batch["index"] >= 0
    outputs = np.zeros((3, 3))
    outputs[batch["index"][here]] = np.asarray(task.keep(logits, batch))[here]
    np.testing.assert_allclose(outputs, kept, rtol=1e-4)


def test_right_answers_are_counted_whole(plain):
    """A model that says every token of some documents gets these, and perplexity stays finite however wrong it is."""
    task = task_of(format="completion")
    examples = examples_of(task, PROMPTS, plain)
    _, batch = batch_of(task, examples, Shape(3, 16, 1))
    hidden = jax.nn.one_hot(batch["label"], V)
    certain = task.metrics(task.count(LazyLogits(hidden, 1e4 * jnp.eye(V)), batch))
    assert certain == {"loss": 0.0, "perplexity": 1.0, "token_accuracy": 1.0, "answer_accuracy": 1.0}
    wrong = hidden.at[0].set(-hidden[0])
    found = task.metrics(task.count(LazyLogits(wrong, 1e4 * jnp.eye(V)), batch))
    assert found["answer_accuracy"] == pytest.approx(2 / 3) and math.isfinite(found["perplexity"])


def test_packed_loss_is_that_of_rows_apart(plain):
    """R17: the loss of packed documents is the sum of theirs alone, and groups weigh the tokens of their documents."""
    task = task_of(format="completion")
    examples = examples_of(task, PROMPTS, plain)
    table = np.random.default_rng(3).normal(size=(V, E)).astype(np.float32)

    def loss(shape: Shape, weight=None):
        _, batch = batch_of(task, examples, shape)
        if weight is not None:
            batch["weight"] = batch["weight"] * (batch["index"] == weight)
        logits = LazyLogits(jnp.asarray(table[batch["input_ids"] % V]), jnp.asarray(table))
        return task.loss(logits, batch)

    packed, apart = loss(Shape(1, 32, 4)), loss(Shape(3, 16, 1))
    assert float(packed.weight) == float(apart.weight) == 8
    assert float(packed.total) == pytest.approx(float(apart.total), rel=1e-5)
    each = [loss(Shape(1, 32, 4), weight=document) for document in range(3)]
    assert [float(one.weight) for one in each] == [2, 3, 3]
    assert sum(float(one.total) for one in each) == pytest.approx(float(packed.total), rel=1e-5)


def test_an_empty_batch_has_no_gradient(plain):
    """C9, C34: a batch of filler alone gives a loss of 0 and a gradient of 0, finite; so does R-Drop's divergence."""
    task = task_of(format="completion")
    logits, batch = batch_of(task, examples_of(task, PROMPTS, plain), Shape(3, 16, 1))
    empty = {name: np.zeros_like(values) for name, values in batch.items()}
    for function in (task.loss, lambda x, b: task.divergence(x, x, b)):
        value, gradient = jax.value_and_grad(lambda x, f=function: f(x, empty).value)(logits)
        assert value == 0 and not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_the_audit_shows_what_is_supervised(chatml):
    """C4: three rows in pieces, the shares, and where answers end; nothing is wrong with documents that are right."""
    task = task_of(format="chat")
    talks = [json.dumps([said("user", "a" * n), said("assistant", "yes" * n)]) for n in range(1, 8)]
    audit = task.audit(examples_of(task, {"messages": talks}, chatml, 140), chatml)
    assert audit is not None and audit.problems == [] and len(audit.rows) == 3
    assert audit.rows[0] == [
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        ("yes<|im_end|>", True),
    ]
    assert audit.facts["supervised"] == "91 of 252 tokens (36.1%) of 7 documents"
    assert audit.facts["stop"] == "7 of 7 answers end with <|im_end|>" and audit.facts["lost"] == "none"


def test_the_audit_fails_closed(chatml, tmp_path):
    """C5, C7: answers that never end with a stop token, or two beginnings, are problems with their remedies."""
    task = task_of(format="chat")
    talk = {"messages": [json.dumps([said("user", "a"), said("assistant", "yes" * 9)])]}
    cut = task.audit(examples_of(task, talk, chatml, 40), chatml)
    assert cut is not None and len(cut.problems) == 1
    assert cut.problems[0].endswith("every document is cut before its end: raise data.max_length")
    unknown = write_bytes_tokenizer(tmp_path / "u", CHATML, end="<|endoftext|>")
    found = task.audit(examples_of(task, talk, unknown, 999), unknown)
    assert found is not None and found.problems[0].startswith("no answer ends with a token that stops generation")
    assert found.problems[0].endswith("by task.template")
    twice = write_bytes_tokenizer(
        tmp_path / "t", "{{ bos_token }}" + LLAMA3, "<s>", "</s>", ("<|eot_id|>",), puts_begin=True
    )
    again = task.audit(examples_of(task, talk, twice, 999), twice)
    assert again is not None and again.problems == [
        "1 documents begin with <s> twice; take it out of the texts or the template"
    ]
    endless = write_bytes_tokenizer(tmp_path / "e", end=None)
    text = task_of()
    nameless = text.audit(examples_of(text, {"text": TEXTS}, endless), endless)
    assert nameless is not None and nameless.problems[0].endswith("name an eos_token in tokenizer_config.json")


def test_an_export_says_where_generation_stops(tmp_path):
    """C5: generation_config.json keeps what it says and gains the end of turn; another template goes along."""
    tokenizer = tokenizer_of("llama3", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 7}')
    talks = {"messages": [json.dumps(CONVERSATIONS[kind][0]) for kind in ("one turn", "tools")]}
    train = examples_of(task_of(format="chat"), talks, tokenizer).encoded
    found = task_of(format="chat").fit(train).files(tmp_path)
    stops = [tokenizer.fast.token_to_id(token) for token in ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")]
    assert json.loads(found["generation_config.json"]) == {"temperature": 0.6, "eos_token_id": sorted([7, *stops])}
    assert found.keys() == {"generation_config.json"}
    (tmp_path / "other.jinja").write_text(CHATML)
    other = task_of(format="chat", template=str(tmp_path / "other.jinja"))
    assert other.files(tmp_path)["chat_template.jinja"] == CHATML
    assert stops[0] in json.loads(other.files(tmp_path)["generation_config.json"])["eos_token_id"]
    text = json.loads(task_of().files(tmp_path)["generation_config.json"])
    assert text["eos_token_id"] == sorted([7, stops[0]]), "plain texts have no turns"
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"generation_config.json: cannot be read"):
        task_of().files(tmp_path)


def test_another_template_is_another_text(chatml, tmp_path):
    """C22: with the tokens in a cache, another template file gives other tokens; a missing file is one line."""
    from dataclasses import replace

    cached = replace(chatml, home=tmp_path / "cache")
    talk = {"messages": [json.dumps(CONVERSATIONS["one turn"][0])]}
    own = examples_of(task_of(format="chat"), talk, cached).encoded
    (tmp_path / "other.jinja").write_text(CHATML.replace("m.role + '\n'", "m.role + '  '"))
    other = examples_of(task_of(format="chat", template=str(tmp_path / "other.jinja")), talk, cached).encoded
    again = examples_of(task_of(format="chat"), talk, cached).encoded
    assert not np.array_equal(own.tokens["input_ids"], other.tokens["input_ids"])
    assert np.array_equal(own.tokens["input_ids"], again.tokens["input_ids"])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    with pytest.raises(ConfigError, match=r"task\.template: /nowhere cannot be read"):
        task_of(format="chat", template="/nowhere")


def test_the_section_comes_back():
    """What `config.json` says of the task makes it again; foreign models are told by their classes."""
    task = task_of(format="chat", messages="talk", tools="tools", today=date(2026, 1, 2), loss_on="last")
    again = restore_task(task.to_hf(), "here")
    assert again.to_hf() == task.to_hf() and again.columns == ("talk", "tools")
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel"):
        assert restore_task({"architectures": [name]}, "here").kind == "causal_lm"
    with pytest.raises(ModelError, match=r"config\.json: sft_jax_task; export the model again"):
        restore_task({"sft_jax_task": {"kind": "causal_lm", "format": "songs"}}, "here")


def test_reviews_and_records_read_well(plain, chatml):
    """What is shown of a row is what was to be said and how much of it was; a record is JSON of its loss."""
    task = task_of(format="completion")
    examples = examples_of(task, PROMPTS, plain)
    kept = np.array([[1.0, 2, 2], [6.0, 3, 1], [9e9, 3, 0]], np.float32)
    review = task.review(kept, examples)
    assert review.truth == ["x", "yz", "xy"] and review.right.tolist() == [True, False, False]
    assert review.predicted[1] == "1 of 3 tokens, perplexity 7.389" and review.loss.tolist()[:2] == [0.5, 2.0]
    records = task.decode(kept, examples)
    assert json.loads(json.dumps(records)) == records
    assert records[1] == {"loss": 2.0, "perplexity": 7.389056, "tokens": 3}
    chat = task_of(format="chat")
    talk = examples_of(chat, {"messages": [json.dumps(CONVERSATIONS["one turn"][0])]}, chatml)
    assert chat.review(kept[:1], talk).truth == ["Hello!"]


def test_a_record_is_that_of_a_row(chatml, tmp_path):
    """A row of several documents has one record of all of them, at its place."""
    task = task_of(format="chat")
    qwen = tokenizer_of("qwen3", tmp_path / "q")
    kinds = ("one turn", "thinking", "one turn")
    examples = examples_of(task, {"messages": [json.dumps(CONVERSATIONS[kind][0]) for kind in kinds]}, qwen, 999)
    assert examples.encoded.rows.tolist() == [0, 1, 1, 2]
    kept = np.array([[1.0, 1, 0], [2, 1, 0], [4, 2, 0], [5, 1, 0]], np.float32)
    assert [record["loss"] for record in task.decode(kept, examples)] == [1.0, 2.0, 5.0]
    assert task.review(kept, examples).rows is not None


def test_baselines_are_those_of_the_token_before():
    """What most often follows a token in training is said; after unknown ones, the commonest of all."""
    before, label = np.array([1, 1, 1, 2, 2]), np.array([5, 5, 6, 7, 7])
    test_before, test = np.array([1, 1, 2, 9]), np.array([5, 6, 7, 5])
    assert commonest_next(before, label, test_before, test) == 0.75
    assert commonest_next(before[:2], label[:2], test_before, test) == 0.5


def test_the_task_of_a_directory_knows_its_stops(tmp_path):
    """C5, F11: stops are what training answers end with, and an export says them, so that what is loaded has them."""
    tokenizer = tokenizer_of("phi3", tmp_path)
    talks = {"messages": [json.dumps(CONVERSATIONS["one turn"][0])]}
    task = task_of(format="chat").fit(examples_of(task_of(format="chat"), talks, tokenizer).encoded)
    (tmp_path / "generation_config.json").write_text(task.files(tmp_path)["generation_config.json"])
    named = [
        sorted(tokenizer.fast.id_to_token(number) for number in one.stops(read))
        for one, read in ((task, tokenizer), (task_of(format="chat"), load_tokenizer(Path(tmp_path))))
    ]
    assert named == [["<|endoftext|>", "<|end|>"]] * 2


@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
def test_an_export_has_all_templates_or_the_one_that_was_given(given, tmp_path):
    """G: every named template goes along, and `transformers` takes the same; one that was given stands for all."""
    transformers = pytest.importorskip("transformers")
    base = write_decoder(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("tools" + CHATML)
    (base / "chat_template.jinja").write_text("plain" + CHATML)
    (tmp_path / "other.jinja").write_text("other" + CHATML)
    task = task_of(format="chat", template=str(tmp_path / "other.jinja") if given else None)
    config = json.loads((base / "config.json").read_text())
    model = build_model(config, task.head, "tiny")
    params = {key: np.asarray(a) for key, a in model.template.initial(jax.random.key(0), model.template.keys).items()}
    export_model(tmp_path / "out", model, params, About(config, task, base, 64, ""))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    for tools, begin in ((None, "other" if given else "plain"), ([TOOL], "other" if given else "tools")):
        text = theirs.apply_chat_template([said("user", "a")], tools=tools, tokenize=False)
        talk = chat.Conversation([said("user", "a")], tools)
        (ours,) = chat.prompts(load_tokenizer(tmp_path / "out"), [talk], None)
        assert text.startswith(begin) and ours.startswith(text)


def test_what_counts_for_nothing_is_not_learned(chatml, plain):
    """F4, Q: an answer of weight 0 is read and not learned; weights of rows scale all they have, and 0 is lost."""
    talk = [said("user", "a"), said("assistant", "bad", weight=0), said("user", "c"), said("assistant", "good")]
    examples = examples_of(task_of(format="chat"), {"messages": [talk, talk]}, chatml, 999)
    assert learned(examples, chatml) == ["good<|im_end|>"] * 2
    text = chatml.fast.decode(examples.encoded.tokens["input_ids"].tolist(), skip_special_tokens=False)
    assert "assistant\nbad<|im_end|>" in text and "weight" not in text
    columns = {"messages": [talk, talk, talk[2:]], "counts": [0.5, 0, 1]}
    scaled = examples_of(task_of(format="chat", weight="counts"), columns, chatml, 999).encoded
    assert sorted(set(scaled.tokens["token_weight"].tolist())) == [0, 0.5, 1] and scaled.rows.tolist() == [0, 2]
    assert scaled.lost == {"all its answers weigh 0": 1} and scaled.lost_rows == {"all its answers weigh 0": [1]}
    for settings, given in (({}, {"text": TEXTS}), ({"format": "completion"}, PROMPTS)):
        found = examples_of(task_of(weight="counts", **settings), {**given, "counts": [2, 0, 1]}, plain)
        assert found.encoded.rows.tolist() == [0, 2] and found.encoded.tokens["token_weight"].max() == 2
        assert task_of(weight="counts", **settings).review(np.ones((2, 3)), found).truth[0] in ("ab", "x")


def test_an_unreadable_weight_is_a_bad_row():
    """F4, Q: a weight that is a text, negative or no number is named by its place, of a message and of a row."""
    talk = [said("user", "a"), said("assistant", "b", weight="0")]
    rows = rows_of({"messages": [json.dumps(talk)], "text": ["a"], "counts": [-1.0]})
    (bad,) = task_of(format="chat").targets(rows).bad.values()
    assert bad.place == "row 1" and bad.text.endswith("weight of message 2 is '0', expected a number from 0")
    (bad,) = task_of(weight="counts").targets(rows).bad.values()
    assert (bad.reason, bad.text) == ("unreadable weight", "counts is -1.0, expected a number from 0")
    with pytest.raises(ConfigError, match=r"task\.weight: .* has no column 'count'; did you mean 'counts'"):
        build_task(CausalLM(kind="causal_lm", weight="count"), {"train": rows})


FORMS = {
    "messages": ({"messages": [[said("user", "a"), said("assistant", "b")]]}, "chat, told by the columns messages"),
    "sharegpt": (
        {"conversations": [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]]},
        "chat, told by the columns conversations",
    ),
    "turns": (
        {"prompt": [[said("user", "a")]], "completion": [[said("assistant", "b")]]},
        "chat, told by the columns prompt, completion",
    ),
    "prompt of messages": (
        {"prompt": [[said("user", "a")]], "completion": ["b"]},
        "chat, told by the columns prompt, completion",
    ),
    "alpaca": ({"instruction": ["a"], "output": ["b"]}, "chat, told by the columns instruction, output"),
    "orca": ({"question": ["a"], "response": ["b"]}, "chat, told by the columns question, response"),
    "preference": (
        {"chosen": [[said("user", "a"), said("assistant", "b")]], "rejected": [[said("user", "a")]]},
        "chat, told by the columns chosen",
    ),
    "a last user": (
        {"messages": [[said("user", "a"), said("assistant", "b"), said("user", "c")]]},
        "chat, told by the columns messages",
    ),
    "parts": (
        {"messages": [json.dumps([said("user", [{"type": "text", "text": "a"}]), said("assistant", "b")])]},
        "chat, told by the columns messages",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_others_are_told_by_their_columns(form, chatml):
    """F4, F5 and formats of peers: rows in each form are the same conversation, and what was told is said."""
    columns, told = FORMS[form]
    task = build_task(CausalLM(kind="causal_lm"), {"train": rows_of(columns)})
    assert task.told == told
    examples = examples_of(task, columns, chatml)
    assert learned(examples, chatml) == ["b<|im_end|>"]
    whole = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    assert chatml.fast.decode(examples.encoded.ids()[0], skip_special_tokens=False) == whole
    again = restore_task(task.to_hf(), "here")
    asked, bad = again.read(rows_of({again.texts[0]: ["a"]}))
    assert not bad and again.prompt is not None and len(again.prompt(asked, chatml, 99)) == 1, "without other columns"


def test_a_whole_alpaca_row_is_a_conversation(chatml):
    """Alpaca's input, history and system stand in the text; with `format: completion`, the input too."""
    columns = {"instruction": ["Add."], "input": ["1 2"], "output": ["3"], "history": [[["a", "b"]]], "system": ["s"]}
    examples = examples_of(build_task(CausalLM(kind="causal_lm"), {"train": rows_of(columns)}), columns, chatml)
    messages = [said("system", "s"), said("user", "a"), said("assistant", "b"), said("user", "Add.\n1 2")]
    assert json.loads(examples.texts[0][0]) == messages and learned(examples, chatml) == ["b<|im_end|>3<|im_end|>"]
    plainly = CausalLM(kind="causal_lm", format="completion")
    found = examples_of(build_task(plainly, {"train": rows_of(columns)}), columns, chatml)
    assert found.texts[0] == ["Add.\n1 2\n"] and found.targets == ["3"]


def test_tools_are_taken_where_rows_have_them(chatml):
    """A tools column is used unless it is left out by name, and is not needed to ask the model."""
    messages, tools = CONVERSATIONS["tools"]
    columns = {"messages": [json.dumps(messages)], "tools": [json.dumps(tools)]}
    rows = rows_of(columns)
    for settings, there in (({}, True), ({"tools": "tools"}, True), ({"tools": ""}, False)):
        task = build_task(CausalLM(kind="causal_lm", **settings), {"train": rows})
        examples = examples_of(task, columns, chatml, 999)
        assert ("Tools: " in chatml.fast.decode(examples.encoded.ids()[0])) == there == ("tools" in task.columns)
        assert not task.read(rows_of({"messages": ["Hi"]}))[1]
    older = {"messages": columns["messages"], "functions": [json.dumps([tools[0]["function"]])]}
    task = build_task(CausalLM(kind="causal_lm"), {"train": rows_of(older)})
    assert json.loads(task.read(rows_of(older))[0][0][0])["tools"] == tools


def test_conversations_are_written_as_transformers_writes_them(tmp_path):
    """H, F2: null contents, nulls and numbers in arguments and schemas, and parts, as the reference renders them."""
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of("chatml", tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    function = {"name": "w", "arguments": {"city": None, "n": 2.5, "deep": [1, {"b": 2, "a": None}]}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    tools = [{"type": "function", "function": {"name": "w", "parameters": {"x": {"default": None}}}}]
    messages = [said("user", "a"), call, said("tool", "s"), said("assistant", "b")]
    columns = {"messages": [json.dumps(messages)], "tools": [json.dumps(tools)]}
    examples = examples_of(build_task(CausalLM(kind="causal_lm"), {"train": rows_of(columns)}), columns, tokenizer, 999)
    expected = reference.apply_chat_template(messages, tools=tools, tokenize=False)
    assert tokenizer.fast.decode(examples.encoded.ids()[0], skip_special_tokens=False) == expected.rstrip()


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"input_ids": [[1, 2, 3, 4]], "labels": [[-100, -100, 3, 4]]}, [0, 1, 1, 0]),
        ({"input_ids": [[1, 2, 3, 4]], "completion_mask": [[0, 1, 0, 1]]}, [1, 0, 1, 0]),
        ({"input_ids": [[1, 2, 3, 4]], "assistant_masks": [[0, 0, 0, 1]]}, [0, 0, 1, 0]),
        ({"input_ids": [[1, 2, 3, 4, 0]], "attention_mask": [[1, 1, 1, 1, 0]]}, [1, 1, 1, 0]),
    ],
)
def test_tokens_are_learned_as_they_are_given(columns, expected, plain):
    """Formats of peers: tokens by their numbers, with labels of -100 or a mask, are documents as they stand."""
    task = build_task(CausalLM(kind="causal_lm"), {"train": rows_of(columns)})
    encoded = examples_of(task, columns, plain).encoded
    assert task.told.startswith("tokens, told by the columns input_ids")
    assert encoded.ids() == [[1, 2, 3, 4]] and encoded.tokens["token_weight"].tolist() == expected
    assert encoded.tokens["label"].tolist() == [2, 3, 4, 0]


def test_tokens_that_are_none_are_refused(plain):
    """Formats of peers: labels that are other tokens, masks of another length, and tokens beyond the vocabulary."""
    for columns, why in (
        ({"input_ids": [[1, 2]], "labels": [[1, 3]]}, "labels has 3 where token 2 is 2, expected that or -100"),
        ({"input_ids": [[1, 2]], "loss_mask": [[1]]}, "loss_mask has 1 numbers, expected 2 as there are tokens"),
        ({"input_ids": [[-1]]}, "expected a list of the numbers of tokens"),
    ):
        task = build_task(CausalLM(kind="causal_lm"), {"train": rows_of(columns)})
        assert task.targets(rows_of(columns)).bad[0].text.endswith(why)
    beyond = {"input_ids": [[1, 9999]]}
    task = build_task(CausalLM(kind="causal_lm"), {"train": rows_of(beyond)})
    with pytest.raises(DataError, match=r"has a token 9999, the tokenizer of the model has 257 of them"):
        examples_of(task, beyond, plain)


def test_segments_are_learned_by_their_labels(plain):
    """Axolotl's segments: nothing is put around the text, and only what is labelled is learned."""
    columns = {"segments": [json.dumps([{"label": True, "text": "ab"}, {"label": False, "text": "cd"},
                                        {"label": True, "text": "e<|endoftext|>"}])]}  # fmt: skip
    task = build_task(CausalLM(kind="causal_lm"), {"train": rows_of(columns)})
    examples = examples_of(task, columns, plain)
    assert learned(examples, plain) == ["be<|endoftext|>"] and task.told == "segments, told by the columns segments"
    assert plain.fast.decode(examples.encoded.ids()[0], skip_special_tokens=False) == "abcde<|endoftext|>"
    assert task.asked(examples.texts, 0) == "abcde<|endoftext|>"


def test_what_a_template_does_not_read_is_said(chatml):
    """Q: keys of messages, tools and settings that the template never looks at are counted by name."""
    talk = [said("user", "a", foo=1, name="Ann"), said("assistant", "b", reasoning="c")]
    columns = {"messages": [json.dumps(talk), json.dumps([talk[0], said("assistant", "b")])]}
    columns["chat_template_kwargs"] = [json.dumps({"enable_thinking": False})] * 2
    task = build_task(CausalLM(kind="causal_lm"), {"train": rows_of(columns)})
    audit = task.audit(examples_of(task, columns, chatml), chatml)
    assert audit is not None
    said_so = {"foo (2 rows)", "name (2 rows)", "reasoning (1 rows)", "enable_thinking (2 rows)"}
    assert set(audit.facts["not read"].split(", ")) == said_so


def test_supervision_has_every_token_with_its_weight(chatml):
    """C4: what is saved of a document is its tokens in order, those with a weight being what is learned."""
    talk = [said("user", "a"), said("assistant", "é!", weight=0.5)]
    examples = examples_of(task_of(format="chat"), {"messages": [json.dumps(talk)]}, chatml)
    supervision = task_of(format="chat").supervision
    assert supervision is not None
    (tokens,) = supervision(examples.encoded, chatml)
    assert [token.id for token in tokens] == examples.encoded.ids()[0]
    counted = [token.id for token in tokens if token.weight == 0.5]
    assert chatml.fast.decode(counted, skip_special_tokens=False) == "é!<|im_end|>"
    assert {token.weight for token in tokens} == {0, 0.5}
