"""Adapters: small matrices beside the layers of a model, trained in its place."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sft_jax.config.section import Positive, Section


class AdapterSection(Section):
    """Matrices of low rank beside some layers; they and a new head are trained, and all else is frozen.

    There is no dropout of an adapter's own: what a layer takes has been dropped out of by the model already.
    """

    kind: Literal["lora", "dora"] = "lora"
    """`lora` adds a product of two thin matrices to a kernel; `dora` also learns the size of each of its columns."""
    match: Annotated[list[str], Field(min_length=1)] = ["**/attn/{q,v}"]
    """Patterns over paths of layers, such as `blocks/**/attn/{q,v}`; the head has no adapter, it is trained whole."""
    rank: Positive = 8
    """Rank of the product."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Factor on the product, before `scaling`."""
    scaling: Literal["rank", "root"] = "rank"
    """What alpha is divided by: the rank, or its root (rsLoRA), which keeps the size of updates at high ranks."""
    also: list[str] = []
    """Patterns of further parameters that are trained whole, such as `**/norm/**`."""
    base: Literal["same", "int8", "nf4"] = "same"
    """How the frozen kernels under adapters are held: in the type of the arithmetic, or quantised to 8 or 4 bits."""
    source: str | None = None
    """A directory of an adapter, of ours or of PEFT's, that training goes on from; null begins a new one."""

    @model_validator(mode="after")
    def _small_enough(self) -> Self:
        if self.rank > 1 << 16:
            raise ValueError(f"rank: {self.rank} is not low; give at most {1 << 16}")
        return self
