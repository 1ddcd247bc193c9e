"""The pages of docs/reference, written from signatures and docstrings, so that they cannot drift from the code."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import attrib_zoo
from attrib_zoo.attribution import Attribution

WIDTH = 100

PAGES = {
    "methods": ("Methods", "methods", ""),
    "contract": (
        "What every method can do",
        "attribution methods.bases.trainable training.recipe training.history targets errors",
        "",
    ),
    "measures-and-pictures": ("Measures and pictures", "metrics visualize", ""),
    "benchmark": (
        "Methods times measures",
        "benchmark benchmark.runner benchmark.table benchmark.estimates benchmark.report benchmark.measures",
        "",
    ),
    "models-and-images": (
        "Models and images",
        "models models.load models.photos synthetic synthetic.scenes synthetic.networks",
        "",
    ),
    "backbone": (
        "Frozen models: layers, layouts, passes, masks",
        "backbone.layers backbone.layers.resolve backbone.grid backbone.layers.gridcheck backbone.capture "
        "backbone.replay backbone.kind backbone.module masking",
        "",
    ),
    "testing": ("The contract suite", "testing testing.suite", "testing"),
    "internals": ("Everything else", "", "*"),
}
"""Page -> title, the modules and packages it holds in full, and those of which it has a line for each name."""


def module_names() -> list[str]:
    """Every module of the package without an underscore in its name."""
    found = (
        info.name.removeprefix("attrib_zoo.") for info in pkgutil.walk_packages(attrib_zoo.__path__, "attrib_zoo.")
    )
    return sorted(name for name in found if not any(part.startswith("_") for part in name.split(".")))


def page_of(name: str) -> tuple[str, bool]:
    """Where a module is described, and whether in full; what is listed nowhere is an internal."""
    package = name.split(".", maxsplit=1)[0]
    for page, (_, full, _) in PAGES.items():
        if name in full.split():
            return page, True
    for page, (_, full, brief) in PAGES.items():
        if package in ("methods", "metrics") and package in full.split():
            return page, True
        if package in brief.split():
            return page, False
    return "internals", False


def pages() -> dict[str, str]:
    """Name -> text of each page."""
    return {page: render_page(page) for page in PAGES}


def symbols(module: ModuleType) -> Iterator[tuple[str, Any, str]]:
    """Name, value and documentation of what a module itself defines for others; constants by their documentation."""
    told = dict(_assigned(module))
    for name in _names_in_order(module):
        value = vars(module)[name]
        if name in told:
            yield name, None, told[name]
        elif getattr(value, "__module__", None) == module.__name__ and (inspect.isclass(value) or callable(value)):
            yield name, value, inspect.getdoc(value) or ""


def _names_in_order(module: ModuleType) -> list[str]:
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in dict.fromkeys(names) if not name.startswith("_") and name in vars(module)]


def _assigned(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Module constants and aliases, with the string below them or else their source."""
    body = ast.parse(inspect.getsource(module)).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        text = following.value if isinstance(following, ast.Expr) else None
        told = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name) and not target.id.startswith("_"):
                yield target.id, told or f"``{ast.unparse(node.value)}``"


# ---------------------------------------------------------------------- pages


def render_page(page: str) -> str:
    lines = [f"# {PAGES[page][0]}", "", f"{NOTE}{INTERNAL if page == 'internals' else ''}", ""]
    first = PAGES[page][1].split()
    for name in sorted(module_names(), key=lambda name: first.index(name) if name in first else len(first)):
        home, full = page_of(name)
        if home == page:
            lines += render_module(importlib.import_module(f"attrib_zoo.{name}"), brief=not full)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


NOTE = "<!-- Written from the docstrings by tests/reference_pages.py; edit those. -->"
INTERNAL = "\n\nFor those who work on the library. These names may change in any version."


def render_module(module: ModuleType, *, brief: bool) -> list[str]:
    own = list(symbols(module))
    again = _exports(module)
    if not own and not again and module.__name__.split(".")[-1] != "methods":
        return []
    lines = [f"## `{module.__name__}`", "", *_prose(inspect.getdoc(module) or "", brief=brief), ""]
    if again:
        lines += [f"Import from here: {', '.join(f'`{name}`' for name in again)}.", ""]
    for name, value, doc in own:
        lines += _brief(name, value, doc) if brief else _full(name, value, doc)
    return [*lines, ""]


def _exports(module: ModuleType) -> list[str]:
    """What a package's ``__init__`` offers from its modules."""
    if not hasattr(module, "__path__"):
        return []
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value) and _home(value).startswith(module.__name__ + ".")
    ]


def _home(value: Any) -> str:
    return getattr(value, "__module__", None) or ""


def _brief(name: str, value: Any, doc: str) -> list[str]:
    shown = name if not _is_routine(value) else f"{name}()"
    return _wrap(f"- `{shown}`: {' '.join(_markup(doc).split(chr(10) * 2)[0].split())}")


def _full(name: str, value: Any, doc: str) -> list[str]:
    if not (inspect.isclass(value) or _is_routine(value)):
        return [f"### `{name}`", "", *_prose(doc), ""]
    lines = [f"### `{name}`", ""]
    if inspect.isclass(value) and issubclass(value, BaseException):
        lines += [f"Base: `{value.__bases__[-1].__name__}`.", ""]
    else:
        lines += [*_signature(name, value), ""]
    lines += [*_prose(doc), ""]
    for member, item in vars(value).items() if inspect.isclass(value) else ():
        lines += _member(name, member, item)
    return lines


def _member(owner: str, name: str, item: Any) -> list[str]:
    if isinstance(item, (classmethod, staticmethod)):
        item = item.__func__
    doc = inspect.getdoc(item.fget if isinstance(item, property) else item)
    if name.startswith("_") or not doc or not isinstance(item, (property, Callable)) or inspect.isclass(item):
        return []
    if isinstance(item, property):
        return [f"#### `{owner}.{name}`", "", *_prose(doc), ""]
    return [f"#### `{owner}.{name}`", "", *_signature(name, item, skip_self=True), "", *_prose(doc), ""]


def _is_routine(value: Any) -> bool:
    return inspect.isfunction(value) or inspect.isroutine(value)


def _signature(name: str, value: Any, *, skip_self: bool = False) -> list[str]:
    try:
        signature = inspect.signature(value)
    except ValueError:  # a C-level constructor
        return []
    parameters = list(signature.parameters.values())
    if skip_self and parameters and parameters[0].name in ("self", "cls"):
        signature = signature.replace(parameters=parameters[1:])
    if inspect.isclass(value):
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    text = f"{name}{_unquoted(str(signature))}"
    if len(text) > WIDTH:
        shown, before = [], None
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and before not in (
                parameter.KEYWORD_ONLY,
                parameter.VAR_POSITIONAL,
            ):
                shown.append("*")
            shown.append(_unquoted(str(parameter)))
            before = parameter.kind
        returned = signature.return_annotation
        arrow = "" if returned is signature.empty else f" -> {returned}"
        text = f"{name}(\n" + "".join(f"    {part},\n" for part in shown) + f"){arrow}"
    return ["```text", text, "```"]


def _unquoted(text: str) -> str:
    """Annotations are strings; show them without their quotes."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


# ---------------------------------------------------------------------- docstrings to Markdown


def _prose(doc: str, *, brief: bool = False) -> list[str]:
    text = inspect.cleandoc(doc)
    if brief:
        return _wrap(" ".join(_markup(text).split("\n\n")[0].split()))
    lines: list[str] = []
    for section, body in _sections(text):
        if section:
            lines += [f"**{section}**", ""]
        lines += _entries(body) if section in ("Args", "Raises", "Attributes") else _body(body)
        lines.append("")
    return lines


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Google-style sections; the text before the first has no name."""
    heads = r"^(Args|Returns|Yields|Raises|Attributes|Example|References|Deviations):$"
    name, *rest = ["", *re.split(heads, text, flags=re.MULTILINE)]
    yield name, rest[0].strip("\n")
    for section, body in zip(rest[1::2], rest[2::2], strict=True):
        yield section, textwrap.dedent(body.strip("\n"))


def _entries(body: str) -> list[str]:
    lines: list[str] = []
    for entry in re.split(r"\n(?=\S)", body):
        name, _, said = " ".join(entry.split()).partition(": ")
        lines += _wrap(f"- `{name}`: {_markup(said)}")
    return lines


def _body(body: str) -> list[str]:
    if body.lstrip().startswith(">>>"):
        return ["```pycon", *body.splitlines(), "```"]
    lines: list[str] = []
    for paragraph in re.split(r"\n\n(?=\S)", body):
        if paragraph.startswith(".. math::"):
            formula = textwrap.dedent(paragraph.removeprefix(".. math::").strip(" \n"))
            lines += ["```math", *(line.strip() for line in formula.splitlines()), "```", ""]
            continue
        lines += [*_markup(paragraph).splitlines(), ""]
    return lines[:-1]


def _markup(text: str) -> str:
    """The few reStructuredText marks that the docstrings use."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    text = text.replace("``", "`")
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(
        text, 118, subsequent_indent="  " * text.startswith("- "), break_long_words=False, break_on_hyphens=False
    )


# ---------------------------------------------------------------------- the table of methods in the README


def methods_table() -> str:
    """One row per exported method, from its class attributes."""
    found = [c for c in vars(attrib_zoo).values() if inspect.isclass(c) and issubclass(c, Attribution)]
    rows = [
        f"| `{c.__name__}` | {c.paper} | {', '.join(c.models)} | {'yes' if c.needs_fit else 'no'} | {c.cost} |"
        for c in found
    ]
    return "\n".join(["| method | paper | models | `fit` first | cost per image |", "|---|---|---|---|---|", *rows])


def write(folder: Path) -> None:
    """Write all pages."""
    for page, text in pages().items():
        (folder / f"{page}.md").write_text(text, encoding="utf-8")
