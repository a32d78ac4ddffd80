"""Each package declares what it imports, and imports what it declares."""

import ast
import pathlib
import re
import sys
import tomllib

import pytest

PACKAGES = sorted((pathlib.Path(__file__).parent.parent / "packages").iterdir())


def imported(folder):
    """Names of the packages that the files of a folder import, but those of the standard library."""
    names = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"relative import in {file}"
                names.add(node.module)
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"__future__"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_dependencies_are_those_declared(package):
    module = package.name.replace("-", "_")
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    optional = [name for extra in project.get("optional-dependencies", {}).values() for name in extra]
    declared = {re.match(r"[\w-]+", entry)[0].replace("-", "_") for entry in project["dependencies"]}
    allowed = declared | {re.match(r"[\w-]+", entry)[0].replace("-", "_") for entry in optional} | {module}
    assert declared <= imported(package / "src" / module) <= allowed


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_packages_say_their_version(package):
    module = __import__(package.name.replace("-", "_"))
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert module.__version__ == project["version"]
