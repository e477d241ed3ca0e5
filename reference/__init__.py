"""The reference trainer: a compact multi-reward trainer for SD3-class models, and a small world to run it in."""
