"""Builds all packages and proves that each installs and works alone. Run by `make package`; leaves the files in dist/.

1. The wheel and the sdist of every package; the wheel is built from the sdist, in a temporary folder outside the
   repository, and says that it is typed.
2. Each wheel alone in an empty environment, with its dependencies from the other wheels and the package index: it
   brings its declared dependencies and nothing else, and does what its smoke_<package>.py asks.
3. nt-core without a compiler: the sdist installs as pure Python, and works.
4. A package downstream of nt-core alone: tests/downstream.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DIST = ROOT / "dist"
PACKAGES = ["nt-core", "nt-stax", "nt-predict", "nt-empirical", "neural-tangents"]

# The smoke check runs where only the package and its dependencies are, and may not see the repository.
LIST_INSTALLED = """
import importlib.metadata as m, json
print(json.dumps({d.name: d.requires or [] for d in m.distributions()}))
"""


def run(*command, **kwargs):
    """Runs a command outside the repository; a failure ends the check with the command's output."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS")}
    kwargs = {"cwd": tempfile.gettempdir(), "env": environment | kwargs.pop("env", {})} | kwargs
    result = subprocess.run([*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)
    if result.returncode:
        sys.exit(f"FAILED: {' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def normalised(name):
    """The name of a distribution, as the package index compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def build(package):
    """Builds sdist and, from it, wheel; returns both paths."""
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT / "packages" / package)
    stem = package.replace("-", "_")
    (sdist,), (wheel,) = DIST.glob(f"{stem}-*.tar.gz"), DIST.glob(f"{stem}-*.whl")
    if f"{stem}/py.typed" not in zipfile.ZipFile(wheel).namelist():
        sys.exit(f"FAILED: {wheel.name} lacks py.typed")
    return sdist, wheel


class Environment:
    """An empty virtual environment in a temporary folder, gone at the end of a `with`."""

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory()
        venv.create(self._folder.name, with_pip=True)
        self.python = Path(self._folder.name) / "bin" / "python"
        self._tools = set(self.installed())
        return self

    def __exit__(self, *_):
        self._folder.cleanup()

    def install(self, *requirements, **env):
        """Installs with pip, our own packages from dist/."""
        return run(
            self.python, "-m", "pip", "install", "-v", "--no-compile", "--find-links", DIST, *requirements, env=env
        )

    def installed(self):
        """What is installed: name -> requirements."""
        found = json.loads(run(self.python, "-c", LIST_INSTALLED))
        return {normalised(name): requires for name, requires in found.items()}

    def closure(self, *names):
        """The names and all that they require, of extras those that are asked for as in `name[extra]`."""
        installed, todo, seen = self.installed(), [(name, ()) for name in names], set()
        while todo:
            name, extras = node = todo.pop()
            if name not in installed or node in seen:
                continue
            seen.add(node)
            for requirement in installed[name]:
                extra = re.search(r"extra == ['\"]([\w-]+)", requirement)
                if extra is None or extra[1] in extras:
                    required, more = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?", requirement).groups()
                    todo.append((normalised(required), tuple(more.split(",")) if more else ()))
        return {name for name, _ in seen}

    def brought(self):
        """What was installed into the environment since it was made."""
        return set(self.installed()) - self._tools


def check_alone(package, wheel):
    """Installs one wheel into an empty environment and uses it there."""
    with Environment() as environment:
        environment.install(wheel)
        brought = environment.brought()
        expected = environment.closure(package)
        if package == "nt-core":
            expected = {"nt-core"} | environment.closure("jax", "jaxlib", "numpy")
        if brought != expected:
            sys.exit(f"FAILED: {package} alone brought {sorted(brought)}, expected {sorted(expected)}")
        native = ["--native"] if package == "nt-core" else []  # it was built from its sdist, with a compiler
        run(environment.python, HERE / f"smoke_{package.replace('-', '_')}.py", *native)
        print(f"{package}: {wheel.name} alone, with {', '.join(sorted(brought - {package}))}: works")


def check_without_compiler(sdist):
    """nt-core's sdist installs as pure Python where nothing compiles."""
    with Environment() as environment:
        said = environment.install(sdist, CC="/nonexistent/cc", CXX="/nonexistent/c++")
        if "installed as pure Python" not in said:
            sys.exit(f"FAILED: the build without a compiler did not say that it is pure Python\n{said}")
        run(environment.python, HERE / "smoke_nt_core.py", "--pure")
        print(f"nt-core: {sdist.name} without a compiler: installs as pure Python, says so, and works")


def check_downstream():
    """A package that depends on nt-core alone."""
    with Environment() as environment:
        with tempfile.TemporaryDirectory() as folder:
            copy = shutil.copytree(ROOT / "tests" / "downstream", Path(folder) / "downstream")
            environment.install(copy)
        others = environment.brought() & set(PACKAGES) - {"nt-core"}
        if others:
            sys.exit(f"FAILED: the downstream package brought {sorted(others)}")
        print(run(environment.python, "-m", "nt_downstream").strip())
        print("downstream: a package on nt-core alone: works")


def main():
    """Runs all checks."""
    shutil.rmtree(DIST, ignore_errors=True)
    built = {package: build(package) for package in PACKAGES}
    for package, (_, wheel) in built.items():
        check_alone(package, wheel)
    check_without_compiler(built["nt-core"][0])
    check_downstream()
    print(f"{len(built)} packages built and checked; the files are in {DIST}")


if __name__ == "__main__":
    main()
