"""What our docstrings have beyond Google's style, as Markdown: links of reStructuredText, ``Example:``."""

import re

import griffe

_LINK = re.compile(r"`([^`<]+?)\s+<(\S+?)>`_")
_HEADING = re.compile(r"^( *)Example:$", re.MULTILINE)
_MODULE_EXAMPLE = re.compile(r"^( *)Example::$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Griffe calls it with every object that it has found."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """A docstring with Markdown's links, and with sections that Griffe knows."""
    text = _LINK.sub(lambda link: f"[{' '.join(link[1].split())}]({link[2]})", text)
    text = _MODULE_EXAMPLE.sub(r"\1Example:", text)
    return _HEADING.sub(r"\1Examples:", text)
