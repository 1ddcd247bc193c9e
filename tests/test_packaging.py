"""What is installed is what was tested: the wheel is built, installed into an empty folder and used from there."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import attrib_zoo

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("attrib_zoo", "pyproject.toml", "PACKAGE.md", "LICENSE")
BESIDE = (
    "tests",
    "docs",
    "examples",
    "benchmarks",
    "tools",
    ".ci",
    ".github",
    ".pre-commit-config.yaml",
    "setup.cfg",
    "MANIFEST.in",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "README.md",
    "RELEASING.md",
    "CITATION.cff",
    "CODE_OF_CONDUCT.md",
    "mkdocs.yml",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of a copy of the sources, built with the setuptools that is installed: no network, nothing left."""
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools 77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-build-isolation", "--no-index", "--wheel-dir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip("install", "--no-index", "--target", target, wheel)
    return target


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist, built as the wheel is."""
    pytest.importorskip("setuptools", minversion="77", reason="building the sdist needs setuptools 77")
    source, out = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("sdist")
    for name in (*SOURCES, *BESIDE):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.tar.gz")
    shutil.unpack_archive(built, out, filter="data")
    return out / f"attrib_zoo-{attrib_zoo.__version__}"


def pip(command: str, *arguments: object) -> None:
    call = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, "--no-deps", "--quiet"]
    subprocess.run([*call, *map(str, arguments)], check=True, capture_output=True, text=True)


def python(site: Path, *arguments: str) -> str:
    """What Python prints with the installed package before all others, in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=site.parent, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if name.startswith("attrib_zoo/")}
    assert packed == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "attrib_zoo").rglob("*")
        if path.suffix in (".py", ".html") or path.name == "py.typed"
    }
    rest = {name.split("/")[0] for name in names} - {"attrib_zoo"}
    assert rest == {f"attrib_zoo-{attrib_zoo.__version__}.dist-info"}
    assert any(name.endswith("LICENSE") for name in names)


def test_it_imports_from_where_it_was_installed(site):
    code = "import attrib_zoo, attrib_zoo.testing; print(attrib_zoo.__file__, attrib_zoo.__version__)"
    assert python(site, "-c", code) == f"{site / 'attrib_zoo' / '__init__.py'} {attrib_zoo.__version__}"


def test_it_says_its_types(site):
    assert (site / "attrib_zoo" / "py.typed").is_file()


def test_it_explains(site):
    code = """
import torch
from attrib_zoo import GradCAM, synthetic
images = torch.rand(2, 3, 32, 32)
print(tuple(GradCAM(synthetic.tiny_cnn()).attribute(images, target=1).shape))
"""
    assert python(site, "-c", code) == "(2, 3, 32, 32)"


def test_it_brings_its_command(site):
    assert "attrib-zoo = attrib_zoo.cli:main" in next(site.glob("*.dist-info/entry_points.txt")).read_text()
    listed = python(site, "-m", "attrib_zoo", "list")
    assert "gradcam" in listed
    assert "ttame" in listed


# ---------------------------------------------------------------------- the sdist


def test_the_sdist_holds_all_that_is_here(sdist):
    for folder in ("attrib_zoo", "tests", "docs", "examples", "benchmarks", "tools", ".ci", ".github"):
        here, there = (
            {p.relative_to(root).as_posix() for p in (root / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"}
            for root in (ROOT, sdist)
        )
        assert there == here, folder


def test_the_sdists_tests_run_from_the_sdist(sdist):
    """Some that read helpers, documentation and benchmarks beside them; the package is the sdist's own."""
    some = ["tests/test_architecture.py", "tests/test_masking.py", "tests/backbone/test_grid.py"]
    some += ["tests/test_docs.py::test_python_blocks_run[docs/how-to/threads-and-services.md]"]
    environment = {**os.environ, "PYTHONPATH": str(sdist)}
    call = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *some]
    done = subprocess.run(call, cwd=sdist, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    code = "import attrib_zoo; print(attrib_zoo.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=sdist, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == str(sdist / "attrib_zoo" / "__init__.py")


# ---------------------------------------------------------------------- the index


def test_the_index_is_told_what_it_is(wheel):
    (name,) = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA")]
    told = zipfile.ZipFile(wheel).read(name).decode()
    head, _, text = told.partition("\n\n")
    for version in ("3.10", "3.11", "3.12", "3.13"):
        assert f"Classifier: Programming Language :: Python :: {version}\n" in head + "\n"
    assert text.strip() == (ROOT / "PACKAGE.md").read_text(encoding="utf-8").strip()
    assert "Project-URL" not in head  # none is known yet, and none is made up: RELEASING.md


def relative_links(text: str) -> list[str]:
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    return [a or b for a, b in links if not (a or b).startswith(("https://", "#"))]


def test_the_text_for_the_index_has_no_link_that_leads_nowhere_there():
    assert relative_links('[a](docs/index.md) [b](https://captum.ai) <img src="c.jpg">') == ["docs/index.md", "c.jpg"]
    assert relative_links((ROOT / "PACKAGE.md").read_text(encoding="utf-8")) == []


def test_the_index_accepts_the_files(wheel):
    pytest.importorskip("twine", reason="the extra test brings it, older environments lack it")
    call = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_one_version_everywhere():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited
    assert cited[1] == attrib_zoo.__version__
