"""The house rules that a machine can check: import direction, sizes, and what library code never does."""

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "attrib_zoo"

ORDER = (
    "errors",
    "masking",
    "backbone",
    "metrics",
    "attribution",
    "training",
    "sharing",
    "methods",
    "",  # attrib_zoo/__init__.py: the list of methods
    "synthetic",
    "visualize",
    "models",
    "benchmark",
    "testing",
    "cli",
    "__main__",
)
"""Modules and packages from the ground up: each may import what stands before it, and nothing else of the house."""

INSIDE_FUNCTIONS = {
    "torchvision",
    "timm",
    "matplotlib",
    "PIL",
    "tqdm",
    "safetensors",
    "huggingface_hub",
    "transformers",
    "pyarrow",
    "gradio",
    "jinja2",
    "onnx",
    "onnxruntime",
    "onnxscript",
}
PRINTS = {"cli"}
LONGEST_FUNCTION = 70


class Module:
    """One source file.

    ``name`` is without the package's own; ``imports`` are ``(line, module, inside a function)``.
    """

    def __init__(self, root: Path, path: Path) -> None:
        self.path = path
        self.name = ".".join(path.relative_to(root / PACKAGE).with_suffix("").parts).removesuffix("__init__").strip(".")
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.imports = list(_imports(self.tree, inside=False))

    @property
    def group(self) -> str:
        return self.name.split(".")[0]


def _imports(node: ast.AST, *, inside: bool) -> Iterator[tuple[int, str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _imports(ast.Module([other], []), inside=inside)
            continue
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level:
            yield child.lineno, "." * child.level + (child.module or ""), inside
        elif isinstance(child, ast.ImportFrom):
            yield from ((child.lineno, f"{child.module}.{alias.name}", inside) for alias in child.names)
        deeper = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _imports(child, inside=inside or deeper)


@cache
def read(root: Path) -> list[Module]:
    return [Module(root, path) for path in sorted((root / PACKAGE).rglob("*.py"))]


def own(modules: list[Module], imported: str) -> str | None:
    """The module of the house that an import loads, by its name here; None for others and for the version."""
    if imported != PACKAGE and not imported.startswith(PACKAGE + "."):
        return None
    name = imported.removeprefix(PACKAGE).removeprefix(".")
    if name == "__version__":  # a fact, not code
        return None
    known = {module.name for module in modules}
    return name if name in known else name.rpartition(".")[0]


# ---------------------------------------------------------------------- the rules; each returns what breaks it


def unlisted(modules: list[Module]) -> list[str]:
    groups = sorted({module.group for module in modules} - set(ORDER))
    return [f"{name}: not in ORDER of tests/test_architecture.py; put it where its imports allow" for name in groups]


def upward(modules: list[Module]) -> list[str]:
    found = []
    for module in modules:
        for line, imported, _ in module.imports:
            target = own(modules, imported)
            if target is None or module.group not in ORDER:
                continue
            group = target.split(".")[0]
            if group != module.group and group in ORDER and ORDER.index(group) > ORDER.index(module.group):
                found.append(f"{module.path.name}:{line}: {module.name or PACKAGE} must not import {target or PACKAGE}")
    return found


def relative(modules: list[Module]) -> list[str]:
    return [
        f"{module.name}:{line}: relative import of {imported}"
        for module in modules
        for line, imported, _ in module.imports
        if imported.startswith(".")
    ]


def cycles(modules: list[Module]) -> list[str]:
    """Imports that lead back, function-level ones included; a package's own ``__init__`` stands for its names."""
    edges = {m.name: {t for _, i, _ in m.imports if (t := own(modules, i)) is not None} - {m.name} for m in modules}
    found, done = [], set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())
    return found


def heavy(modules: list[Module]) -> list[str]:
    return [
        f"{module.name}:{line}: import {imported} inside the function that needs it"
        for module in modules
        for line, imported, inside in module.imports
        if imported.split(".")[0] in INSIDE_FUNCTIONS and not inside
    ]


def long_functions(modules: list[Module]) -> list[str]:
    """Lines of code: the docstring does not count."""
    found = []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[0]
                docstring = first if ast.get_docstring(node, clean=False) is not None else None
                told = 0 if docstring is None else docstring.end_lineno - docstring.lineno + 1
                size = node.end_lineno - node.lineno + 1 - told
                if size > LONGEST_FUNCTION:
                    found.append(f"{module.name}.{node.name}: {size} lines, at most {LONGEST_FUNCTION}")
    return found


def asserts(modules: list[Module]) -> list[str]:
    return [
        f"{module.name}:{node.lineno}: assert; raise an error of errors.py"
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assert)
    ]


def prints(modules: list[Module]) -> list[str]:
    return [
        f"{module.name}:{node.lineno}: print"
        for module in modules
        if module.name not in PRINTS
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def backwards(modules: list[Module]) -> list[str]:
    """``.backward()`` fills ``.grad`` of the user's model; only the training loop may, where nothing else has one."""
    return [
        f"{module.name}:{node.lineno}: .backward(); use torch.autograd.grad"
        for module in modules
        if module.name not in ("training.fit", "synthetic.scenes")  # synthetic trains models of its own
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward"
    ]


RULES = (unlisted, upward, relative, cycles, heavy, long_functions, asserts, prints, backwards)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Callable[[list[Module]], list[str]]):
    modules = read(ROOT)
    assert len(modules) > 30
    assert rule(modules) == []


# ---------------------------------------------------------------------- the rules bite

LONG = "\n".join(["def f():", "    '''Two", "    lines.'''", *["    x = 1"] * 70])
BACK = "def f():\n    from attrib_zoo.backbone import a"
ALLOWED = """
from attrib_zoo.errors import X
if TYPE_CHECKING:
    import PIL
else:
    import captum
def f():
    import tqdm
    from attrib_zoo import __version__
    "print(1)"
"""

PLANTED = (
    (unlisted, {"shed.py": ""}, "shed: not in ORDER"),
    (upward, {"masking.py": "from attrib_zoo.methods import sise", "methods/sise.py": ""}, "must not import methods"),
    (upward, {"training/a.py": "def f():\n    import attrib_zoo"}, "training.a must not import attrib_zoo"),
    (upward, {"backbone/a.py": "from attrib_zoo import metrics", "metrics/__init__.py": ""}, "backbone.a must not"),
    (relative, {"masking.py": "from .errors import X"}, "masking:1: relative"),
    (cycles, {"backbone/a.py": "import attrib_zoo.backbone.b", "backbone/b.py": BACK}, "a -> backbone.b -> backbone.a"),
    (heavy, {"models/load.py": "import timm.models"}, "models.load:1: import timm.models inside"),
    (long_functions, {"errors.py": LONG}, "errors.f: 71 lines"),
    (asserts, {"errors.py": "assert True"}, "errors:1: assert"),
    (prints, {"cli/__init__.py": "print(1)", "errors.py": "def f():\n    print(1)"}, "errors:2: print"),
    (backwards, {"attribution.py": "loss.backward()"}, "attribution:1: .backward()"),
)


def build(folder: Path, files: dict[str, str]) -> list[Module]:
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read(folder)


@pytest.mark.parametrize(("rule", "files", "said"), PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_the_rule_finds_what_breaks_it(rule, files, said, tmp_path):
    (complaint,) = rule(build(tmp_path, files))
    assert said in complaint


def test_what_is_allowed_passes(tmp_path):
    modules = build(tmp_path, {"visualize.py": ALLOWED, "errors.py": "x = 1\n"})
    assert [complaint for rule in RULES for complaint in rule(modules)] == []
