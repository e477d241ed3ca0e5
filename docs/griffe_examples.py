"""Lets the API pages show the docstrings' ``Example:`` sections as code."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Griffe knows ``Examples:``, with doctests; the docstrings have one example and say so."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rename the section before the docstring is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
