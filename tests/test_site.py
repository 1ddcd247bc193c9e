"""The documentation site: it is built without a warning, needs nothing from elsewhere, and shows every method."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attrib_zoo.methods import list_methods

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow
pytest.importorskip("mkdocs", reason="the site is built where the extra docs is installed")
pytest.importorskip("mkdocstrings", reason="the site is built where the extra docs is installed")
pytest.importorskip("latex2mathml", reason="the site is built where the extra docs is installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("index.html"))


def test_every_page_is_in_the_navigation(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    navigation = {link.strip("./") for link in re.findall(r'href="([^"#:]*)" class="md-nav__link', home)}
    written = {page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert written - {"index"} <= navigation | {""}


def test_every_method_has_its_reference_with_signature_and_example(site):
    text = (site / "reference" / "methods" / "index.html").read_text(encoding="utf-8")
    for name, cls in list_methods().items():
        assert f'id="{cls.__module__}.{name}"' in text, name
    assert text.count('class="formula"><math') > 20
    assert not re.search(r":(class|func|meth|attr|data|math):", text)
    assert ".. math" not in text
    assert "admonition example" not in text  # examples are code


def test_formulas_have_no_command_left_in_them(site):
    for page in pages(site):
        assert not re.search(r"<m[a-z]+[^>]*>\\[^<]*</m", page.read_text(encoding="utf-8")), page


def test_a_page_loads_nothing_from_elsewhere(site):
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="([^"]+)"', text)
        assert not [one for one in loaded if one.startswith(("http:", "https:", "//"))], page


def test_links_out_of_the_documentation_name_the_file(site):
    text = (site / "how-to" / "add-a-method" / "index.html").read_text(encoding="utf-8")
    assert "examples/your_own_method.py" in text
    for page in pages(site):
        assert not re.search(
            r'href="[^"]*(README|CONTRIBUTING|examples/|benchmarks/)', page.read_text(encoding="utf-8")
        )


def test_it_can_be_searched_and_is_light_and_dark(site):
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert '"location":"reference/methods/#attrib_zoo.methods.ttame.TTAME"' in index.replace(": ", ":")
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'data-md-color-scheme="default"' in home
    assert 'data-md-color-scheme="slate"' in home
    assert 'name="viewport"' in home
