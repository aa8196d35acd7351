"""Imports in a checkout, where `hllm_torchrec.modules`, `.launch` and `.configs` are folders beside the package.

The wheel puts them in place (`package_dir` in setup.py). Adding the root to `hllm_torchrec.__path__` would serve as
well, but it would make everything in the root a submodule too, `hllm_torchrec.setup` among them. So a finder answers
for exactly these three names. It comes first, because the finder of an editable install may know another checkout.

With two checkouts on a machine, a program of one must never import some modules of the other, nor run entirely from the
other unnoticed: either case is refused.
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
    """Finds the three subpackages in the root of a checkout; what is inside them is found as usual.

    Args:
        package: name of the package they belong to.
        root: folder in which they stand.
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
    """Stands behind the finder of `sys.path` and refuses modules that only an installed other checkout has."""

    def __init__(self, package: str, root: Path) -> None:
        self.package = package
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None: a module that this checkout lacks is not found.

        Raises:
            ImportError: another checkout has it.
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
        ImportError: the program or the current directory belongs to another checkout, or modules of another one are
            loaded already.
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
    """Raise an ImportError if program, current directory or a loaded module is of another checkout than `root`."""
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
            raise ImportError(f"{name} was loaded from {file}, but {package} is imported from {root}: start anew")


def _program_folders() -> Iterator[tuple[str, Path]]:
    """The folders above the program that runs, unless it is the environment's (pytest, torchrun, hllm)."""
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    if program and not Path(program).absolute().is_relative_to(sys.prefix):
        yield from ((program, folder) for folder in Path(program).resolve().parents)


def _current_directory() -> Path | None:
    """The current directory; None where it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None
