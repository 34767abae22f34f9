"""Adapters around training: what they begin as, what is trained beside them, their merge, and PEFT's directories."""
