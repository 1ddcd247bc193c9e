"""For the documentation site: the few reStructuredText marks of our docstrings as Markdown, formulas as MathML."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

_FORMULA = re.compile(r"^( *)\.\. math:: *(.*(?:\n\1 +.*)*(?:\n\n\1 {3,}.*(?:\n\1 {3,}.*)*)?)$", re.MULTILINE)


def formula(latex: str, display: str = "block") -> str:
    """A formula as MathML, which browsers draw without a script."""
    found: str = convert(latex.replace("\\!", ""), display=display)
    return re.sub(r">\\(\w+|[{}])<", r">\1<", found)  # names that the converter leaves as they are, such as \arg


def as_markdown(text: str) -> str:
    """Roles as links or code, formulas as MathML, and the double colon before code as a single one."""

    def block(found: re.Match[str]) -> str:
        body = " ".join(textwrap.dedent(found[2]).split())
        return f'{found[1]}<div class="formula">{formula(body)}</div>'

    def role(found: re.Match[str]) -> str:
        kind, name = found[1], found[2]
        if kind == "math":
            return formula(name, "inline")
        path = name.removeprefix("~")
        shown = path.rpartition(".")[2]
        if not path.startswith("attrib_zoo."):
            return f"`{shown}`"
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    text = _FORMULA.sub(block, text)
    text = re.sub(r":(\w+):`([^`]*)`", role, text)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)  # the name that griffe knows
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


class Markdown(Extension):
    """Turns every docstring that is shown into Markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
