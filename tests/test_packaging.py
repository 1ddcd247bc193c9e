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
