"""nt-stax is written with what any author of layers has: public names of nt-core."""

import ast
import importlib
import pathlib

import nt_stax

SOURCES = sorted(pathlib.Path(nt_stax.__file__).parent.glob("*.py"))


def imports_of_core():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nt_core"):
                yield from ((path.name, node.module, alias.name) for alias in node.names)


def test_only_public_names_of_nt_core_are_imported():
    imported = list(imports_of_core())
    assert imported
    for name, module, imported_name in imported:
        assert module in ("nt_core", "nt_core.authoring"), f"{name} imports from {module}"
        assert imported_name in importlib.import_module(module).__all__, f"{name} imports {imported_name}"
