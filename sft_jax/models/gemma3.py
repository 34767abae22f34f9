"""Gemma 3 as far as it reads text: Gemma's file, with the names of other classes. Reference: `transformers.Gemma3`."""

from dataclasses import replace

from sft_jax.models import gemma

# Keys of `config.json` that are of what reads images.
OF_IMAGES = (
    "boi_token_index", "eoi_token_index", "image_size", "image_token_id", "image_token_index", "layer_norm_eps",
    "mm_tokens_per_image", "patch_size", "text_config", "vision_config",
)  # fmt: skip

FAMILY = replace(
    gemma.FAMILY,
    heads={"causal_lm": "ForCausalLM", "sequence_classification": "TextForSequenceClassification"},
    classes={"gemma3_text": "Gemma3"},
    unread=OF_IMAGES,
)
