import json
import os
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hllm_torchrec.data import token_store
from hllm_torchrec.data.append import append_events
from hllm_torchrec.data.bad_rows import BadRows
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.prepare import prepare
from hllm_torchrec.data.sources.movielens import movielens_100k
from hllm_torchrec.data.token_store import TokenStore, build_token_store, special_tokens, tokenize
from tests.helpers.source_files import ITEMS, MOVIES, memory_source, recbole_100k

SPECIAL = {"bos": "<s>", "eos": "</s>", "cls": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "pad": "[PAD]"}
PROMPT = "Compress this: "
KEYS = ["title", "year", "genres"]


def tiny_tokenizer(folder, template=None, **special):
    """Bytes as tokens; `template` is what the tokenizer itself puts around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if template:
        known = [(word, vocabulary[word]) for word in SPECIAL.values()]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=known)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(folder)
    return folder


@pytest.fixture
def dataset(tmp_path):
    source = movielens_100k(recbole_100k(tmp_path / "raw"))
    return Dataset.open(prepare(source, tmp_path / "out", split="leave_one_out"))


def expected_texts(prompt=PROMPT, separator=", "):
    rows = [[("title", t), ("year", y), ("genres", ", ".join(g))] for _, t, y, g in MOVIES]
    return [prompt, *(prompt + separator.join(f"{k}: {v}" for k, v in row if v) for row in rows)]


DECODER = {"template": "<s> $A </s>", "bos_token": "<s>", "eos_token": "</s>"}
ENCODER = {"template": "[CLS] $A [SEP]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
PLAIN = {}


@pytest.mark.parametrize("kind", [DECODER, ENCODER, PLAIN])
@pytest.mark.parametrize("length", [512, 20, 2, 1])
def test_tokens_equal_one_by_one_tokenisation(dataset, tmp_path, kind, length):
    folder = tiny_tokenizer(tmp_path / "tokenizer", **kind)
    options = {"prompt": PROMPT, "keys": KEYS, "max_text_length": length}
    store = TokenStore.open(build_token_store(dataset, folder, **options))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(store) == dataset.num_items
    for item, text in enumerate(expected_texts()):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if kind is DECODER:
            ids = [0, *ids]
        if kind is ENCODER:
            ids = ([2, *ids[: max(length - 2, 0)]])[: max(length - 1, 1)] + [3]
        tokens, cu_seqlens = store.gather(np.array([item]))
        assert tokens.tolist() == ids[:length]
        assert tokens.dtype == np.int32
        assert cu_seqlens.tolist() == [0, len(tokens)]
    assert store.facts["vocab_size"] == store.values.max() + 1


def test_encoder_tokens_are_those_of_the_tokenizer_itself(dataset, tmp_path):
    folder = tiny_tokenizer(tmp_path / "tokenizer", **ENCODER)
    store = TokenStore.open(build_token_store(dataset, folder, keys=KEYS, max_text_length=30))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for item, text in enumerate(expected_texts("")):
        whole = tokenizer(text, truncation=True, max_length=30)["input_ids"]
        assert store.gather(np.array([item]))[0].tolist() == whole


@pytest.mark.parametrize("side", ["option", "tokenizer.json"])
def test_long_texts_are_cut_at_the_side_that_the_tokenizer_names(dataset, tmp_path, side):
    folder = tiny_tokenizer(tmp_path / "tokenizer", **ENCODER, pad_token="[PAD]", truncation_side="left")
    options = {"prompt": PROMPT, "keys": KEYS, "max_text_length": 20}
    if side == "tokenizer.json":  # with padding, which is never applied
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.enable_truncation(6, direction="left")
        tokenizer.backend_tokenizer.enable_padding(length=32)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        facts = json.loads((folder / "tokenizer_config.json").read_text())
        del facts["truncation_side"]
        (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    store = TokenStore.open(build_token_store(dataset, folder, **options))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for item, text in enumerate(expected_texts()):
        expected = tokenizer(text, truncation=True, max_length=20, padding=False)["input_ids"]
        assert store.gather(np.array([item]))[0].tolist() == expected
    assert store.facts["truncation_side"] == "left"


def test_special_tokens_of_a_decoder_leave_out_what_would_follow_the_text(tmp_path):
    for number, (kind, expected) in enumerate([(DECODER, ([0], [])), (ENCODER, ([2], [3])), (PLAIN, ([], []))]):
        folder = tiny_tokenizer(tmp_path / str(number), **kind)
        assert special_tokens(AutoTokenizer.from_pretrained(folder)) == expected


def test_gather_packs_any_items_in_any_order(dataset, tmp_path):
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    store = TokenStore.open(build_token_store(dataset, folder, keys=["title"], max_text_length=99))
    ids = np.array([3, 0, 3, 1, 4, 2])
    tokens, cu_seqlens = store.gather(ids)
    assert cu_seqlens.dtype == np.int64
    assert np.array_equal(np.diff(cu_seqlens), store.lengths[ids])
    for k, item in enumerate(ids):
        one = store.values[store.offsets[item] : store.offsets[item + 1]]
        assert np.array_equal(tokens[cu_seqlens[k] : cu_seqlens[k + 1]], one)
    assert store.lengths[0] == 0, "without a prompt the unknown item has no token"
    for none in (np.array([], np.int64), np.array([0, 0])):
        tokens, cu_seqlens = store.gather(none)
        assert tokens.tolist() == []
        assert cu_seqlens.tolist() == [0] * (len(none) + 1)


@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_item_outside_the_store_is_an_error(dataset, tmp_path, wrong):
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    store = TokenStore.open(build_token_store(dataset, folder, keys=["title"], max_text_length=9))
    with pytest.raises(ValueError, match=rf"item id {wrong} is outside 0\.\.4 of the token store"):
        store.gather(np.array([1, wrong]))


def store_of(tmp_path, texts):
    """A store of these token ids, without a tokeniser."""
    values = np.array([token for text in texts for token in text], np.int32)
    return TokenStore(tmp_path, values, np.cumsum([0, *map(len, texts)]), {})


@pytest.mark.parametrize(
    ("texts", "prefix", "items"),
    [
        ([[7, 8], [7, 8, 1], [7, 8, 2, 3], [7, 8, 4]], [7, 8], [0, 1, 2, 3]),  # the prompt alone and three texts
        ([[7], [7, 8, 1], [7, 8, 2], [7, 8, 3]], [7, 8], [1, 2, 3]),  # 2 x 3 tokens saved, not 1 x 4
        ([[7], [7, 8], [7], [7]], [7], [0, 1, 2, 3]),
        ([[], [5, 1], [5, 2], [6]], [5], [1, 2]),
        ([[1], [2], [3]], [], [0, 1, 2]),  # nothing is saved
        ([[], []], [], [0, 1]),
        ([[4, 4, 4]] * 3, [4, 4, 4], [0, 1, 2]),
        ([[2, 1], *[[2, 3, 3, 3, 3]] * 2], [2, 3, 3, 3, 3], [1, 2]),  # 5 x 2, though 2 x 2 saves less than 1 x 3
        ([], [], []),
    ],
)
def test_the_prefix_is_what_most_items_begin_with(tmp_path, texts, prefix, items):
    store = store_of(tmp_path, texts)
    assert store.prefix.dtype == np.int32
    assert store.prefix.tolist() == prefix
    assert np.flatnonzero(store.begins_with_prefix).tolist() == items
    ids = np.array([*range(len(texts)), *range(len(texts))][::-1], np.int64)
    tokens, cu_seqlens, has_prefix = store.gather_behind_prefix(ids)
    rests = [tokens[a:b].tolist() for a, b in zip(cu_seqlens, cu_seqlens[1:])]
    assert [prefix * bool(has) + rest for has, rest in zip(has_prefix, rests)] == [texts[i] for i in ids]


def test_the_prompt_and_the_first_key_are_the_prefix(dataset, tmp_path):
    folder = tiny_tokenizer(tmp_path / "tokenizer", **DECODER)
    store = TokenStore.open(build_token_store(dataset, folder, prompt=PROMPT, keys=KEYS, max_text_length=99))
    whole = f"{PROMPT}title: "
    assert len(store.prefix) == 1 + len(whole)  # <s>, then bytes
    assert store.begins_with_prefix.tolist() == [False, True, True, True, True], "item 0 has the prompt alone"
    with pytest.raises(ValueError, match=r"item id 5 is outside 0\.\.4"):
        store.gather_behind_prefix(np.array([5]))


def test_missing_texts_leave_no_key_behind(tmp_path):
    items = [("i1", "a"), ("i2", "")]
    events = [("u", f"i{n % 2 + 1}", 5, n) for n in range(20)]
    policy = BadRows(largest_share=0.5)
    dataset = Dataset.open(prepare(memory_source(tmp_path, events, items), tmp_path / "out", policy=policy))
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    path = build_token_store(dataset, folder, prompt="p", keys=["title"], max_text_length=99)
    assert TokenStore.open(path).lengths.tolist() == [1, len("ptitle: a"), 1]


def test_the_store_is_built_once_for_each_request(dataset, tmp_path):
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    options = {"prompt": "", "keys": ["title"], "max_text_length": 9, "separator": ", "}
    path = build_token_store(dataset, folder, **options)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert build_token_store(dataset, folder, **options) == path
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
    assert path.parent == dataset.root / "tokens"
    changes = ({"prompt": "x"}, {"keys": ["year"]}, {"max_text_length": 8}, {"separator": "; "})
    others = [build_token_store(dataset, folder, **{**options, **change}) for change in changes]
    others.append(build_token_store(dataset, tiny_tokenizer(tmp_path / "other", **DECODER), **options))
    assert len({path, *others}) == 6
    assert sorted(os.listdir(path.parent)) == sorted(p.name for p in (path, *others))
    assert Dataset.open(dataset.root).fingerprint == dataset.fingerprint, "stores are no part of the data"


def test_a_failed_build_leaves_nothing(dataset, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken: its tokenizer .*; fetch the directory again"):
        build_token_store(dataset, folder, keys=["title"], max_text_length=9)
    assert not list((dataset.root / "tokens").glob("*"))


def test_mistakes_are_named(dataset, tmp_path):
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"no text column plot; it has title, year, genres"):
        build_token_store(dataset, folder, keys=["plot"], max_text_length=9)
    with pytest.raises(ValueError, match=r"max_text_length=0 must be at least 1"):
        build_token_store(dataset, folder, keys=["title"], max_text_length=0)
    with pytest.raises(ValueError, match=r"has no tokenizer \(no tokenizer\.json or similar\)"):
        build_token_store(dataset, tmp_path / "nothing", keys=["title"], max_text_length=9)
    with pytest.raises(ValueError, match=r"is not a token store \(no store\.json\)"):
        TokenStore.open(tmp_path)
    path = build_token_store(dataset, folder, keys=["title"], max_text_length=9)
    facts = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**facts, "items": 7}))
    with pytest.raises(ValueError, match=r"is damaged: its files and store\.json differ"):
        TokenStore.open(path)


def test_a_later_version_tokenizes_new_and_changed_texts_only(tmp_path, monkeypatch):
    folder, options = tiny_tokenizer(tmp_path / "tokenizer"), {"keys": ["title"], "max_text_length": 64}
    root = prepare(
        memory_source(tmp_path / "1", [(f"u{n}", f"i{n % 5}", 5, n) for n in range(20)], ITEMS), tmp_path / "d"
    )
    first = build_token_store(Dataset.open(root), folder, **options)
    new = [("i3", "another title"), "i99"]
    append_events(memory_source(tmp_path / "2", [("u1", "i99", 5, 30)], new), root)
    asked = []
    monkeypatch.setattr(token_store, "tokenize", lambda *given: asked.extend(given[1]) or tokenize(*given))
    dataset = Dataset.open(root)
    second = TokenStore.open(build_token_store(dataset, folder, **options))
    assert asked == ["title: another title", "title: title i99"]
    assert second.path != first and TokenStore.open(first).facts["items"] == 16
    monkeypatch.undo()
    shutil.rmtree(root / "tokens")
    whole = TokenStore.open(build_token_store(dataset, folder, **options))
    assert np.array_equal(whole.values, second.values) and np.array_equal(whole.offsets, second.offsets)
    # A version without new texts has the same store.
    append_events(memory_source(tmp_path / "3", [("u1", "i3", 5, 31)], ["i1"]), root)
    assert build_token_store(Dataset.open(root), folder, **options) == second.path


def test_a_store_that_was_never_finished_is_built_again(dataset, tmp_path):
    folder = tiny_tokenizer(tmp_path / "tokenizer", **PLAIN)
    path = build_token_store(dataset, folder, keys=KEYS, max_text_length=8)
    tokens = (path / "values.arrow").read_bytes()
    (path / "store.json").unlink()
    (path / "values.arrow").write_bytes(b"half")
    assert build_token_store(dataset, folder, keys=KEYS, max_text_length=8) == path
    assert (path / "values.arrow").read_bytes() == tokens
    assert TokenStore.open(path)
