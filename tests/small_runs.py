"""What tests of whole runs share: compiled programs are kept, since most of these runs do not differ in them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

# One layer and one shape: the least to compile.
SMALL = {"num_hidden_layers": 1}
ONE_SHAPE = "data.layout.kind=padded"


def cache_environment(directory: Path) -> dict[str, str]:
    """The environment in which other processes keep their programs in this directory."""
    return {"JAX_COMPILATION_CACHE_DIR": str(directory), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@contextmanager
def programs_kept(directory: Path) -> Iterator[None]:
    """While this lasts, what is compiled is kept in a directory and read from there when it is needed again."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = tuple(getattr(jax.config, name) for name in names)
    _keep_in(dict(zip(names, (str(directory), 0), strict=True)))
    try:
        yield
    finally:
        _keep_in(dict(zip(names, before, strict=True)))


def _keep_in(settings: dict[str, Any]) -> None:
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
