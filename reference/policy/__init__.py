"""The models: the base, adapters on it, Stable Diffusion 3, and how they are loaded and spread."""
