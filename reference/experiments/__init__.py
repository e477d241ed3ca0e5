"""Experiments: several runs of the trainer and what they show together."""
