"""How the package is built: a core that a reader finishes in an evening, wings above it, and imports that point one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_pruning

PACKAGE = Path(resnet_pruning.__file__).parent
# Each may import itself and those to its left; the core is "".
FLOORS = ["", "deployment", "compression", "quantization", "peers", "studies"]
MODULES = sorted(PACKAGE.rglob("*.py"))


def place(module: Path) -> str:
    """The wing of a module, or "" for the core."""
    return module.parent.name if module.parent != PACKAGE else ""


def imported_places(module: Path) -> set[str]:
    """The wings, or "" for the core, that a module imports from, wherever in the file it does."""
    found = set()
    here = ["resnet_pruning", *module.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            path = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                full = [*path, alias.name]
                if full[0] == "resnet_pruning":
                    found.add(full[1] if (PACKAGE / full[1]).is_dir() else "")
    return found


def test_the_core_is_small():
    core = [module for module in MODULES if place(module) == ""]
    assert len(core) <= 17, "16 modules and __init__"
    assert sum(len(module.read_text(encoding="utf-8").splitlines()) for module in core) <= 2500


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(PACKAGE)))
def test_imports_point_one_way(module):
    allowed = {"", "report"} if place(module) == "report" else {*FLOORS[: FLOORS.index(place(module)) + 1]}
    assert imported_places(module) <= allowed


def test_report_needs_no_torch():
    modules = [f"resnet_pruning.report.{module.stem}" for module in MODULES if place(module) == "report" and module.stem != "__init__"]
    code = f"import sys, {', '.join(modules)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", resnet_pruning.__all__)
def test_the_package_hands_on_its_names(name):
    assert getattr(resnet_pruning, name).__name__ == name
    assert name in dir(resnet_pruning)


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        resnet_pruning.no_such_name  # noqa: B018
