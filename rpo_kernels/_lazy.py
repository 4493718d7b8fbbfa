"""Packages whose public names, listed in their `_api` module, are imported when the first of them is used (PEP 562)."""

import importlib
import sys
from typing import Any


def attribute(package: str, name: str) -> Any:
    """What `package.name` is, for the package's `__getattr__`.

    Raises:
        AttributeError: if neither `_api` nor the submodules it imports have that name.
    """
    if not name.startswith("_") or name == "__all__":  # probes such as __path__ and __wrapped__ import nothing
        api = importlib.import_module(f"{package}._api")
        if hasattr(api, name):
            return getattr(api, name)
        if name in vars(sys.modules[package]):  # a submodule, which importing _api has imported
            return vars(sys.modules[package])[name]
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
