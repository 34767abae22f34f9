"""Every knob of a run, as frozen pydantic models, and the reader that fills them. Never imports jax."""
