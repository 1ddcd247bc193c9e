"""What the documentation says is true: its code runs, its commands parse, its links lead somewhere."""

import contextlib
import doctest
import importlib
import inspect
import io
import os
import pkgutil
import re
import runpy
import shlex
import socket
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import methods_page
import pytest

import attrib_zoo
from attrib_zoo import methods
from attrib_zoo.attribution import Attribution
from attrib_zoo.backbone.layers import RULES
from attrib_zoo.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
REFRESH = "ATTRIB_ZOO_REFRESH"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST_LINE = 120
NOT_DRAWN = {"ExtremalPerturbation": "800 passes forward and back for each area and photograph"}
"""Methods that the gallery names without a picture, and why."""


@dataclass
class Block:
    """A fenced block: its language, its text, the line it begins at, and the HTML comment just above it."""

    language: str
    text: str
    line: int
    comment: str


def blocks(text: str) -> list[Block]:
    found, inside, above = [], None, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if inside is None and line.startswith("```"):
            inside = Block(line.removeprefix("```").strip(), "", number, above)
        elif inside is not None and line == "```":
            found.append(inside)
            inside, above = None, ""
        elif inside is not None:
            inside.text += line + "\n"
        elif line.strip():
            above = line.strip()
    assert inside is None, f"line {inside.line}: the block never ends"
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(b.language in languages for b in blocks(page.read_text(encoding="utf-8")))]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder, no network, and no window for figures."""

    def refuse(*_, **__):
        raise OSError("the documentation must run offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(matplotlib, "rcParams", matplotlib.rcParams.copy())
    matplotlib.use("agg")
    return tmp_path


# ---------------------------------------------------------------------- Python


def run(text: str, where: str) -> None:
    """Run a page's Python blocks in one namespace; compare what they print with what ``<!-- output -->`` announces."""
    page = types.ModuleType("__main__")  # classes of the page can be pickled, as in a script
    own = sys.modules["__main__"]
    sys.modules["__main__"] = page
    try:
        _run(text, where, vars(page))
    finally:
        sys.modules["__main__"] = own


def _run(text: str, where: str, namespace: dict[str, object]) -> None:
    printed = ""
    for block in blocks(text):
        if block.language == "python":
            reason = re.fullmatch(r"<!-- not run: (\S.*) -->", block.comment)
            if reason is None:
                code = compile("\n" * block.line + block.text, where, "exec")
                with contextlib.redirect_stdout(io.StringIO()) as heard:
                    exec(code, namespace)
                printed = heard.getvalue()
        elif block.comment == "<!-- output -->":
            options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            agrees = doctest.OutputChecker().check_output(block.text, printed, options)
            assert agrees, f"{where}:{block.line}: the page says\n{block.text}\nthe code says\n{printed}"


def unread(text: str) -> list[int]:
    """The lines of blocks of output that are compared with nothing."""
    found, code = [], False
    for block in blocks(text):
        code = code or block.language == "python"
        if block.language in ("", "text", "console") and not (code and block.comment == "<!-- output -->"):
            found.append(block.line)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_output_is_compared(page):
    assert unread(page.read_text(encoding="utf-8")) == [], "put <!-- output --> above, or leave the block out"


def test_output_that_nobody_compares_is_found():
    code, said = "```python\n1\n```\n", "```text\nENERGY\n```\n"
    assert unread(code + said) == [4]
    assert unread(code + "<!-- output -->\n" + said) == []
    assert unread("<!-- output -->\n" + said) == [2]
    assert unread("```yaml\na: 1\n```\n") == []


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_python_blocks_run(page, workplace):
    text = page.read_text(encoding="utf-8")
    for needed in re.findall("^<!-- needs (\\w+) -->$", text, re.MULTILINE):
        pytest.importorskip(needed, reason=f"{name(page)} is about {needed}")
    run(text, name(page))


def test_blocks_share_a_page_and_their_output_counts(workplace):
    said = "```python\nx = 'a bc'\n```\n\n```python\nprint(x)\n```\n\n<!-- output -->\n```text\n{}\n```\n"
    run(said.format("a ..."), "page")
    with pytest.raises(AssertionError, match="page:10: the page says"):
        run(said.format("b"), "page")


def test_an_error_names_the_line_of_the_page(workplace):
    with pytest.raises(ZeroDivisionError) as caught:
        run("text\n\n```python\n1\n1 / 0\n```\n", "page")
    assert caught.traceback[-1].lineno + 1 == 5
    run("<!-- not run: it divides by zero -->\n```python\n1 / 0\n```\n", "page")
    with pytest.raises(ZeroDivisionError):
        run("<!-- not run: -->\n```python\n1 / 0\n```\n", "page")


def test_pages_run_offline(workplace):
    with pytest.raises(OSError, match="offline"):
        run("```python\nimport socket\nsocket.create_connection(('127.0.0.1', 9))\n```\n", "page")


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path, workplace, capsys):
    if path.stem == "lightning_callback":
        pytest.importorskip("lightning", reason="lightning is not installed")
        warnings.simplefilter("ignore")  # of lightning itself
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30


def source(module: str) -> str:
    return Path(importlib.import_module(module).__file__).read_text(encoding="utf-8")


EVERY = sorted(
    found.name
    for found in pkgutil.walk_packages(attrib_zoo.__path__, "attrib_zoo.")
    if not any(part.startswith("_") for part in found.name.split("."))
)


@pytest.mark.parametrize("module", [m for m in EVERY if re.search(r">>> .*(?<!SKIP)$", source(m), re.MULTILINE)])
def test_docstring_examples_run(module, workplace):
    failed, tried = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert tried
    assert not failed


# ---------------------------------------------------------------------- commands


def commands(text: str) -> list[str]:
    """The calls of attrib-zoo in a block of shell, lines joined and chains taken apart."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    parts = [part.strip() for line in lines for part in re.split(r"&&|\|\||;|\|", line)]
    return [part for part in parts if re.match(r"(\w+=\S+ )*(attrib-zoo|python -m attrib_zoo)\b", part)]


def parse(command: str) -> None:
    words = shlex.split(command, comments=True)
    start = words.index("attrib-zoo") if "attrib-zoo" in words else words.index("attrib_zoo")
    _parser().parse_args(words[start + 1 :])


def shell(page: Path) -> list[str]:
    return [c for b in blocks(page.read_text(encoding="utf-8")) if b.language == "bash" for c in commands(b.text)]


SHELL = [(name(page), command) for page in PAGES for command in shell(page)]


@pytest.mark.parametrize(("page", "command"), SHELL)
def test_commands_parse(page, command, workplace):
    """A YAML block that begins with ``# name`` is a file that the commands of its page may read."""
    for block in blocks((ROOT / page).read_text(encoding="utf-8")):
        if block.language == "yaml":
            Path(block.text.split()[1]).write_text(block.text)
    parse(command)


def test_wrong_commands_do_not_parse():
    text = "cd x && attrib-zoo explain a.jpg \\\n  --model m  # see\nA=1 attrib-zoo list | cat"
    assert commands(text) == ["attrib-zoo explain a.jpg  --model m  # see", "A=1 attrib-zoo list"]
    parse(commands(text)[0])
    for wrong in ("attrib-zoo explian a.jpg --model m", "attrib-zoo explain a.jpg --model m --speed 3"):
        with pytest.raises(Exception, match=r"explian|speed"):
            parse(wrong)


# ---------------------------------------------------------------------- text


def prose(text: str) -> str:
    """A page without its code, fenced or indented."""
    return re.sub(r"^```.*?^```$|^    [^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)


def shown_by(page: Path) -> list[str]:
    """The modules whose reference a page holds."""
    return re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)


def documented(page: Path, anchor: str) -> bool:
    """Whether the reference on a page has an anchor for that dotted name, which must exist."""
    module, _, symbol = anchor.rpartition(".")
    if not any(f"{anchor}.".startswith(f"{shown}.") for shown in shown_by(page)):
        return False
    return hasattr(importlib.import_module(module), symbol)


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def dead_links(page: Path, text: str) -> list[str]:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(text)):
        path, _, anchor = (link[0] or link[1]).partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        target = page if not path else (page.parent / path).resolve()
        if not target.exists() or (anchor and anchor not in anchors(target) and not documented(target, anchor)):
            dead.append("".join(link))
    return dead


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


def test_dead_links_are_found():
    page = ROOT / "docs" / "index.md"
    assert dead_links(page, "[a](../README.md) [b](nowhere.md) ![c](#none)\n```text\n[d](e.md)\n```\n    f[g](h)") == [
        "nowhere.md",
        "#none",
    ]


def test_links_into_the_reference_name_what_is_there():
    page = ROOT / "docs" / "index.md"
    link = "[a](reference/methods.md#attrib_zoo.methods.{})"
    assert dead_links(page, link.format("gradcam.GradCAM")) == []
    assert len(dead_links(page, link.format("gradcam.GradKAM"))) == 1
    assert len(dead_links(page, "[a](reference/testing.md#attrib_zoo.methods.gradcam.GradCAM)")) == 1


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_short(page):
    lines = prose(page.read_text(encoding="utf-8")).splitlines()
    assert [line for line in lines if len(line) > LONGEST_LINE and not line.startswith(("|", "[!["))] == []


@pytest.mark.parametrize("page", [page for page in PAGES if ROOT / "docs" in page.parents], ids=name)
def test_pages_are_found_from_the_index(page):
    index = ROOT / "docs" / "index.md"
    links = re.findall(r"\]\(([^)#\s]+)", index.read_text(encoding="utf-8"))
    assert page == index or page in {(index.parent / link).resolve() for link in links}


def test_pictures_are_small():
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 300_000, picture.name


# ---------------------------------------------------------------------- what is written from the code


def check_or_refresh(path: Path, wanted: str) -> None:
    """Compare a file with what the code says, or rewrite it where the environment asks for it."""
    if os.environ.get(REFRESH):
        path.write_text(wanted, encoding="utf-8")
    told = path.read_text(encoding="utf-8") if path.exists() else ""
    assert told == wanted, f"{name(path)} is behind the code; run: {REFRESH}=1 pytest tests/test_docs.py -m ''"


@pytest.mark.slow
def test_the_reference_has_every_public_module():
    """A page shows a module, or a package with all that is in it; nothing is shown twice."""
    shown = [module for page in (ROOT / "docs" / "reference").glob("*.md") for module in shown_by(page)]
    assert len(shown) == len(set(shown))
    missing = [module for module in EVERY if not any(f"{module}.".startswith(f"{one}.") for one in shown)]
    missing = [module for module in missing if module != "attrib_zoo.__main__"]
    assert not missing, f"add '::: module' to a page of docs/reference: {missing}"


@pytest.mark.slow
def test_the_page_of_methods_is_that_of_the_classes():
    check_or_refresh(ROOT / "docs" / "methods.md", methods_page.methods_page())


@pytest.mark.slow
def test_the_readme_lists_the_methods():
    path = ROOT / "README.md"
    pattern = r"(<!-- methods -->\n).*?(\n<!-- end of methods -->)"
    text = path.read_text(encoding="utf-8")
    assert re.search(pattern, text, re.DOTALL)
    table = methods_page.methods_table()
    check_or_refresh(path, re.sub(pattern, lambda found: found[1] + table + found[2], text, flags=re.DOTALL))


def extension_points() -> list[type]:
    return [value for value in vars(methods).values() if isinstance(value, type) and issubclass(value, Attribution)]


def hooks(base: type) -> set[str]:
    """What a base defines for its subclasses to fill: all that one of them fills, and what is abstract."""
    heirs = [cls for cls in every_subclass(base) if cls.__module__.startswith("attrib_zoo.methods")]
    filled = {name for heir in heirs for name in vars(heir)} | base.__abstractmethods__
    return {n for n in filled & set(vars(base)) if inspect.isfunction(vars(base)[n]) and not n.startswith("__")}


def every_subclass(cls: type) -> list[type]:
    return [heir for child in cls.__subclasses__() for heir in (child, *every_subclass(child))]


def test_the_bases_can_be_imported_from_one_place():
    """Every class that a method of ours subclasses; what a method fills has a public name.

    What two methods of one module share, as the two L-CAMs do, may stay between them.
    """
    heirs = [(base, cls) for cls in methods.list_methods().values() for base in cls.__mro__[1:]]
    shared = {base for base, cls in heirs if not (base.__name__.startswith("_") and base.__module__ == cls.__module__)}
    own = {base for base in shared if base.__module__.startswith("attrib_zoo")}
    assert own == set(extension_points())
    private = {f"{base.__name__}.{name}" for base in own for name in hooks(base) if name.startswith("_")}
    assert private == set()


def test_adding_a_method_lists_every_base_and_every_hook():
    text = (ROOT / "docs" / "how-to" / "add-a-method.md").read_text(encoding="utf-8")
    tables = text.partition("## The bases and their hooks")[2]
    for base in extension_points():
        assert f"`{base.__name__}`" in tables
        for hook in hooks(base):
            assert re.search(rf"`{hook}\b", tables), f"{base.__name__}.{hook}"


def test_choosing_layers_lists_every_rule():
    text = (ROOT / "docs" / "how-to" / "choose-layers.md").read_text(encoding="utf-8")
    assert {rule for rule in RULES if re.search(rf"^\| `{rule}\b", text, re.MULTILINE)} == set(RULES)


def test_the_changelog_begins_with_this_version():
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0].strip("[]") in (attrib_zoo.__version__, "Unreleased")


@pytest.mark.slow
def test_the_gallery_shows_every_method_with_a_caption():
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    card = r"!\[Maps of [^\]]+\]\(images/gallery/(\w+)\.jpg\)\n\n +\*\*\[`(\w+)`\]\([^)]+\)\*\*: (\w.{30,})"
    cards = re.findall(card, text)
    assert all(picture == method.lower() for picture, method, _ in cards)
    missing = set(methods.list_methods()) - {method for _, method, _ in cards}
    assert missing <= NOT_DRAWN.keys(), "run benchmarks/gallery.py photographs, look, and write what there is to see"
    assert all(f"`{method}`" in text for method in NOT_DRAWN)
    total = sum(picture.stat().st_size for picture in (ROOT / "docs" / "images" / "gallery").iterdir())
    assert total < 1_500_000
