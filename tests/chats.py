"""Chat templates of seven families in our own short form, conversations for them, and tokenizers of bytes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from sft_jax.data.text import TextTokenizer, load_tokenizer
from sft_jax.models.family import Head, build_model
from sft_jax.weights.files import write_checkpoint
from sft_jax.weights.table import save

GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 1,
    "n_positions": 128,
    "initializer_range": 0.2,
    **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0),
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}

CHATML = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if loop.first and tools %}{{- 'Tools: ' + (tools | tojson) + '\n' }}{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if m.tool_calls %}{{- m.tool_calls[0].function | tojson }}{{- '<|eom_id|>' }}
{%- else %}{{- m.content | trim }}{{- '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
INST = """\
{%- if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}
{%- set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}{{- ' ' + m.content + ' ' + eos_token }}{% endif %}
{%- endfor %}
"""
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\n' + (m.content | trim) + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}
"""
PHI3 = """\
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{% else %}{{- eos_token }}{% endif %}
"""
QWEN3 = """\
{%- if tools %}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}
{%- endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""
ZEPHYR = """\
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}
{%- endfor %}
"""
# Templates of other habits, in our own short form: how turns end, and how answers are asked for.
HARMONY = """\
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}
{{- '<|start|>assistant to=' + m.tool_calls[0].function.name + '<|message|>' }}
{{- (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}
{%- elif m.role == 'assistant' %}
{%- if m.thinking and loop.last %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking }}
{{- '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}
"""
METHARME = """\
{%- for m in messages %}{{- '<|' + m.role + '|>' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% else %}{{- eos_token }}{% endif %}
"""
HANGING = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|turn|>' + ('<|bot|><|say|>' if m.role == 'assistant' else '<|' + m.role + '|>') + m.content }}
{{- '<|said|><|over|>' if m.role == 'assistant' else '<|over|>' }}
{%- endfor %}{{- '<|turn|><|bot|>' }}{% if add_generation_prompt %}{{- '<|say|>' }}{% endif %}
"""
FORCED = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
CLOSED = FORCED.replace(
    "{{- m.content or '' }}", "{{- ('<think></think>' if m.role == 'assistant' else '') + m.content }}"
)
MOVED = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{{- bos_token }}
{%- for m in messages if m.role != 'system' %}
{%- if m.role == 'user' %}{{- '[INST] ' + (system + '\n\n' if system and loop.last else '') + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}
"""
# Name -> (template, its special tokens: beginning, end, and those of turns).
FAMILIES: dict[str, tuple[str, str | None, str, tuple[str, ...]]] = {
    "chatml": (CHATML, None, "<|im_end|>", ("<|im_start|>",)),
    "llama3": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    ),
    "inst": (INST, "<s>", "</s>", ()),
    "gemma": (GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "phi3": (PHI3, None, "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "qwen3": (QWEN3, None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>")),
    "zephyr": (ZEPHYR, "<s>", "</s>", ()),
}


def said(role: str, content: str, **more) -> dict:
    """A message."""
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CONVERSATIONS: dict[str, tuple[list[dict], list[dict] | None]] = {
    "one turn": ([said("user", "Hi"), said("assistant", "Hello!")], None),
    "three turns": (
        [
            said("user", "Hi"),
            said("assistant", "Hello!"),
            said("user", "Again"),
            said("assistant", "Sure."),
            said("user", "Bye"),
            said("assistant", "So long."),
        ],
        None,
    ),
    "system": ([said("system", "Be kind."), said("user", "Hi"), said("assistant", "Hello!")], None),
    "tools": (
        [
            said("user", "Weather?"),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            said("tool", "sunny"),
            said("assistant", "It is sunny."),
        ],
        [TOOL],
    ),
    "thinking": (
        [
            said("user", "2+2?"),
            said("assistant", "4", reasoning_content="Add."),
            said("user", "3+3?"),
            said("assistant", "6", reasoning_content="Add again."),
        ],
        None,
    ),
}


def write_bytes_tokenizer(
    directory: Path,
    template: str | None = None,
    begin: str | None = None,
    end: str | None = "<|endoftext|>",
    special: Sequence[str] = (),
    merges: Sequence[tuple[str, str]] = (),
    *,
    puts_begin: bool = False,
    trims: bool = True,
) -> TextTokenizer:
    """A tokenizer of bytes with these merges and special tokens, as a directory; `puts_begin` before every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in (begin, end, *special) if token])
    trimming = processors.ByteLevel(trim_offsets=trims)
    tokenizer.post_processor = trimming
    if puts_begin and begin:
        number = tokenizer.token_to_id(begin)
        framing = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, number)]
        )
        tokenizer.post_processor = processors.Sequence([trimming, framing])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": begin, "eos_token": end, "chat_template": template}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **{k: v for k, v in named.items() if v}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory)


def tokenizer_of(family: str, directory: Path, **more) -> TextTokenizer:
    """The tokenizer of a family, its template included."""
    template, begin, end, special = FAMILIES[family]
    return write_bytes_tokenizer(directory, template, begin, end, special, **more)


def write_decoder(directory: Path, config: dict[str, Any] = GPT2, family: str = "chatml", seed: int = 0) -> Path:
    """A random decoder with a head on its vocabulary, and the tokenizer of a family of templates."""
    tokenizer = tokenizer_of(family, directory)
    end = {"eos_token_id": tokenizer.id("eos_token"), "bos_token_id": tokenizer.id("bos_token")}
    whole = {**config, **end, "vocab_size": tokenizer.fast.get_vocab_size()}
    model = build_model(whole, Head("causal_lm", 0), "tiny")
    params = model.template.initial(jax.random.key(seed), model.template.keys)
    write_checkpoint(directory, whole, save(model.table, {p: np.asarray(a) for p, a in params.items()}))
    return directory


def write_talks(file: Path, count: int, seed: int = 0) -> Path:
    """Conversations of one turn or two as JSON lines, whose answers can be learned: the word again, and a mark."""
    draw = np.random.default_rng(seed)
    with open(file, "w") as sink:
        for _ in range(count):
            messages: list[dict] = []
            for _ in range(int(draw.integers(1, 3))):
                word = "".join(draw.choice([*"abcd"], size=int(draw.integers(1, 6))))
                messages += [said("user", word), said("assistant", f"{word[0]}!")]
            first = {"prompt": messages[0]["content"] + ":", "completion": messages[1]["content"]}
            sink.write(json.dumps({"messages": messages, "text": " ".join(m["content"] for m in messages), **first}))
            sink.write("\n")
    return file
