"""Tables of creatives: reading with later versions of the dataset, errors, the template rule, tokens, forgetting."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.common.locks import hold_lock
from hllm_torchrec.config.creative import CreativeConfig
from hllm_torchrec.creative.template import UNREADABLE, TemplateRule, write_by_template
from hllm_torchrec.data.creative_table import WHOLE_HISTORY, CreativeTable, check_fractions, split_by_user, write_table
from hllm_torchrec.data.creative_tokens import CreativeTokenizer, CreativeTokens, build_creative_tokens
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.forgetting import Names, forget
from tests.helpers import creative_fixtures, fixtures


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    shutil.copytree(fixtures.dataset().root, tmp_path / "shop")
    return Dataset.open(tmp_path / "shop")


def rows(*entries: tuple[str, str, int | None, str], **columns: Any) -> pa.Table:
    users, items, times, texts = zip(*entries, strict=True)
    return pa.table(
        {
            "raw_user_id": users,
            "raw_item_id": items,
            "timestamp": pa.array(times, pa.int64()),
            "response": texts,
            **columns,
        }
    )


def test_rows_are_read_by_user_and_second(dataset: Dataset) -> None:
    given = rows(("u2", "s1", None, "drama"), ("u2", "s5", 7, "war"), ("u1", "s1", 9, "noir"))
    write_table(dataset, "mine", {"train": given, "test": rows(("u3", "s1", 1, "war"))}, facts={"writer": "me"})
    table = CreativeTable.open(dataset, "mine")
    part = table.part("train")
    assert part.user_ids.tolist() == [2, 3, 3] and part.timestamps.tolist() == [9, 7, WHOLE_HISTORY]
    assert part.rows["response"].to_pylist() == ["noir", "war", "drama"] and part.weights.tolist() == [1, 1, 1]
    assert len(table.part("valid")) == 0 and table.manifest["writer"] == "me"
    assert table.manifest["counts"] == {"train": 3, "test": 1}


def test_what_does_not_fit_is_named(dataset: Dataset) -> None:
    good = rows(("u1", "s1", 9, "noir"))
    cases: dict[str, dict[str, pa.Table]] = {
        r"raw_user_id 'u999': not in .* \(did you mean": {"train": rows(("u999", "s1", 9, "noir"))},
        r"raw_item_id 's999': not in": {"train": rows(("u1", "s999", 9, "noir"))},
        r"no column 'response'; the rows need": {"train": good.drop_columns("response")},
        r"user 'u1' is in train and test: all rows of a user": {"train": good, "test": good},
    }
    for message, parts in cases.items():
        with pytest.raises(ValueError, match=message):
            write_table(dataset, "bad", parts)
    assert not (dataset.root / "creatives" / "bad").exists()
    write_table(dataset, "mine", {"train": rows(("u1", "s1", 9, "noir"), ("u1", "s1", 9, " "))})
    with pytest.raises(ValueError, match="exists; choose another --name"):
        write_table(dataset, "mine", {"train": good})
    with pytest.raises(ValueError, match="row 1: response is empty; build the table again"):
        CreativeTable.open(dataset, "mine").part("train")
    with pytest.raises(ValueError, match=r"no table of creatives \(did you mean 'mine'\?\); there are mine: make one"):
        CreativeTable.open(dataset, "mime")
    pq.write_table(good, dataset.root / "creatives" / "mine" / "train" / "part-0.parquet")
    with pytest.raises(ValueError, match="missing or changed since the table was written"):
        CreativeTable.open(dataset, "mine")


def test_two_processes_do_not_write_a_table_at_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HLLM_LOCK_WAIT", "0")
    given = {"train": rows(("u1", "s1", 9, "noir"))}
    (dataset.root / "creatives").mkdir(exist_ok=True)
    with hold_lock(dataset.root / "creatives" / ".lock", "the other process"):
        with pytest.raises(ValueError, match=r"creatives/mine: another process is writing a table \(process \d+ on"):
            write_table(dataset, "mine", given)
    write_table(dataset, "mine", given)


def test_a_table_of_other_ids_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    write_table(dataset, "mine", {"train": rows(("u1", "s1", 9, "noir"))})
    other = Dataset.open(fixtures.dataset("leave_one_out").root)
    assert CreativeTable.open(dataset, "mine").part("train").item_ids.tolist() == [2]
    file = dataset.root / "creatives" / "mine" / "manifest.json"
    file.write_text(file.read_text().replace(other.manifest["vocabulary"]["items"]["value"], "00" * 16))
    with pytest.raises(ValueError, match="made with other ids than those of .*: items"):
        CreativeTable.open(dataset, "mine")


def test_the_rule_names_the_value_with_the_largest_lift_and_sees_nothing_of_its_second() -> None:
    dataset, rule = creative_fixtures.shop(), TemplateRule(least=1, recent=4)
    table, dropped = write_by_template(dataset, rule)
    values, offsets = dataset.feature_ids("item", "genres")
    names = ["", *dataset.feature_values("genres").to_pylist()]
    of = [[names[v] for v in values[offsets[i] : offsets[i + 1]]] for i in range(dataset.num_items)]
    titles, likes = ["", *dataset.text(["title"])["title"].to_pylist()], []
    for user in range(1, dataset.num_users):
        events = dataset.user_events(user)
        likes.append([(i, t) for i, t, y in zip(events.item_ids, events.timestamps, events.labels) if y == 1])
    everything = [item for one in likes for item, _ in one]
    expected = []
    for user, own in enumerate(likes, start=1):
        for item, second in own:
            recent = [i for i, t in own if t < second][-4:]
            share = (
                {g: np.mean([g in of[i] for i in recent]) / np.mean([g in of[i] for i in everything]) for g in of[item]}
                if recent
                else {}
            )
            if len(of[item]) > 1 and recent and max(share.values()) > 0:
                best = max(of[item], key=lambda g: share[g])
                liked = next((i for i in recent[::-1] if best in of[i] and titles[i]), None)
                if liked is None:
                    continue
                expected.append((f"u{user - 1}", second, f"{best}, for fans of {titles[liked]}"))
    columns = [table[name].to_pylist() for name in ("raw_user_id", "timestamp", "response")]
    raw = dataset.users["raw_user_id"].to_pylist()
    assert sorted(zip(*columns, strict=True)) == sorted((raw[int(u[1:])], s, t) for u, s, t in expected)
    assert len(table) + sum(dropped.values()) == len(everything)


def test_a_rule_writes_no_text_about_an_item_without_a_name_nor_with_control_characters(dataset: Dataset) -> None:
    whole, _ = write_by_template(dataset, TemplateRule(least=1))
    items = pq.read_table(dataset.root / "items.parquet")
    names = [[None, "  ", "a\x1b[31m"][n % 3] if n % 4 else "word1" for n in range(len(items))]
    at = items.column_names.index("title")
    pq.write_table(items.set_column(at, "title", pa.array(names)), dataset.root / "items.parquet")
    manifest = json.loads((dataset.root / "manifest.json").read_text())
    manifest["files"]["items.parquet"]["bytes"] = (dataset.root / "items.parquet").stat().st_size
    (dataset.root / "manifest.json").write_text(json.dumps(manifest))
    found, dropped = write_by_template(Dataset.open(dataset.root), TemplateRule(least=1))
    texts = found["response"].to_pylist()
    assert texts and all(text.endswith("for fans of word1") for text in texts)
    assert len(texts) + dropped[UNREADABLE] == len(whole)
    with pytest.raises(ValueError, match="{likd} is neither {value} nor {liked}"):
        write_by_template(dataset, TemplateRule(template="{value} {likd}"))
    for wrong in ((math.nan, 0.5, 0.5), (1.5, -0.5, 0.0), (0.0, 0.5, 0.5), (0.5, 0.5, 0.5)):
        with pytest.raises(ValueError, match="--fractions .*: give three shares"):
            check_fractions(wrong)


def section(**fields: Any) -> CreativeConfig:
    given = {"enabled": True, "data": "lines", "shape": creative_fixtures.WRITER, "prompt": creative_fixtures.PROMPT}
    return CreativeConfig(**{**given, "tokenizer": str(creative_fixtures.tokenizer_dir()), **fields})


def test_texts_are_inserted_by_parts_and_cut_responses_have_no_end() -> None:
    tokenizer = CreativeTokenizer(section(max_response_length=3))
    # A title that spells a placeholder or a special token stays text; unknown words are [UNK], id 0.
    prompt = tokenizer.prompts({"title": ["{user} {brand} [END] word1"], "brand": ["word2"]}, 1)[0]
    known = tokenizer.tokenizer.get_vocab()
    assert prompt.before == [known["write"], known["for"]]
    assert prompt.after[-3:] == [known["by"], known["word2"], known[","]] and tokenizer.end not in prompt.after
    short, exact, cut = tokenizer.responses(["word1", "word1 word2", "word1 word2 word3"])
    assert short == [known["word1"], tokenizer.end] and exact[-1] == tokenizer.end
    assert cut == [known["word1"], known["word2"], known["word3"]]
    assert tokenizer.decode(short) == "word1"


def test_tokens_of_a_part_are_its_prompts_and_responses() -> None:
    dataset = creative_fixtures.shop()
    table, own = CreativeTable.open(dataset, "lines"), section()
    folder = build_creative_tokens(dataset, table, own)
    assert build_creative_tokens(dataset, table, own) == folder
    tokens, part, tokenizer = CreativeTokens(folder, "test"), table.part("test"), CreativeTokenizer(own)
    texts = tokens.gather(np.arange(len(tokens)))
    assert texts.prefix_ids.tolist() == tokenizer.prompts({"title": [""], "brand": [""]}, 1)[0].before
    columns = dataset.text(["title", "brand"])
    for n in range(0, len(tokens), 7):
        row = int(part.item_ids[tokens.rows[n]]) - 1
        named = {name: [columns[name][row].as_py()] for name in ("title", "brand")}
        expected = tokenizer.prompts(named, 1)[0].after + tokenizer.responses([part.rows["response"][n].as_py()])[0]
        assert texts.token_ids[texts.cu_seqlens[n] : texts.cu_seqlens[n + 1]].tolist() == expected
        assert int(texts.soft_at[n]) == 0
    with pytest.raises(ConfigError, match=r"creative\.max_prompt_length: 6: \d+ prompts of lines, train are longer"):
        build_creative_tokens(dataset, table, section(max_prompt_length=6))
    dropped = CreativeTokens(
        build_creative_tokens(dataset, table, section(max_prompt_length=9, over_long="drop")), "train"
    )
    assert 0 < dropped.facts["dropped"]["train"] == len(table.part("train")) - len(dropped)
    with pytest.raises(ConfigError, match=r"creative\.prompt: \{colour\}: no text column of .*; there are title, b"):
        build_creative_tokens(dataset, table, section(prompt="{user} {colour}"))


def test_forgetting_reaches_the_tables_and_their_tokens(dataset: Dataset) -> None:
    given = {"train": rows(("u1", "s1", 9, "noir"), ("u2", "s5", 7, "war")), "test": rows(("u3", "s1", 1, "war"))}
    write_table(dataset, "mine", given, dropped=rows(("u1", "s5", 2, "drama"), reasons=[["long"]]))
    tokens = build_creative_tokens(dataset, CreativeTable.open(dataset, "mine"), section(data="mine"))
    dry = forget(dataset.root, Names(users=["u1"], items=["s5"]), dry_run=True)
    assert dry.found["creatives"] == 3 and tokens.exists()
    assert forget(dataset.root, Names(users=["u1"], items=["s5"])).found["creatives"] == 3
    table = CreativeTable.open(Dataset.open(dataset.root), "mine")
    assert len(table.part("train")) == 0 and table.part("test").rows["raw_user_id"].to_pylist() == ["u3"]
    assert table.manifest["counts"] == {"train": 0, "test": 1} and not tokens.exists()
    assert forget(dataset.root, Names(users=["u1"])).found["creatives"] == 0


def test_users_are_split_as_a_whole() -> None:
    users = [f"u{n % 50}" for n in range(500)]
    found = list(split_by_user(users, (0.6, 0.2, 0.2)))
    assert dict(zip(users, found)) == dict(zip(users[::-1], found[::-1]))
    assert 20 <= sum(p == "train" for p in found[:50]) <= 40 and set(found) == {"train", "valid", "test"}
