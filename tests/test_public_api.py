"""The list of methods is complete, and every method is called, documented and imported alike."""

import ast
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import attrib_zoo
from attrib_zoo.attribution import Attribution
from attrib_zoo.methods import list_methods

SOURCE = Path(attrib_zoo.__file__).read_text(encoding="utf-8")
CLASSES = {name: value for name, value in vars(attrib_zoo).items() if inspect.isclass(value)}
METHODS = {name: value for name, value in CLASSES.items() if issubclass(value, Attribution)}

# ---------------------------------------------------------------------- the list


def export_line(cls: type) -> str:
    return f"from {cls.__module__} import {cls.__name__} as {cls.__name__}"


def export_lines(source: str) -> list[str]:
    return [ast.unparse(node) for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]


def missing(source: str, classes: list[type]) -> list[str]:
    return [export_line(cls) for cls in classes if export_line(cls) not in export_lines(source)]


def test_every_method_is_exported():
    lines = missing(SOURCE, list(list_methods().values()))
    assert not lines, "add to attrib_zoo/__init__.py:\n" + "\n".join(lines)


def test_a_forgotten_export_is_named_by_its_line():
    without = SOURCE.replace("from attrib_zoo.methods.ttame import TTAME as TTAME\n", "")
    assert without != SOURCE
    assert missing(without, list(list_methods().values())) == ["from attrib_zoo.methods.ttame import TTAME as TTAME"]


def test_the_list_is_what_is_exported():
    assert list_methods() == METHODS
    assert list(list_methods()) == sorted(METHODS)


def test_the_list_holds_methods_and_what_one_asks_them_in_order():
    lines = export_lines(SOURCE)
    assert lines == sorted(lines)
    assert sorted(lines) == sorted(export_line(cls) for cls in CLASSES.values())
    assert set(CLASSES) - set(METHODS) == {"Contrast", "Scalar"}
    names = {"__version__", *CLASSES}
    assert {n for n in vars(attrib_zoo) if not n.startswith("__")} - names <= {
        m.name for m in pkgutil.iter_modules(attrib_zoo.__path__)
    }


def test_the_version_is_a_plain_string():
    assert re.fullmatch(r"\d+\.\d+\.\d+", attrib_zoo.__version__)
    assert f'__version__ = "{attrib_zoo.__version__}"' in SOURCE


# ---------------------------------------------------------------------- the methods

each = pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)


@each
def test_constructors_have_one_shape(cls):
    own, model, layers, *options = inspect.signature(cls.__init__).parameters.values()
    assert (own.name, model.name, layers.name, layers.default) == ("self", "model", "layers", None)
    assert model.default is inspect.Parameter.empty
    for option in options:
        assert option.kind is option.KEYWORD_ONLY, f"{option.name} must be keyword-only, and no **kwargs"
        assert option.default is not option.empty, f"{option.name} needs a default, the paper's"
        assert option.annotation is not option.empty
    told = "at the resolution of the image" in " ".join(cls.__doc__.split())
    assert ("upsample" in {option.name for option in options}) != told, (
        "upsample=False, or say that there is no such map"
    )
    last = ["scale"] if told else ["upsample", "smooth", "scale"]
    assert [option.name for option in options][-len(last) :] == last, "the same of all methods, at the end"


@each
def test_the_call_is_the_contract_itself(cls):
    for name in ("attribute", "attribute_many"):
        assert getattr(cls, name) is getattr(Attribution, name)
    heirs = [heir for heir in cls.__subclasses__() if heir.__module__.startswith("attrib_zoo.")]
    assert not heirs, "a method is final"


@each
def test_class_attributes_say_what_it_is(cls):
    assert all((cls.family, cls.cost, cls.models))
    assert re.search(r"\d{4}", cls.paper), "a paper with its year"
    assert set(cls.models) <= {"cnn", "vit"}
    assert cls.needs_fit == hasattr(cls, "fit")


@each
def test_docstrings_have_their_sections(cls):
    text = inspect.cleandoc(cls.__doc__)
    assert re.match(r"[^\n]{20,115}\.\n\n", text), "one line that says what the map shows"
    assert ".. math::" in text, "the formula"
    for section in ("Args", "Example", "References", "Deviations"):
        assert re.search(rf"^{section}:\n    \S", text, re.MULTILINE), f"section {section}"
    assert ">>> " in text


@each
def test_docstrings_name_every_option(cls):
    text = inspect.cleandoc(cls.__doc__)
    section = re.search(r"^Args:\n(.*?)\n(?=^\S)", text, re.MULTILINE | re.DOTALL).group(1)
    told = re.findall(r"^    (\w+):", section, re.MULTILINE)
    assert told == [name for name in inspect.signature(cls).parameters]


# ---------------------------------------------------------------------- what an import costs

WALK = """
import importlib, pkgutil, sys
import captum.attr, captum.metrics
before = set(sys.modules)
import attrib_zoo
{more}
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""
ALL = """
def walk(path, prefix):
    for info in pkgutil.iter_modules(path, prefix):
        if info.name.split(".")[1] not in ("cli", "__main__"):
            module = importlib.import_module(info.name)
            walk(getattr(module, "__path__", []), info.name + ".")

walk(attrib_zoo.__path__, "attrib_zoo.")
"""
OURS = {"attrib_zoo", "torch", "numpy", *sys.stdlib_module_names}


def newly_imported(more: str = "") -> set[str]:
    """Top-level packages that an import of attrib_zoo loads beyond what Captum has loaded."""
    command = [sys.executable, "-c", WALK.format(more=more)]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_no_module_loads_more_than_torch_and_captum_do():
    """No torchvision, timm, PIL, tqdm, safetensors or matplotlib, in ``import attrib_zoo`` or in any module of it."""
    found = newly_imported(ALL)
    assert "attrib_zoo" in found
    assert found - OURS == set()


def test_that_test_can_fail():
    assert newly_imported("import safetensors") - OURS == {"safetensors"}
