"""Rewards for images of real models, one file each: ``load(device, source)`` gives the reward of its file."""
