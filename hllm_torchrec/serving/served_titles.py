"""`ServedTitles`: personalized titles of `hllm create` in a service, reloaded when the folder changes."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from hllm_torchrec.common.errors import UnavailableError
from hllm_torchrec.creative.clusters import FILE as CLUSTERS
from hllm_torchrec.creative.titles import FILE as TITLES
from hllm_torchrec.creative.titles import Creatives


class ServedTitles:
    """Titles of a folder, looked up by raw ids.

    They are reloaded independently of the model: titles stay valid with a new model, and need no new model.

    Raises:
        ValueError: see `Creatives.open`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._creatives = Creatives.open(path)
        self._mark = self._find_mark()

    def of(self, user: str | None, items: Sequence[str]) -> list[str | None]:
        """Return the title of each item for a user (None: an unknown user); None for an item without titles."""
        creatives = self._creatives
        found = (creatives.find(user, item) for item in items)
        return [None if title is None else title.text for title in found]

    def refresh(self) -> bool:
        """Reload the titles if the folder has changed; return whether the titles were reloaded.

        Raises:
            ValueError: the titles in the folder cannot be opened. The previous titles stay in use.
        """
        mark = self._find_mark()
        if mark == self._mark:
            return False
        self._creatives, self._mark = Creatives.open(self._path), mark
        return True

    def _find_mark(self) -> tuple[bytes, bytes]:
        files = (self._path / "titles" / TITLES, self._creatives.clusters.path / CLUSTERS)
        try:
            return files[0].read_bytes(), files[1].read_bytes()
        except OSError as error:  # between two renames, on a file system that cannot exchange folders
            raise UnavailableError(f"{self._path}: {error}") from error

    def watch(self, every: float, stop: threading.Event, say: Callable[[object], None]) -> None:
        """Call `refresh` every `every` seconds until `stop` is set; an error is reported once until it changes."""
        said = ""
        while not stop.wait(every):
            try:
                if self.refresh():
                    say(f"hllm serve: {len(self._creatives):,} titles of {self._path}")
                said = ""
            except (ValueError, OSError) as error:
                if str(error) != said:
                    say(f"hllm serve: the titles stay: {error}")
                said = str(error)
