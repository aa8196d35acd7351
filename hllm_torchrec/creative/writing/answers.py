"""`AnswerFile`: answers of one stage as JSON lines, so that a repeated build does not ask for an answer again.

    <dataset>/creatives/.answers/<name>/{profile,propose,judge}.jsonl

A line is {"key", "user", "item", "text"}. Its key is the hash of the prompt, the writer's name and the parameters. Each
line is appended and synced to the disk before the next answer is read. When the file is opened, an incomplete last line
of a killed build is removed.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hllm_torchrec.common.machine_errors import path_in_errors
from hllm_torchrec.common.progress import progress
from hllm_torchrec.creative.writing.writer import Ask, Writer
from hllm_torchrec.data.creative_table import ANSWERS, FOLDER

_REMEDY = "remove the line (its answer is then asked for again)"


def answers_folder(root: Path, name: str) -> Path:
    """Folder of the answers for a table of the dataset in `root`."""
    return root / FOLDER / ANSWERS / name


class AnswerFile:
    """The answers in `path`. Only one process may use the file at a time, so the caller must hold `answers_lock`.

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

    def ask(self, asks: Sequence[Ask], writer: Writer) -> tuple[list[str | None], dict[int, str]]:
        """Look up the answer to each prompt, and let the writer answer the prompts that are not in the file.

        Returns:
            The text of each answer (None if it is missing), and position -> reason of the missing answers.

        Raises:
            ValueError: the writer cannot answer any prompt, or refers to a prompt that it was not given.
            Preempted: the writer has reached a limit. The answers that it gave are in the file.
        """
        keys = [ask.key(writer.name) for ask in asks]
        missing = {key: ask for key, ask in zip(keys, asks, strict=True) if key not in self.texts}
        failed = self._write(list(missing.values()), list(missing), writer) if missing else {}
        texts = [self.texts.get(key) for key in keys]
        reasons = {
            i: failed.get(key, "the writer gave none")
            for i, (key, text) in enumerate(zip(keys, texts, strict=True))
            if text is None
        }
        return texts, reasons

    def _write(self, asks: Sequence[Ask], keys: Sequence[str], writer: Writer) -> dict[str, str]:
        """Append the writer's answers; return the reason for each prompt without one, by its key."""
        failed: dict[str, str] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with progress(len(asks), self.path.stem, unit="answer") as bar:
            for answer in writer.write(asks):
                bar.update()
                if not 0 <= answer.index < len(asks):
                    raise ValueError(
                        f"{writer.name} answers prompt {answer.index}, but must answer 0 to {len(asks) - 1}"
                    )
                ask, key = asks[answer.index], keys[answer.index]
                if answer.text is None:
                    failed[key] = answer.error
                    continue
                self._append({"key": key, "user": ask.user, "item": ask.item, "text": answer.text})
                self.texts[key] = answer.text
        return failed

    def _append(self, line: dict[str, str | None]) -> None:
        """Write a line, and wait until it is on the disk. Raises OSError naming the file if the disk is full."""
        with path_in_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _parsed(line: bytes, where: str) -> tuple[str, str]:
    try:
        found: Any = json.loads(line)
        key, text, user = found["key"], found["text"], found["user"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: no answer of a writer ({type(error).__name__}); {_REMEDY}") from None
    if not (isinstance(key, str) and isinstance(text, str) and isinstance(user, str)):
        raise ValueError(f"{where}: key, user and text must be texts; {_REMEDY}")
    return key, text
