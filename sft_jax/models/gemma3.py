"""Gemma 3 as far as it reads text: Gemma's file, with the names of other classes. Reference: `transformers.Gemma3`."""

from dataclasses import replace

from sft_jax.models import gemma

FAMILY = replace(
    gemma.FAMILY,
    heads={"causal_lm": "ForCausalLM", "sequence_classification": "TextForSequenceClassification"},
    classes={"gemma3_text": "Gemma3"},
)
