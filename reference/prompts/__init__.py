"""Prompts: sources, files of the field, and made ones."""
