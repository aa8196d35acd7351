"""Reader of LaMP-4 (headlines of news) and LaMP-5 (titles of papers), https://lamp-benchmark.github.io.

    *_questions.json   [{"id", "input", "profile": [{"id", "title", "text" (LaMP-5: "abstract"), "date"}]}]
    *_outputs.json     {"task": "LaMP_4", "golds": [{"id", "output"}]}

A question's profile is the user's history: titles and texts that the user wrote. The item is the article or abstract
in `input`, without the instruction before it. The item has no title, because the title is the text to write. Its id is
`lamp-`, the number of the file, `-` and the question's id.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hllm_torchrec.creative.imports.samples import Item, Sample, text_of

TASKS = {"LaMP-4": "text", "LaMP-5": "abstract"}
"""Task -> field with the texts of a profile."""
ID_PREFIX = "lamp-"
_INSTRUCTION = "Generate a "
"""Beginning of the instruction in an input, which ends with a colon."""
_REMEDY = "give the benchmark's files"


def read_lamp(task: str, questions: Sequence[Path], outputs: Sequence[Path]) -> Iterator[Sample]:
    """Yield a sample for each question of pairs of files. If there are several pairs, the last one is the test part.

    Raises:
        ValueError: a file is damaged or of another task, or a question has no output.
    """
    if len(questions) != len(outputs):
        raise ValueError(f"--questions has {len(questions)} files, --outputs {len(outputs)}: must be as many")
    for number, (asked, golds) in enumerate(zip(questions, outputs, strict=True)):
        is_test = number == len(questions) - 1 > 0
        # Files may use the same ids for other questions.
        yield from _samples(task, asked, _golds(task, golds), "test" if is_test else None, f"{number}-")


def task_of(origin: str) -> str:
    """Return the task that a table was imported from; origin: its writer.

    Raises:
        ValueError: the table was not imported from LaMP.
    """
    task = origin.removeprefix("import:")
    if task not in TASKS:
        raise ValueError(f"--lamp: the run's table is of {origin}, not of LaMP; leave the option out")
    return task


def predictions(task: str, texts: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Predictions in the form of the benchmark's outputs; texts: raw item id and predicted text of each question."""
    golds = [{"id": raw.removeprefix(ID_PREFIX).partition("-")[2], "output": text} for raw, text in texts]
    return {"task": task.replace("-", "_"), "golds": golds}


def _samples(task: str, path: Path, golds: Mapping[str, str], part: str | None, prefix: str) -> Iterator[Sample]:
    asked = _load(path)
    if not isinstance(asked, list):
        raise ValueError(f"{path}: must be a list of questions; {_REMEDY}")
    for number, question in enumerate(asked):
        where = f"{path}, question {number}"
        try:
            one, text, profile = text_of(question["id"]), text_of(question["input"]), question["profile"]
            in_order = sorted(profile, key=lambda entry: str(entry.get("date", "")))
            history = tuple(_item(entry, TASKS[task], prefix) for entry in in_order)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: no question of {task} ({str(error)[:100]}); {_REMEDY}") from None
        if one not in golds:
            raise ValueError(f"{where}: its id {one[:40]!r} has no output; give the outputs of these questions")
        article = text.partition(": ")[2] if text.startswith(_INSTRUCTION) else text
        yield Sample(history, Item(f"{ID_PREFIX}{prefix}{one}", "", article), golds[one], part=part)


def _item(entry: Mapping[str, Any], text: str, prefix: str) -> Item:
    return Item(f"{prefix}{text_of(entry['id'])}", text_of(entry["title"]), text_of(entry[text]))


def _golds(task: str, path: Path) -> dict[str, str]:
    found = _load(path)
    try:
        named = str(found["task"])
        golds = {text_of(one["id"]): text_of(one["output"]) for one in found["golds"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: no outputs of LaMP ({str(error)[:100]}); {_REMEDY}") from None
    if named.replace("_", "-") != task:
        raise ValueError(f"{path}: outputs of {named[:40]}, and --task is {task}; give files of one task")
    return golds


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({type(error).__name__}); {_REMEDY}") from None
