"""Makes `hllm_torchrec.modules`, `.launch` and `.configs` importable in a checkout.

There they are folders beside the package, not inside it: the wheel puts them in place (`package_dir` in
setup.py). Adding the root to `hllm_torchrec.__path__` would serve as well, but it would make everything in
the root a submodule too, `hllm_torchrec.setup` among them. So a finder answers for exactly these three names.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
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


def install_finder() -> None:
    """Install the finder if this package runs from a checkout, once."""
    package = Path(__file__).resolve().parent
    root = package.parent
    if not ((root / "setup.py").is_file() and (root / "modules" / "__init__.py").is_file()):
        return
    if not any(isinstance(finder, CheckoutFinder) and finder.root == root for finder in sys.meta_path):
        sys.meta_path.insert(0, CheckoutFinder(package.name, root))
