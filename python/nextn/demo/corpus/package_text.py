"""A little plain English from outside: texts that the Python distribution ships under the PSF licence."""

import importlib
import inspect

SOURCES: dict[str, str] = {
    "textwrap": "PSF-2.0", "heapq": "PSF-2.0", "bisect": "PSF-2.0", "statistics": "PSF-2.0", "fractions": "PSF-2.0",
    "queue": "PSF-2.0", "shutil": "PSF-2.0", "calendar": "PSF-2.0", "string": "PSF-2.0", "random": "PSF-2.0",
}  # fmt: skip
"""Module -> licence of the docstrings taken from it."""


def paragraphs() -> list[str]:
    """The docstrings of the modules above and of their public functions, each at most 600 characters, in order."""
    texts: list[str] = []
    for module_name in SOURCES:
        module = importlib.import_module(module_name)
        members = [getattr(module, name) for name in sorted(getattr(module, "__all__", ()))]
        for thing in [module, *(member for member in members if inspect.isroutine(member))]:
            text = inspect.getdoc(thing)
            if text and text.isascii() and len(text) >= 40:
                texts.append(text[:600])
    return list(dict.fromkeys(texts))
