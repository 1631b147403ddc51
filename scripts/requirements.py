"""Prints the requirements of pyproject.toml, quoted for pip: the package's own without torch, or those of extras.

The Makefile installs torch first and by itself: a plain `torch` in a list would bring a CUDA build of several GB.
"""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:   # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
chosen = [r for extra in sys.argv[1:] for r in project["optional-dependencies"][extra]] or project["dependencies"]
print("\n".join(r.replace(" ", "") for r in chosen if not r.startswith("torch")))
