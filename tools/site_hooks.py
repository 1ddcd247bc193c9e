"""For the documentation site, called by MkDocs: links that leave docs/ become names of files, formulas MathML."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from site_docstrings import formula

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")


def _fence(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="formula">{formula(source)}</div>'


SECTIONS = {
    "tutorial": "Start",
    "how-to": "How to",
    "methods": "Methods",
    "results": "Measured",
    "explanation": "Explanation",
    "reference": "Reference",
}
"""Folder of docs/ -> section of the navigation that takes its pages, if mkdocs.yml puts them nowhere else."""


def on_config(config: Any) -> Any:
    """Blocks of ``math`` are formulas, as in the repository's own view of the pages; new pages join their section."""
    listed = set(re.findall(r"[\w./-]+\.md", str(config["nav"])))
    sections = {name: pages for section in config["nav"] for name, pages in section.items()}
    root = Path(config["docs_dir"])
    for folder, section in SECTIONS.items():
        found = sorted(path.relative_to(root).as_posix() for path in (root / folder).glob("*.md"))
        sections[section] += [page for page in found if page not in listed]
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "formula", "format": _fence})
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a file of the repository that is no page names the file instead."""
    folder = posixpath.dirname(page.file.src_uri)

    def outside(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        if not target.startswith(".."):
            return found[0]
        name = target.removeprefix("../").rstrip("/")
        return found[1] if name in found[1] else f"{found[1]}: `{name}`"

    return _LINK.sub(outside, markdown)
