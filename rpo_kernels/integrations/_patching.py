"""Replacement of a trainer's functions by this package's: their signatures are checked first, and it can be undone."""

import importlib
import inspect
import runpy
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple


class Replacement(NamedTuple):
    """One function to replace."""

    module: str
    name: str  # in the module, or `Class.method`
    parameters: tuple[str, ...]  # expected of the function
    function: Callable[..., Any]


class Patch:
    """A package with some functions replaced, wherever its modules have bound them, until `undo()`.

    Raises:
        ImportError: if the package is not installed.
        RuntimeError: if one of the functions is not there or has other parameters than those known; nothing is changed
            then.
    """

    _active: dict[str, "Patch"] = {}  # noqa: RUF012

    def __init__(self, package: str, replacements: Sequence[Replacement]):
        self.package = package
        earlier = self.active(package)
        if earlier is not None:  # the settings of the last call apply
            earlier.undo()
        found = [_find(package, replacement) for replacement in replacements]
        self._bound: list[tuple[Any, str, Any, Any]] = []
        for replacement, (owner, name) in zip(replacements, found):
            self._bind(owner, name, replacement.function)
        self._active[package] = self

    @classmethod
    def active(cls, package: str) -> "Patch | None":
        """The patch that is in place."""
        return cls._active.get(package)

    def undo(self) -> None:
        """Restore the package's own functions; calling it again changes nothing."""
        for owner, name, own, ours in self._bound:
            if vars(owner).get(name) is ours:
                setattr(owner, name, own)
        self._bound = []
        if self._active.get(self.package) is self:
            del self._active[self.package]

    def own(self, name: str) -> Callable[..., Any]:
        """The package's own function of the last part of this name."""
        return next(own for _, bound, own, _ in self._bound if bound == name.split(".")[-1])

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _bind(self, owner: Any, name: str, ours: Callable) -> None:
        own = vars(owner)[name]
        owners = [owner]
        if isinstance(owner, ModuleType):  # others have imported the function by name
            loaded = [module for key, module in list(sys.modules.items()) if _belongs(key, self.package)]
            owners += [module for module in loaded if module is not owner and vars(module).get(name) is own]
        for place in owners:
            setattr(place, name, ours)
            self._bound.append((place, name, own, ours))


def run_patched(patch: Callable[[], object], module: str) -> None:
    """`python -m <module> TRAINER_MODULE [arguments]`: run the trainer's module as a program, patched."""
    # A launcher's own options, such as --local_rank=0, stand before it.
    at = next((i for i, argument in enumerate(sys.argv) if i > 0 and not argument.startswith("-")), None)
    if at is None:
        sys.exit(f"usage: python -m {module} TRAINER_MODULE [its arguments]")
    patch()
    sys.argv = [sys.argv[at], *sys.argv[1:at], *sys.argv[at + 1 :]]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _find(package: str, replacement: Replacement) -> tuple[Any, str]:
    """The module or class that holds the function, and its name there."""
    owner: Any
    try:
        owner = importlib.import_module(replacement.module)
    except ImportError as error:
        raise ImportError(f"rpo_kernels cannot patch {package}, {replacement.module} is missing: {error}") from error
    *path, name = replacement.name.split(".")
    for part in path:
        owner = getattr(owner, part, None)
    function = None if owner is None else vars(owner).get(name)
    parameters = None if function is None else tuple(inspect.signature(function).parameters)
    if parameters != replacement.parameters:
        raise RuntimeError(
            f"this version of {package} is not one that rpo_kernels knows: {replacement.module}.{replacement.name} "
            f"takes {parameters}, where {replacement.parameters} was expected"
        )
    return owner, name


def _belongs(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")
