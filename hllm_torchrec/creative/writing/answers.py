"""`AnswerFile`: the answers of a stage as JSON lines, appended and synced one by one: nothing is paid for twice.

    <dataset>/creatives/.answers/<name>/{profile,propose,judge}.jsonl

A line is {"key", "user", "item", "text"}; its key is the hash of the prompt, the writer and its parameters. A line that
a killed build did not finish is removed.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hllm_torchrec.common.machine_errors import path_in_errors
from hllm_torchrec.creative.writing.writer import Ask, Writer
from hllm_torchrec.data.creative_table import ANSWERS, FOLDER

_REMEDY = "remove the line (its answer is then asked for again)"


def answers_folder(root: Path, name: str) -> Path:
    """Folder of the answers for a table of the dataset in `root`."""
    return root / FOLDER / ANSWERS / name


class AnswerFile:
    """Opens the file, or makes it; one process at a time (the caller holds a lock).

    Raises:
        ValueError: a line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.texts: dict[str, str] = {}
        if path.is_file():
            self.texts = dict(self._read())

    def _read(self) -> Iterator[tuple[str, str]]:
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end < len(data):  # a build was killed while it wrote the last line
            os.truncate(self.path, end)
        for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
            yield _parsed(line, f"{self.path}, line {number}")

    def ask(self, asked: Sequence[Ask], writer: Writer) -> tuple[list[str | None], dict[int, str]]:
        """Text for each ask: from the file, or by the writer; and, for those without one, the reason by index.

        Raises:
            ValueError: the writer gives no answer at all, or one to something else.
            Preempted: the writer has reached a limit; answers so far are in the file.
        """
        keys = [ask.key(writer.name) for ask in asked]
        wanted = {key: ask for key, ask in zip(keys, asked, strict=True) if key not in self.texts}
        missing, failed = list(wanted), dict[str, str]()
        if missing:
            self._write([wanted[key] for key in missing], missing, writer, failed)
        texts = [self.texts.get(key) for key in keys]
        reasons = {
            i: failed.get(key, "the writer gave none")
            for i, (key, text) in enumerate(zip(keys, texts, strict=True))
            if text is None
        }
        return texts, reasons

    def _write(self, asked: Sequence[Ask], keys: Sequence[str], writer: Writer, failed: dict[str, str]) -> None:
        """Append the answers to `asked` as they come; failures go into `failed`, by key."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for answer in writer.write(asked):
                if not 0 <= answer.index < len(asked):
                    raise ValueError(
                        f"{writer.name} answers prompt {answer.index}, but must answer 0 to {len(asked) - 1}"
                    )
                ask, key = asked[answer.index], keys[answer.index]
                if answer.text is None:
                    failed[key] = answer.error
                    continue
                line = {"key": key, "user": ask.user, "item": ask.item, "text": answer.text}
                with path_in_errors(self.path):
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                self.texts[key] = answer.text


def _parsed(line: bytes, where: str) -> tuple[str, str]:
    try:
        found: Any = json.loads(line)
        key, text, user = found["key"], found["text"], found["user"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: no answer of a writer ({type(error).__name__}); {_REMEDY}") from None
    if not (isinstance(key, str) and isinstance(text, str) and isinstance(user, str)):
        raise ValueError(f"{where}: key, user and text must be texts; {_REMEDY}")
    return key, text
