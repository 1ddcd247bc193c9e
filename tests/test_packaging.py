"""What is installed is what was tested: the wheel is built, installed into an empty folder and used from there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import attrib_zoo

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("attrib_zoo", "pyproject.toml", "README.md", "LICENSE")
BESIDE = (
    "tests",
    "docs",
    "examples",
    "benchmarks",
    ".ci",
    "setup.cfg",
    "MANIFEST.in",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
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
        if path.suffix == ".py" or path.name == "py.typed"
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
    for folder in ("attrib_zoo", "tests", "docs", "examples", "benchmarks"):
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
