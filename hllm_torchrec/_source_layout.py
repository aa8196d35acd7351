"""Imports in a checkout, where `hllm_torchrec.modules`, `.launch` and `.configs` are folders beside the package.

In an installed wheel they are inside the package (`package_dir` in setup.py). In a checkout, adding the root to
`hllm_torchrec.__path__` would also make every other file of the root a submodule, such as `hllm_torchrec.setup`.
Therefore a meta path finder resolves exactly these three names. It is the first finder, because the finder of an
editable install may point to another checkout.

If a machine has two checkouts, a program of one of them must not import modules of the other: an ImportError is
raised, whether all modules would come from the other checkout or only some.
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

#: Folders of the checkout's root that are subpackages.
TOP_LEVEL = ("modules", "launch", "configs")


class CheckoutFinder(MetaPathFinder):
    """Finds the three subpackages in the root of a checkout; their submodules are found by Python's own finder.

    Args:
        package: name of the parent package.
        root: root of the checkout, which contains the three folders.
    """

    def __init__(self, package: str, root: Path) -> None:
        self.package = package
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of the three subpackages; None for any other name."""
        parent, _, name = fullname.rpartition(".")
        if parent != self.package or name not in TOP_LEVEL:
            return None
        folder = self.root / name
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


class OtherCheckouts(MetaPathFinder):
    """Meta path finder, placed after the finder of `sys.path`: refuses modules that only another checkout has.

    The other checkout is found by the finders that follow: those of its editable install.
    """

    def __init__(self, package: str, root: Path) -> None:
        self.package = package
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None, because this checkout does not have the module.

        Raises:
            ImportError: another, installed checkout has the module.
        """
        if not fullname.startswith(f"{self.package}."):
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                raise ImportError(
                    f"{fullname} is not in the checkout {self.root} that {self.package} is imported from; "
                    f"{spec.origin} is of another, installed checkout: bash scripts/install.sh installs this one"
                )
        return None


def install_finder() -> None:
    """Install the finders if this package runs from a checkout.

    Raises:
        ImportError: the program or the current directory belongs to another checkout, or modules of another checkout
            are loaded already.
    """
    package = Path(__file__).resolve().parent
    root = package.parent
    if not is_checkout(root):
        return
    refuse_other_checkouts(package.name, root)
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, CheckoutFinder | OtherCheckouts)]
    sys.meta_path.insert(0, CheckoutFinder(package.name, root))
    sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, OtherCheckouts(package.name, root))


def is_checkout(folder: Path) -> bool:
    """True if a folder is the root of a checkout."""
    parts = ("setup.py", "modules/__init__.py", "hllm_torchrec/__init__.py")
    return all((folder / part).is_file() for part in parts)


def refuse_other_checkouts(package: str, root: Path) -> None:
    """Raise an ImportError if the program, the current directory or a loaded module is in another checkout."""
    for what, folder in [*_program_folders(), ("the current directory", _current_directory())]:
        if folder is not None and folder != root and is_checkout(folder):
            raise ImportError(
                f"{what} belongs to the checkout {folder}, but {package} is imported from {root}: one of the two would "
                f"be run unnoticed. Set PYTHONPATH={folder}, install that one (bash scripts/install.sh there), or work "
                f"in {root}"
            )
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.startswith(f"{package}.") and file and not Path(file).resolve().is_relative_to(root):
            raise ImportError(f"{name} was loaded from {file}, but {package} is imported from {root}: restart Python")


def _program_folders() -> Iterator[tuple[str, Path]]:
    """Yield (program, folder) for the folders above the running program, unless the environment has installed it.

    Programs of the environment (pytest, torchrun, hllm) belong to no checkout.
    """
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    if program and not Path(program).absolute().is_relative_to(sys.prefix):
        yield from ((program, folder) for folder in Path(program).resolve().parents)


def _current_directory() -> Path | None:
    """Return the current directory, or None if it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None
