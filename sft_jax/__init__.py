"""Fine-tune pretrained Hugging Face checkpoints with labelled data, in JAX.

The Python API is a few plain functions, the same that the command line calls: `read_config` of `sft_jax.config.read`,
`prepare` and `open_run` of `sft_jax.run`, `train`, `evaluate` and `export` of `sft_jax.jobs`, and `load_predictor` of
`sft_jax.infer.predict`.
"""

__version__ = "0.1.0"
