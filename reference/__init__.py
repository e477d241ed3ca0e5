"""The reference trainer: a compact multi-reward trainer for SD3-class models, and a small world to run it in."""

__version__ = "0.1.0"  # that of marble_core: both are released together
