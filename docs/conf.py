"""Settings of Sphinx. `make docs` builds docs/_build/html."""

import re

project = "Neural Tangents"
author = "The Neural Tangents contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # the README's links to files beside it


# What is reStructuredText already (``literals``, :roles:`...`), or else code in single backticks.
QUOTED = re.compile(r"(``.+?``|:[\w:]+:`[^`]+`)|`([^`]+)`", flags=re.DOTALL)


def code_in_backticks(app, what, name, obj, options, lines):
    """Docstrings have code in single backticks, as Markdown; reStructuredText wants two, and no letter after them."""
    lines[:] = QUOTED.sub(lambda m: m[1] or f"``{m[2]}``\\ ", "\n".join(lines)).split("\n")


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", code_in_backticks)
