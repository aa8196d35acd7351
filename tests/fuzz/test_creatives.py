"""Fuzz: tables of personalized texts, files of answers, and the published formats that are imported."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.common.hashing import hash_file
from hllm_torchrec.creative.imports.hllm_creator import read_hllm_creator
from hllm_torchrec.creative.imports.lamp import read_lamp
from hllm_torchrec.creative.imports.text_table import read_text_table, reasons_of
from hllm_torchrec.creative.writing.answers import AnswerFile
from hllm_torchrec.data.creative_table import CreativeTable, forget_in_tables
from hllm_torchrec.data.dataset import Dataset
from tests.fuzz.mutations import FEW, Target, as_json, byte_changes, change_bytes, check_reader, edit, edits
from tests.helpers import creative_fixtures, fixtures
from tests.helpers.creative_imports import lamp_files, write_creator

PART = "train/part-0.parquet"
ANSWER = {"key": "k", "user": "u1", "item": "s1", "text": "a title"}


@cache
def good() -> tuple[Dataset, dict[str, bytes], Path]:
    """A copy of the shop with a table, the bytes of the table's files, and a folder with files to import."""
    path = fixtures.folder() / "fuzz-creatives"
    shutil.copytree(creative_fixtures.shop().root, path / "shop")
    table = path / "shop" / "creatives" / "lines"
    answers = path / "shop" / "creatives" / ".answers" / "lines"
    answers.mkdir(parents=True)
    write_creator(path / "published.parquet")
    lamp_files(path, "lamp")
    whole = {name: (table / name).read_bytes() for name in ("manifest.json", PART)}
    return Dataset.open(path / "shop"), whole, path


def check(mutation: Any) -> None:
    """Apply a mutation and read what was mutated."""
    dataset, whole, path = good()
    table = dataset.root / "creatives" / "lines"
    for name, data in whole.items():
        (table / name).write_bytes(data)
    answers = dataset.root / "creatives" / ".answers" / "lines" / "profile.jsonl"
    answers.write_bytes(b"")
    match mutation:
        case ("manifest", changes, of_bytes):
            data = as_json(edit(json.loads(whole["manifest.json"]), changes))
            (table / "manifest.json").write_bytes(change_bytes(data, of_bytes))
        case ("part", of_bytes):
            (table / PART).write_bytes(change_bytes(whole[PART], of_bytes))
            manifest = json.loads(whole["manifest.json"])
            manifest["files"][PART] = hash_file(table / PART)  # as if it had been written so
            (table / "manifest.json").write_text(json.dumps(manifest))
        case ("answers", changes, of_bytes):
            lines = b"".join(as_json(one) + b"\n" for one in (ANSWER, edit(ANSWER, changes), ANSWER))
            answers.write_bytes(change_bytes(lines, of_bytes))
            check_reader(lambda: AnswerFile(answers).texts.values(), [str(answers)])
            check_reader(lambda: forget_in_tables(dataset.root, ["u1"], []), [str(answers)])
            return
        case ("published", of_bytes):
            file = path / "mutated.parquet"
            file.write_bytes(change_bytes((path / "published.parquet").read_bytes(), of_bytes))
            check_reader(lambda: list(read_hllm_creator([file])), [str(file)])
            check_reader(lambda: reasons_of(read_text_table([file]), dataset), [str(file)])
            return
        case ("lamp", name, changes, of_bytes):
            asked, golds = path / "lamp_questions.json", path / "lamp_outputs.json"
            file = path / "mutated.json"
            source = asked if name == "questions" else golds
            file.write_bytes(change_bytes(as_json(edit(json.loads(source.read_bytes()), changes)), of_bytes))
            files = (file, golds) if name == "questions" else (asked, file)
            check_reader(lambda: list(read_lamp("LaMP-4", files[:1], files[1:])), [str(file), str(asked)])
            return
    check_reader(lambda: use(dataset), [str(table)])


def use(dataset: Dataset) -> None:
    """Open the table and read all rows."""
    table = CreativeTable.open(dataset, "lines")
    assert table.fingerprint
    for split in ("train", "valid", "test"):
        table.part(split)
    table.dropped()


NO_BYTES: st.SearchStrategy[list[Any]] = st.just([])
MUTATIONS = st.one_of(
    st.tuples(st.just("manifest"), edits(), byte_changes() | NO_BYTES),
    st.tuples(st.just("part"), byte_changes()),
    st.tuples(st.just("answers"), edits(), byte_changes() | NO_BYTES),
    st.tuples(st.just("published"), byte_changes()),
    st.tuples(st.just("lamp"), st.sampled_from(["questions", "outputs"]), edits(), byte_changes() | NO_BYTES),
)
TARGET = Target("creatives", MUTATIONS, check)


@FEW
@example(("manifest", [([], "set", [])], []))
@example(("manifest", [([5], "set", None)], []))
@example(("answers", [([1], "set", 5)], []))
@example(("answers", [([], "set", [])], []))
@example(("lamp", "questions", [([0, 2, 0], "set", 7)], []))
@example(("lamp", "outputs", [([1, 0], "set", [])], []))
@given(TARGET.inputs)
def test_tables_of_texts_are_read_or_refused_by_name(mutation: Any) -> None:
    check(mutation)


def test_what_is_not_mutated_is_read() -> None:
    dataset, _, path = good()
    check(("manifest", [], []))
    assert check_reader(lambda: use(dataset), [])
    assert check_reader(lambda: list(read_hllm_creator([path / "published.parquet"])), [])
    files = [path / "lamp_questions.json"], [path / "lamp_outputs.json"]
    assert check_reader(lambda: list(read_lamp("LaMP-4", *files)), [])
