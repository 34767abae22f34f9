"""Fine-tune pretrained Hugging Face checkpoints with labelled data, in JAX.

The Python API is a few plain functions, the same that the command line calls: `read_config` of `sft_jax.config.read`,
`prepare`, `train`, `evaluate`, `export` and `open_run` of `sft_jax.run`, `load_predictor` of `sft_jax.infer.predict`.
"""

__version__ = "0.1.0"
