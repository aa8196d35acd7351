"""`hllm creatives import`: published formats (dataset and table), and tables for an existing dataset."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.data.creative_table import WHOLE_HISTORY, CreativeTable
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.split import SPLITS
from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch import creatives
from tests.helpers import creative_fixtures, fixtures
from tests.helpers.creative_imports import creator_rows, lamp_files, write_creator
from tests.helpers.training_fixtures import config, train


def run(source: str, dataset: Path, *more: object, name: str = "published") -> int:
    given = ["import", "--source", source, "--dataset", str(dataset), "--name", name]
    return creatives.main([*given, *map(str, more)])


def rows_of(dataset: Dataset, name: str = "published") -> list[dict[str, Any]]:
    table = CreativeTable.open(dataset, name)
    return [row | {"part": split} for split in SPLITS for row in table.part(split).rows.to_pylist()]


def history(dataset: Dataset, raw_user: str) -> list[str]:
    """Return the raw ids of a user's items, in order of time."""
    user = dataset.users["raw_user_id"].to_pylist().index(raw_user) + 1
    raw_items = ["", *dataset.items["raw_item_id"].to_pylist()]
    return [raw_items[item] for item in dataset.user_events(user).item_ids]


def test_the_published_table_becomes_a_dataset_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("hllm_creator", tmp_path / "books", "--files", write_creator(tmp_path / "train.parquet")) == 0
    assert ": 10 texts (train" in capsys.readouterr().out
    dataset = Dataset.open(tmp_path / "books")
    rows = rows_of(dataset)
    for given in creator_rows():
        (row,) = [row for row in rows if row["response"] == given["response"]]
        assert history(dataset, row["raw_user_id"]) == given["item_id_list"]
        assert (row["source"], row["description"]) == (given["original_title"], given["original_description"])
        assert row["profile"] == given["user_profile"] and row["origin"] == "import:hllm_creator"
        assert row["timestamp"] is None
    assert len({row["raw_user_id"] for row in rows}) == 8
    texts = dataset.text(["title", "description"]).to_pylist()
    by_id = dict(zip(dataset.items["raw_item_id"].to_pylist(), texts, strict=True))
    assert by_id["b0"] == {"title": "Story b0", "description": ""}
    assert {"title": "A book of tea", "description": "All about tea, volume 0."} in texts
    part = CreativeTable.open(dataset, "published").part("train")
    assert set(part.timestamps.tolist()) == {WHOLE_HISTORY}
    # The same import finds its dataset; another one does not replace it.
    assert run("hllm_creator", tmp_path / "books", "--files", tmp_path / "train.parquet", name="again") == 0
    other = write_creator(tmp_path / "other.parquet", creator_rows()[:5])
    assert run("hllm_creator", tmp_path / "books", "--files", other, name="other") == 2
    assert "holds another dataset than this import; name a new folder" in capsys.readouterr().err
    assert not list(tmp_path.glob(".books-import-*"))


def test_lists_may_be_json_and_rows_without_a_text_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row | {"title_list": json.dumps(row["title_list"]), "item_id_list": json.dumps(row["item_id_list"])}
        for row in creator_rows()
    ]
    rows[0] |= {"response": " "}
    rows[1] |= {"title_list": "[]", "item_id_list": "[]"}
    rows[2] |= {"title_list": json.dumps(["another title", *["Story"] * 3])}
    rows[3] |= {"response": "two\nlines\u2028here"}
    assert run("hllm_creator", tmp_path / "books", "--files", write_creator(tmp_path / "train.parquet", rows)) == 0
    said = capsys.readouterr().out
    assert ": 8 texts" in said and "1: no history" in said and "1: no text" in said
    assert "times an item has another title than before" in said
    assert "two lines here" in [row["response"] for row in rows_of(Dataset.open(tmp_path / "books"))]


def test_lamp_becomes_a_dataset_with_the_last_pair_as_test(tmp_path: Path) -> None:
    (train, train_golds), (dev, dev_golds) = lamp_files(tmp_path, "train"), lamp_files(tmp_path, "dev")
    files = ["--questions", train, dev, "--outputs", train_golds, dev_golds]
    change(train, lambda content: content[1].update(input="No instruction: an article\ud800"))
    assert run("lamp", tmp_path / "news", "--task", "LaMP-4", *files) == 0
    dataset = Dataset.open(tmp_path / "news")
    rows = rows_of(dataset)
    assert sorted((row["raw_item_id"], row["part"] == "test") for row in rows) == sorted(
        (f"lamp-{n}-{i}0", n == 1) for n in (0, 1) for i in range(5)
    )
    (row,) = [row for row in rows if row["raw_item_id"] == "lamp-1-30"]
    assert (row["source"], row["description"], row["response"]) == (None, "News of opera: part 3.", "opera today")
    assert history(dataset, row["raw_user_id"]) == [f"1-dev3{k}" for k in (3, 2, 1, 0)]  # by date
    (bare,) = [row for row in rows if row["raw_item_id"] == "lamp-0-10"]
    assert bare["description"] == "No instruction: an article?"
    texts = dict(zip(dataset.items["raw_item_id"].to_pylist(), dataset.text(["title", "description"]).to_pylist()))
    assert texts["1-dev30"] == {"title": "opera 0", "description": "Text 0"}


def change(file: Path, how: Any) -> None:
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


def test_mistakes_of_an_import_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked, golds = lamp_files(tmp_path, "train")
    rows = creator_rows()
    files = {
        "uneven": write_creator(tmp_path / "uneven.parquet", [rows[0], rows[1] | {"title_list": ["one"]}]),
        "less": write_creator(tmp_path / "less.parquet", [{"response": "a", "title_list": ["a"]}]),
        "text": write_creator(tmp_path / "text.parquet", [row | {"title_list": "no list"} for row in rows]),
        "empty": write_creator(tmp_path / "empty.parquet", [row | {"response": ""} for row in rows]),
    }
    (tmp_path / "damaged.parquet").write_bytes(files["uneven"].read_bytes()[:-9])
    lamp = ["--task", "LaMP-4", "--questions", asked, "--outputs", golds]
    shutil.copy(golds, tmp_path / "less.json")
    change(tmp_path / "less.json", lambda content: content["golds"].pop())
    shutil.copy(asked, tmp_path / "bare.json")
    change(tmp_path / "bare.json", lambda content: content[2].pop("profile"))
    cases: list[tuple[str, list[object], str]] = [
        ("hllm_creator", ["--files", files["uneven"]], "row 1: item_id_list has 4 entries, title_list 1: they must"),
        ("hllm_creator", ["--files", files["less"]], "no column item_id_list, original_title; it has response"),
        ("hllm_creator", ["--files", files["text"]], "row 0, title_list: must be a list of ids or titles"),
        ("hllm_creator", ["--files", files["empty"]], "no sample has a history and a text"),
        ("hllm_creator", ["--files", tmp_path / "damaged.parquet"], "give Parquet files in the format"),
        ("hllm_creator", ["--files", tmp_path / "none.parquet"], "none.parquet"),
        ("hllm_creator", [], "--files is missing: --source hllm_creator needs it"),
        (
            "hllm_creator",
            ["--files", asked, "--task", "LaMP-4"],
            "--task belongs to --source lamp, not to hllm_",
        ),
        ("lamp", [*lamp[:4]], "--outputs is missing"),
        ("lamp", ["--task", "LaMP-5", *lamp[2:]], "outputs of LaMP_4, and --task is LaMP-5; give files of one task"),
        ("lamp", [*lamp[:4], "--outputs", golds, golds], "--questions has 1 files, --outputs 2"),
        ("lamp", [*lamp[:4], "--outputs", tmp_path / "less.json"], "question 4: its id '40' has no output; give"),
        ("lamp", ["--task", "LaMP-4", "--questions", golds, "--outputs", golds], "must be a list of questions"),
        (
            "lamp",
            ["--task", "LaMP-4", "--questions", tmp_path / "bare.json", "--outputs", golds],
            "question 2: no",
        ),
        ("lamp", [*lamp[:4], "--outputs", files["less"]], "no JSON (UnicodeDecodeError); give the benchmark's files"),
    ]
    for source, options, message in cases:
        assert run(source, tmp_path / "new", *options) == 2, message
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert not (tmp_path / "new").exists()


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixtures.dataset().root, tmp_path / "shop"))


TABLE = {
    "raw_user_id": ["u1", "u2", "u2", "u3"],
    "raw_item_id": ["s1", "s5", "s2", "s1"],
    "response": ["noir", "war", "a, b\nc", "drama"],
    "timestamp": [9, None, 2_000_000_000, 5],
    "part": ["train", "test", "test", "valid"],
}


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_table_of_your_own_joins_a_dataset(
    kind: str, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / f"mine.{kind}", pa.table(TABLE)
    if kind == "parquet":
        pq.write_table(table, file)
    elif kind == "csv":
        pa.csv.write_csv(table, file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    assert run("table", shop, "--files", file, name="mine") == 0
    said = capsys.readouterr().out
    assert "4 texts (train 1, valid 1, test 2); 0 left out" in said
    assert "caution: 2 texts are not later than their user's first event" in said
    rows = rows_of(Dataset.open(shop), "mine")
    names = ("raw_user_id", "raw_item_id", "timestamp", "response", "part")
    found = {tuple(row[name] for name in names) for row in rows}
    assert found == set(zip(*(TABLE[name] for name in names), strict=True))
    assert {row["origin"] for row in rows} == {"import:table"}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("raw_user_id", "u99", "row 1: raw_user_id 'u99': not in"),
        ("raw_item_id", "s99", "row 1: raw_item_id 's99': not in"),
        ("raw_item_id", None, "row 1: raw_item_id None: not in"),
        ("response", " ", "row 1: empty text; correct it, or leave such rows out by --drop-bad"),
        ("response", None, "row 1: empty text"),
        ("timestamp", -5, "row 1: wrong timestamp or weight"),
        ("timestamp", 10**12, "row 1: wrong timestamp or weight"),
        ("timestamp", "yesterday", "row 1: wrong timestamp or weight"),
    ],
)
def test_a_row_that_does_not_fit_is_named_or_left_out(
    column: str, value: object, message: str, shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = list(TABLE[column])
    values = [str(one) for one in values] if column == "timestamp" and isinstance(value, str) else values
    values[1] = value
    pq.write_table(pa.table({**TABLE, column: values}), tmp_path / "mine.parquet")
    assert run("table", shop, "--files", tmp_path / "mine.parquet", name="mine") == 2
    assert message in capsys.readouterr().err
    assert run("table", shop, "--files", tmp_path / "mine.parquet", "--drop-bad", name="mine") == 0
    assert "3 texts" in capsys.readouterr().out
    (dropped,) = pq.read_table(shop / "creatives" / "mine" / "dropped.parquet").to_pylist()
    assert len(dropped["reasons"]) == 1


def test_a_user_is_in_one_part(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({**TABLE, "part": ["train", "test", "train", "valid"]}), tmp_path / "mine.parquet")
    assert run("table", shop, "--files", tmp_path / "mine.parquet", name="mine") == 2
    assert "user 'u2' is in train and test" in capsys.readouterr().err
    pq.write_table(pa.table({**TABLE, "part": ["train", "dev", "dev", "valid"]}), tmp_path / "mine.parquet")
    assert run("table", shop, "--files", tmp_path / "mine.parquet", name="mine") == 2
    assert "part 'dev': must be one of train, valid, test" in capsys.readouterr().err


def test_a_run_on_lamp_writes_predictions_in_its_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (train_file, train_golds), (dev, dev_golds) = lamp_files(tmp_path, "train", count=12), lamp_files(tmp_path, "dev")
    files = ["--questions", train_file, dev, "--outputs", train_golds, dev_golds]
    assert run("lamp", tmp_path / "news", "--task", "LaMP-4", *files, "--fractions", 0.5, 0.5, 0) == 0
    settings = {
        **creative_fixtures.settings(max_steps=2),
        "data__dataset": tmp_path / "news",
        "creative__data": "published",
        "creative__prompt": "{user}{description}",
        "data__item_features": "[]",
        "data__user_features": "[]",
        "item_llm__text_keys": "[title, description]",
    }
    train(config(tmp_path / "run", **settings))
    destroy_distributed()
    assert creatives.main(["evaluate", "--run", str(tmp_path / "run"), "--lamp", str(tmp_path / "found.json")]) == 0
    assert "5 texts of" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["task"] == "LaMP_4" and [one["id"] for one in found["golds"]] == [f"{i}0" for i in range(5)]
    assert all(isinstance(one["output"], str) for one in found["golds"])
