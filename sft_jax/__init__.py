"""Fine-tune pretrained Hugging Face checkpoints with labelled data, in JAX.

`read_config`, `prepare`, `train`, `evaluate`, `export` and `load_predictor` are the whole Python API; the command line
calls them and nothing else. They are imported when first used, so that `import sft_jax` is free.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_WHERE = {
    "read_config": "sft_jax.config.read",
    "prepare": "sft_jax.run",
    "train": "sft_jax.run",
    "evaluate": "sft_jax.run",
    "export": "sft_jax.run",
    "open_run": "sft_jax.run",
    "load_predictor": "sft_jax.infer.predict",
}
__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sft_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)
