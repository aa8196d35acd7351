"""Features whose column has another type in a later file: their values are not taken for new ones."""

from pathlib import Path

import pytest

from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.feature_spellings import other_spellings
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.table_mapping import table

MAPPING = """
name: shop
events: {path: events.csv, user: user, item: item, time: time}
items: {path: items.csv, item: item, text: [title]}
users: {path: users*.csv, user: user, features: {age: null, vip: null}}
"""


def write_users(folder: Path, age: str, vip: tuple[str, str], name: str = "users.csv", first: int = 0) -> None:
    rows = [f"u{n},{age.format(20 + n)},{vip[n % 2]}" for n in range(first, 5)]
    (folder / name).write_text("\n".join(["user,age,vip", *rows]) + "\n")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    events = [f"u{n % 5},i{n % 3},{1_700_000_000 + n * 100}" for n in range(30)]
    (tmp_path / "events.csv").write_text("\n".join(["user,item,time", *events]) + "\n")
    (tmp_path / "items.csv").write_text("item,title\n" + "".join(f"i{n},Title {n}\n" for n in range(3)))
    write_users(tmp_path, "{}", ("True", "False"))
    (tmp_path / "map.yaml").write_text(MAPPING)
    return tmp_path


@pytest.mark.parametrize(
    ("age", "vip", "message"),
    [
        ("{}.0", ("True", "False"), r"feature age: 5 of 5 new values .* '21\.0' of '21'.* allow it \(--bad-share 1\)"),
        ("{}", ("1.0", "0.0"), r"feature vip: 2 of 2 new values are other spellings .* '0\.0' of 'False'"),
        ("{}", ("true", "false"), r"feature vip: 2 of 2 .* 'false' of 'False'"),
    ],
)
def test_a_column_of_another_type_is_refused_in_an_append(shop: Path, age: str, vip: tuple[str, str], message: str):
    prepare(table(shop / "map.yaml"), shop / "data")
    write_users(shop, age, vip)
    (shop / "day.csv").write_text("user,item,time\nu1,i1,1700100000\n")
    source = table(shop / "map.yaml", append=[shop / "day.csv"])
    with pytest.raises(ValueError, match=message):
        append_events(source, shop / "data")
    assert Dataset.open(shop / "data").version == 1
    append_events(source, shop / "data", policy=BadRows(largest_share=1.0))
    assert any("new values" in note for note in Dataset.open(shop / "data").manifest["notes"])


def test_files_of_two_types_are_refused_in_one_source(shop: Path):
    write_users(shop, "{}.0", ("True", "False"), "users-2.csv", first=3)
    write_users(shop, "{}", ("True", "False"))
    (shop / "users.csv").write_text("".join((shop / "users.csv").read_text().splitlines(keepends=True)[:4]))
    (shop / "users-2.csv").write_text((shop / "users-2.csv").read_text().replace("u4,24.0", "u4,21.0"))
    with pytest.raises(ValueError, match=r"feature age: 1 of 5 new values .* '21\.0' of '21'"):
        prepare(table(shop / "map.yaml"), shop / "data", policy=BadRows(largest_share=0.1))


def test_new_values_of_an_append_are_said(shop: Path):
    prepare(table(shop / "map.yaml"), shop / "data")
    write_users(shop, "{}1", ("True", "False"))
    append_events(table(shop / "map.yaml", append=[shop / "events.csv"]), shop / "data")
    assert "feature age: 5 new values, e.g. '201'" in Dataset.open(shop / "data").manifest["notes"]


@pytest.mark.parametrize(
    ("values", "known", "expected"),
    [
        (["1", "2", "2.0"], 2, [("2.0", "2")]),
        (["2.0", "2"], 1, [("2", "2.0")]),
        (["2", "2.0"], 2, []),  # both are known
        (["2", "2.1", "2.0"], 2, []),  # versions
        (["true", "false", "1", "0"], 2, [("1", "true"), ("0", "false")]),
        (["true", "maybe", "t"], 2, []),  # words, not truth values
        (["1", "2", "true"], 2, []),
        (["fr", "FR"], 1, []),
        ([], 0, []),
    ],
)
def test_which_values_are_one_value(values: list[str], known: int, expected: list[tuple[str, str]]):
    assert other_spellings(values, known) == expected
