"""What `accelerator.py` measures: models at their published sizes, rows for them, and the arithmetic that they need.

Both sides read what is made here, so neither is at home in it: `rows.jsonl` or `images.npz` and a model directory for
ours, the same tokens as `tokens.npz` for the peers. Weights are random. Imports numpy alone.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

Tree = dict[str, Any]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SAME_DROPOUT = 0.1


@dataclass(frozen=True)
class Job:
    """One comparison; `tiny` is what differs where it is only tried out."""

    name: str
    task: str  # "classify", "lm" or "image"
    config: Tree  # as `config.json` has it
    tiny: Tree
    documents: int = 2048
    longest: int = 512  # tokens of a document, and of a packed row
    typical: int = 60  # median tokens of a document
    batch: int = 128  # documents of a step, or packed rows of one where it is language
    pixels: int = 224
    trained: str = "all"  # "all", "adapter" or "head"
    remat: bool = False  # layers are computed again for their gradient
    peers: tuple[str, ...] = ("loop", "loop+compile")
    settings: tuple[str, ...] = ()  # of ours besides
    macs: float = 0.0  # multiplications of a forward pass over an image of 224 pixels, where layers do not say it
    steps: int = 1_000_000
    extra: Tree = field(default_factory=dict)

    def shrunk(self) -> "Job":
        """The same at a size that a CPU does in a second."""
        config = {**self.config, **self.tiny}
        rows = 8 if self.task != "lm" else 2
        longest = min(self.longest, 64)
        small = {"documents": 48, "longest": longest, "typical": 12, "batch": rows, "pixels": 32}
        return replace(self, config=config, **small)

    def slowed(self) -> "Job":
        """The same model in steps that a CPU does in seconds."""
        batch = {"classify": 32, "lm": 1, "image": 8}[self.task]
        return replace(self, batch=batch, documents=min(self.documents, 640 if self.task == "classify" else 64))

    def write(self, file: Path) -> None:
        """As JSON, for a process of its own."""
        file.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, file: str | Path) -> "Job":
        """What `write` wrote."""
        found = json.loads(Path(file).read_text())
        lists = {name: tuple(found[name]) for name in ("peers", "settings")}
        return cls(**{**found, **lists})


def llama(**sizes: int) -> Tree:
    """A Llama of these sizes, of the third generation."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_bias": False,
        "mlp_bias": False,
        **sizes,
    }


TINY_TEXT = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY_LLAMA = {**TINY_TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
BERT = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": SAME_DROPOUT,
    "attention_probs_dropout_prob": SAME_DROPOUT,
    "initializer_range": 0.02,
    "pad_token_id": 0,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "resid_pdrop": SAME_DROPOUT,
    "embd_pdrop": SAME_DROPOUT,
    "attn_pdrop": SAME_DROPOUT,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "bos_token_id": 3,
    "eos_token_id": 3,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}
TINY_VIT = {**TINY_TEXT, "num_attention_heads": 4, "image_size": 32}
RESNET = {
    "model_type": "resnet",
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
}
TINY_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
LORA = 'adapter={match: ["blocks/**/attn/{q,k,v,o}", "blocks/**/mlp/{gate,up,down}"], rank: 16, alpha: 32}'
ONE = llama(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
EIGHT = llama(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
LONG: Tree = {"documents": 512, "longest": 4096, "typical": 600, "batch": 2}
RESNET_MACS = 4.09e9
JOBS = {
    job.name: job
    for job in (
        Job(
            "bert-base",
            "classify",
            BERT,
            {**TINY_TEXT, "num_attention_heads": 4},
            longest=256,
            peers=("loop+compile", "trainer"),
        ),
        Job(
            "llama-1b",
            "lm",
            ONE,
            TINY_LLAMA,
            peers=("loop+compile", "loop+liger"),
            settings=("train.remat=dots",),
            **LONG,
        ),
        Job(
            "llama-8b-lora",
            "lm",
            EIGHT,
            TINY_LLAMA,
            trained="adapter",
            remat=True,
            peers=("loop+compile+liger",),
            settings=("train.remat=full",),
            **LONG,
        ),
        Job("vit-base", "image", VIT, TINY_VIT, documents=256, peers=("loop+compile",)),
        Job(
            "gpt2",
            "lm",
            GPT2,
            {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
            longest=1024,
            typical=200,
            batch=8,
            peers=("loop+compile", "loop+isolated"),
        ),
        Job("resnet-50", "image", RESNET, TINY_RESNET, documents=256, macs=RESNET_MACS, peers=("loop+compile",)),
        Job(
            "resnet-50-frozen",
            "image",
            RESNET,
            TINY_RESNET,
            documents=1024,
            macs=RESNET_MACS,
            trained="head",
            peers=("loop+compile",),
            settings=("train.freeze=[embed/**, stages/**]",),
        ),
    )
}


def lengths(job: Job) -> np.ndarray:
    """Tokens of each document, special ones counted: many short ones, a few long ones."""
    draw = np.random.default_rng(0)
    return np.clip(draw.lognormal(np.log(job.typical), 0.7, job.documents), 4, job.longest).astype(np.int64)


def make(job: Job, directory: Path) -> Path:
    """Write all that both sides read of a job."""
    directory.mkdir(parents=True)
    model = directory / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(job.config))
    job.write(directory / "job.json")
    if job.task == "image":
        make_images(job, directory)
    else:
        make_texts(job, directory)
    return directory


def make_images(job: Job, directory: Path) -> None:
    """Noise of the right size already."""
    draw = np.random.default_rng(1)
    shape = (job.documents, job.pixels, job.pixels, 3)
    images = draw.integers(0, 256, shape, dtype=np.uint8)
    np.savez(directory / "images.npz", image=images, label=np.arange(job.documents) % 10)
    square = {"height": job.pixels, "width": job.pixels}
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
        "resample": 2,
        "size": square,
    }
    (directory / "model" / "preprocessor_config.json").write_text(json.dumps(processor))


def make_texts(job: Job, directory: Path) -> None:
    """Rows of made-up words, a tokenizer that has one token for each, and the same as tokens."""
    draw, sizes = np.random.default_rng(1), lengths(job)
    words = min(job.config["vocab_size"], 30000) - len(SPECIAL)
    inner = draw.integers(0, words, int(sizes.sum()))
    around = 2 if job.task == "classify" else 1  # [CLS] and [SEP], or an end
    ids, rows = [], []
    for number, (end, size) in enumerate(zip(sizes.cumsum(), sizes, strict=True)):
        text = inner[end - size : end - around]
        ids.append(np.concatenate([[2] * (around - 1), text + len(SPECIAL), [3]]))
        rows.append({"text": " ".join(f"w{word}" for word in text), "label": number % 2})
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    np.savez(directory / "tokens.npz", ids=np.concatenate(ids), lengths=sizes, label=np.arange(len(sizes)) % 2)
    write_tokenizer(words, directory / "model", job.task == "classify")


def write_tokenizer(words: int, model: Path, classify: bool) -> None:
    """One token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if classify:
        special = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    tokenizer.save(str(model / "tokenizer.json"))
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))


def packed(sizes: np.ndarray, row: int) -> list[list[int]]:
    """The numbers of the documents of each row, put where they first fit."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number, size in enumerate(sizes.tolist()):
        place = next((n for n, left in enumerate(room) if left >= size), None)
        if place is None:
            rows.append([])
            room.append(row)
            place = len(rows) - 1
        rows[place].append(number)
        room[place] -= size
    return rows


def flops(job: Job, tokens: float, documents: float) -> float:
    """Operations that training on so much needs, whatever the way: recomputed ones and padding are not counted."""
    config = job.config
    if job.macs:
        forward = 2 * job.macs * (job.pixels / 224) ** 2 * documents
        return forward if job.trained == "head" else 3 * forward
    width = config.get("hidden_size") or config["n_embd"]
    layers = config.get("num_hidden_layers") or config["n_layer"]
    inner = config.get("intermediate_size") or 4 * width
    heads = config.get("num_attention_heads") or config["n_head"]
    size = config.get("head_dim") or width // heads
    keys = config.get("num_key_value_heads") or heads
    gated = 3 if config["model_type"] == "llama" else 2
    layer = width * size * (2 * heads + 2 * keys) + gated * width * inner
    vocabulary = width * config["vocab_size"] if job.task == "lm" else 0
    if job.task == "image":
        patches = (job.pixels // config["patch_size"]) ** 2 + 1
        tokens, mean = documents * patches, float(patches)
    else:
        sizes = lengths(job).astype(np.float64)
        mean = float((sizes**2).sum() / sizes.sum())  # tokens that a token stands beside
    seen = mean / 2 if job.task == "lm" else mean
    attention = 2 * seen * heads * size * layers
    passes = 2 if job.trained == "adapter" else 3  # the gradient of frozen kernels is not needed
    return 2 * tokens * (passes * (layer * layers + vocabulary) + 3 * attention)
