"""What messages tell people to do works: each is provoked, its remedy followed to the letter, and the message gone.

A message that names a command, an option or a setting belongs to a case here, or to NOT_RUN with the reason.
"""

import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.launch.cli import main
from hllm_torchrec.models.assembly import build_experiment
from tests.docs.messages import GAP, ROOT, messages
from tests.docs.remedies_not_run import ELSEWHERE, NOT_RUN
from tests.docs.test_remedies import COMMAND, OPTION, SETTING, settings
from tests.helpers import fixtures
from tests.helpers.training_fixtures import ITEM_LLAMA, USER_LLAMA, config, train

HSTU = {"width": 24, "layers": 1, "heads": 2}
SASREC = {"width": 24, "layers": 1, "heads": 2, "max_positions": 64}
STORED = [{"name": "II", "epochs": 1, "item_embeddings": "stored"}]
ID_ONLY = {"item_llm__enabled": False}
Settings = dict[str, Any]

CONFIGURATIONS: list[tuple[str, Settings, Settings]] = [
    # (part of the message, what provokes it, what the remedy adds)
    ("must be □ under evaluation.protocol □", {"evaluation__protocol": "leave_one_out"},
   {"objective__positive_targets_only": False}),
    ("evaluation.every: □: must be at least the □ epochs of all stages, with evaluation.patience 0",
     {"data__train_part": "train_and_valid", "evaluation__every": 0.5}, {"evaluation__every": 1}),
    ("data.train_late_after: without data.train_since", {"data__train_late_after": 1},
     {"data__train_since": "2014-05-20"}),
    ("user.encoder: □: must be one of □, or □□", {"user__encoder": "lm"}, {"user__encoder": "llm"}),
    ("features.new_rows: 'neighbors': items have neither text nor features",
     {"features__new_rows": "neighbors", "data__item_features": [], **ID_ONLY}, {"features__new_rows": "unknown"}),
    ("data.stochastic_length: □: must be 0 (off), or above 1", {"data__stochastic_length": 0.5},
     {"data__stochastic_length": 1.6}),
    ("optim.betas: □: each must be", {"optim__betas": [1.0, 0.9]}, {"optim__betas": [0.9, 0.98]}),
    ("data.evidence: □: objective.fusion 'none' has no head",
     {"data__evidence": ["items"], "objective__fusion": "none"}, {"data__evidence": []}),
    ("data.evidence: 'neighbors' compares texts", {"data__evidence": ["neighbors"], **ID_ONLY}, {"data__evidence": []}),
    ("data.evidence: '□' needs text embeddings that do not change", {"data__evidence": ["neighbors"]},
     {"item_llm__trainable": False}),
    ("item_llm.standardise: true with item_llm.whiten", {"item_llm__standardise": True, "item_llm__whiten": True},
   {"item_llm__standardise": False}),
    ("objective.text_similarity: □: needs an Item LLM, objective.item_space features",
     {"objective__text_similarity": 0.6, "objective__generative_weight": 0.1}, {"objective__item_space": "features"}),
    ("objective.text_similarity: action tokens have no text", {"objective__text_similarity": 0.6,
     "objective__generative_weight": 0.1, "objective__item_space": "features", "user__actions": "interleaved"},
   {"user__actions": "summed"}),
    ("item_llm.enabled: false while stages have item_embeddings: stored", {"stages": STORED, **ID_ONLY},
     {"stages": [{"name": "I", "epochs": 1}]}),
    ("item_llm.store: none: item_embeddings: stored needs the store", {"stages": STORED}, {"item_llm__store": "ITEMS"}),
    (", or item_llm.enabled: false for a model without texts", {"item_llm__shape": None}, ID_ONLY),
    ("user.actions: 'interleaved' while features.action is false",
     {"user__actions": "interleaved", "features__action": False}, {"features__action": True}),
    ("user.actions: 'interleaved' with features.action_gate",
     {"user__actions": "interleaved", "features__action_gate": True}, {"features__action_gate": False}),
    ("user.□: □: only for user.encoder llm; leave it out",
     {"user__encoder": "hstu", "user__shape": HSTU, "user__layers": 1}, {"user__layers": None}),
    ("user.shape.max_positions: □: must be at least the longest history",
     {"user__encoder": "sasrec", "user__shape": SASREC | {"max_positions": 8}}, {"user__shape": SASREC}),
    ("user.shape.count_from: 'end': only with objective.fusion none",
     {"user__encoder": "sasrec", "user__shape": SASREC | {"count_from": "end"}},
     {"user__shape": SASREC | {"count_from": "start"}}),
    ("user.shape.time_of: 'next': only with objective.fusion none",
     {"user__encoder": "hstu", "user__shape": HSTU | {"time_of": "next"}},
     {"user__shape": HSTU | {"time_of": "event"}}),
    ("objective.mask_cosine_above: □: only for generative_loss infonce",
     {"objective__mask_cosine_above": 0.99, "objective__generative_loss": "bce"},
     {"objective__mask_cosine_above": None}),
    ("features.item_id: false while item_llm.enabled is false", {"features__item_id": False, **ID_ONLY},
     {"features__item_id": True}),
    ("objective.item_space: 'text' while item_llm.enabled is false",
     {"objective__item_space": "text", "objective__generative_weight": 1, **ID_ONLY},
     {"objective__item_space": "features"}),
    ("evaluation.retrieval: true without a generative loss", {"evaluation__retrieval": True},
     {"objective__generative_weight": 0.1}),
    ("evaluation.ks: □: give at least one K",
     {"evaluation__retrieval": True, "objective__generative_weight": 1, "evaluation__ks": []},
     {"evaluation__ks": [1]}),
    ("item_llm.lora.rank: □ while item_llm.enabled is false", {"item_llm__lora": {"rank": 4}, **ID_ONLY},
     {"item_llm__lora": {"rank": 0}}),
    ("user.lora.rank: □: user.encoder □ is not a Hugging Face decoder",
     {"user__encoder": "hstu", "user__shape": HSTU, "user__lora": {"rank": 4}}, {"user__lora": {"rank": 0}}),
    ("data.train_since: □", {"data__train_since": "yesterday"}, {"data__train_since": "2014-05-20"}),
    ("optim.table_optimizer: □: must be one of □□", {"optim__table_optimizer": "adagrd"},
     {"optim__table_optimizer": "adagrad"}),
    ("optim.table_options.□: no option of □: □", {"optim__table_options": {"bta": 1}}, {"optim__table_options": {}}),
    ("item_llm.standardise: true with item_llm.whiten", {"item_llm__standardise": True, "item_llm__whiten": True},
     {"item_llm__standardise": False}),
    ("objective.tasks: objective.fusion 'none' has no head",
     {"objective__tasks": {"label": {}}, "objective__fusion": "none"}, {"objective__tasks": {}}),
    ("objective.value_weight: □: with objective.tasks the value is a task",
     {"objective__tasks": {"label": {}}, "objective__value_weight": 0.1}, {"objective__tasks": {}}),
    ("objective.classification_weight: 0 without a generative loss", {"objective__classification_weight": 0},
     {"objective__generative_weight": 0.1}),
    ("objective.position_bias: □ is in data.context too",
     {"objective__position_bias": ["slot"], "data__context": ["slot"]}, {"data__context": []}),
    ("objective.position_bias: objective.fusion 'none' has no logit",
     {"objective__position_bias": ["slot"], "objective__fusion": "none"}, {"objective__position_bias": []}),
    ("objective.task_weighting: 'uncertainty' weighs several tasks", {"objective__task_weighting": "uncertainty"},
     {"objective__tasks": {"label": {}, "like": {}}}),
    ("objective.text_similarity: □: needs an Item LLM", {"objective__text_similarity": 0.1},
     {"objective__text_similarity": 0}),
    ("objective.text_similarity: action tokens have no text",
     {"objective__text_similarity": 0.1, "user__actions": "interleaved", "objective__item_space": "features",
      "objective__generative_weight": 0.1}, {"user__actions": "summed"}),
]  # fmt: skip
MODELS: list[tuple[str, Settings, Settings]] = [
    # The same, found when the model is built.
    ("data.numeric_features: □: unknown; there are □", {"data__numeric_features": ["user_meen"]},
     {"data__numeric_features": ["user_mean"]}),
    ("data.evidence: □: unknown; there are □", {"data__evidence": ["item"]}, {"data__evidence": ["items"]}),
    ("data.evidence: □ multiplies columns of other groups: name □ as well", {"data__evidence": ["crosses"]},
     {"data__evidence": ["crosses", "items"]}),
    ("data.item_vectors: □: must be a plain name", {"data__item_vectors": ["../mine"]},
     {"data__item_vectors": ["factors"]}),
    ("data.item_vectors: □: no file □; save a float32 array [□, V] there, or use `factors`",
     {"data__item_vectors": ["mine"]}, {"data__item_vectors": ["factors"]}),
    ("optim.table_optimizer: □: FBGEMM has it on CUDA only; on a CPU choose", {"optim__table_optimizer": "adam"},
     {"optim__table_optimizer": "rowwise_adagrad"}),
    ("features.sharding: 'row_wise': TorchRec's CPU tables have no row-wise bags", {"features__sharding": "row_wise"},
     {"features__sharding": "column_wise"}),
    ("parallel.dense: fsdp: □ as □ cannot be packed, and its padded batches differ",
     {"parallel__dense": "fsdp", "item_llm__shape": ITEM_LLAMA | {"model_type": "stablelm"}},
     {"parallel__dense": "ddp"}),
    ("item_llm.store: □: no embedding store (no store.json); make it with `hllm embed --items □`",
     {"stages": STORED, "item_llm__store": "nowhere"}, {"item_llm__store": "ITEMS"}),
    ("data.dataset: □: split by □; evaluation.protocol □ needs one prepared with --split □",
     {"evaluation__protocol": "leave_one_out", "objective__positive_targets_only": False},
     {"data__dataset": "LEAVE_ONE_OUT"}),
    ("□.pretrained: □: not a Hugging Face directory (no config.json); download one",
     {"user__pretrained": "nowhere", "user__shape": None}, {"user__pretrained": None, "user__shape": USER_LLAMA}),
]  # fmt: skip


@cache
def world() -> Path:
    """A source with its mapping, a dataset, a run with its predictions and stores, and rows of predictions."""
    root = fixtures.folder() / "remedies"
    fixtures.write_shop(root / "shop")
    _other_sources(root / "shop")
    shutil.copytree(fixtures.dataset().root, root / "data")
    rng, n = np.random.default_rng(0), 80
    table = pa.table({
        "label": (rng.random(n) < 0.5).astype(float), "score": rng.normal(size=n), "other": rng.normal(size=n),
        "logit": rng.normal(size=n) * 9, "probability": rng.random(n), "user_id": rng.integers(0, 9, n),
        "item_id": rng.integers(0, 9, n), "timestamp": 10**18 + np.arange(n),
    })  # fmt: skip
    pq.write_table(table.drop_columns(["timestamp"]), root / "rows.parquet")
    pq.write_table(table, root / "timed.parquet")
    pq.write_table(table.drop_columns(["timestamp"])[:70], root / "fewer.parquet")
    pq.write_table(table.select(["label", "score"]), root / "bare.parquet")
    pq.write_table(table.rename_columns([name.replace("label", "clicked") for name in table.column_names]),
                   root / "clicked.parquet")  # fmt: skip
    pq.write_table(table.select(["user_id", "item_id", "label"]).rename_columns(["who", "what", "label"]),
                   root / "named.parquet")  # fmt: skip
    (root / "full").mkdir()
    (root / "full" / "note").write_text("mine\n")
    return root


def _other_sources(shop: Path) -> None:
    """Mappings of the same shop without a feature, with half of its events, and with rows without a time."""
    mapping, events = (shop / "mapping.yaml").read_text(), pa.csv.read_csv(shop / "events.csv")
    other = yaml.safe_load(mapping)
    del other["items"]["features"]
    (shop / "other.yaml").write_text(yaml.safe_dump(other))
    (shop / "other_half.yaml").write_text((shop / "other.yaml").read_text().replace("events.csv", "half.csv"))
    (shop / "items.json").write_text('{"asin": "s1", "title": "a book"}\n')
    seconds = events["second"].to_pylist()
    for name, kept, bad in (("half", 0.5, 0), ("one_bad", 1, 1), ("bad", 1, len(seconds) // 2)):
        column = pa.array([None] * bad + seconds[bad:])
        table = events.set_column(events.column_names.index("second"), "second", column)
        pa.csv.write_csv(table[: int(kept * len(table))], shop / f"{name}.csv")
        (shop / f"{name}.yaml").write_text(mapping.replace("events.csv", f"{name}.csv"))


@cache
def run() -> Path:
    """A trained run, with stores of its items and users."""
    root = world()
    settings = {"data__dataset": root / "data", "objective__generative_weight": 0.1, "max_steps": 2}
    train(config(root / "run", **settings))
    destroy_distributed()
    say("embed", f"--run {root}/run --checkpoint latest --items {root}/items --users {root}/users")
    return root / "run"


def say(command: str, words: str) -> int:
    """Run a command line in this process; its exit status."""
    try:
        return main([command, *words.split()])
    except SystemExit as left:
        return int(left.code or 0)


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def pattern(part: str) -> str:
    """Regular expression of the messages with this part."""
    return re.escape(part).replace(GAP, "(?s:.*)")


def accept(tmp_path: Path, given: Settings, is_built: bool) -> None:
    """Load the configuration and, if asked, build the model."""
    values = {"data__dataset": world() / "data"} | given
    if values["data__dataset"] == "LEAVE_ONE_OUT":
        values["data__dataset"] = fixtures.dataset("leave_one_out").root
    if values.get("item_llm__store") == "ITEMS":
        values |= {"item_llm__store": run().parent / "items", "objective__generative_weight": 0.1}
    loaded = config(tmp_path / "run", **values)
    if is_built:
        build_experiment(loaded, init_distributed())


SETTINGS = [(*case, case in MODELS) for case in CONFIGURATIONS + MODELS]


@pytest.mark.parametrize(("part", "wrong", "remedy", "is_built"), SETTINGS, ids=[part for part, *_ in SETTINGS])
def test_a_setting_that_a_message_asks_for_is_accepted(
    part: str, wrong: Settings, remedy: Settings, is_built: bool, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, ValueError), match=pattern(part)):
        accept(tmp_path, wrong, is_built)
    destroy_distributed()
    accept(tmp_path, wrong | remedy, is_built)


PREPARE = "prepare --source table --path {shop}/mapping.yaml --output {new}"
EVALUATE = "evaluate --split valid --draws 0 --no-tensorboard --output {new} --predictions a={root}/rows.parquet"
COMMANDS: list[tuple[str, str, str]] = [
    # (part of the message, a command line that provokes it, the line with the remedy)
    ("--time-unit belongs to □, not to □ (table: set it in the mapping)", f"{PREPARE} --time-unit seconds", PREPARE),
    ("--items belongs to □, not to □", f"{PREPARE} --items {{shop}}/items.csv", PREPARE),
    ("--html belongs to □, not to □ (table: set items.html in the mapping)", f"{PREPARE} --html keep", PREPARE),
    ("--path is missing: □ cannot be fetched", "prepare --source table --output {new}", PREPARE),
    ("split date: train until □, valid until □: give both (--train-until, --valid-until)",
     f"{PREPARE} --train-until 2014-06-01", f"{PREPARE} --train-until 2014-05-20 --valid-until 2014-05-25"),
    ("split.rule=□ with dates: --train-until and --valid-until are of --split date",
     f"{PREPARE} --split time --train-until 2014-05-20 --valid-until 2014-05-25",
     f"{PREPARE} --split date --train-until 2014-05-20 --valid-until 2014-05-25"),
    ("--bad-rows □: no kind □; kinds: □", f"{PREPARE} --bad-rows bad_tmie=drop", f"{PREPARE} --bad-rows bad_time=drop"),
    ("□ holds another dataset (□; different: □). Choose another folder, or overwrite it (--overwrite)",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --min-events 2",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --min-events 2 --overwrite"),
    ("□: a k-core is one of all events; prepare all again (--extend)",
     "prepare --source table --path {shop}/half.yaml --output {core} --append",
     "prepare --source table --path {shop}/mapping.yaml --output {core} --extend"),
    ("□: held-out items measure cold start on fixed events; prepare all again (--extend)",
     "prepare --source table --path {shop}/half.yaml --output {held} --append",
     "prepare --source table --path {shop}/mapping.yaml --output {held} --extend"),
    ("□: the □ of the source are □, those of the dataset □; give the source with which it was prepared, or prepare",
     "prepare --source table --path {shop}/other_half.yaml --output {data} --append",
     "prepare --source table --path {shop}/other.yaml --output {data} --extend"),
    ("□: the source has □ events, the dataset □: --extend is for a full export",
     "prepare --source table --path {shop}/half.yaml --output {data} --extend",
     "prepare --source table --path {shop}/half.yaml --output {data} --extend --allow-fewer"),
    ("□, row □: □. Correct the row, or set the policy □ to □ (--bad-rows □=□), to count it and go on",
     PREPARE.replace("mapping", "one_bad"), PREPARE.replace("mapping", "one_bad") + " --bad-rows bad_time=drop"),
    ("or allow a larger share (--bad-share □)", PREPARE.replace("mapping", "bad") + " --bad-rows bad_time=drop",
     PREPARE.replace("mapping", "bad") + " --bad-rows bad_time=drop --bad-share 1"),
    ("□ □, the manifest says □; prepare again with --overwrite", "baselines --dataset {cut} --output {new}",
     "prepare --source table --path {shop}/mapping.yaml --output {cut} --overwrite"),
    ("□: its first line is □; an Amazon rating file has user, item, rating and timestamp",
     "prepare --source amazon --path {shop}/events.csv --items {shop}/items.json --output {new}", PREPARE),
    ("--append --split □: the dataset is split by □, and only dates can move",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append --split leave_one_out",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append"),
    ("--append --min-events □: a k-core is one of all events; leave it out",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append --min-events 2",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append"),
    ("--append --hold-out-items □: held-out items are fixed; leave it out",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append --hold-out-items 0.1",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append"),
    ("□ is not a prepared dataset: no □. Make one with `hllm prepare --output □`", "dataset info {new}", PREPARE),
    ("nothing to evaluate: name a run (--run-dir) or predictions (--compare, --predictions)",
     "evaluate --output {new}", EVALUATE),
    ("--predictions □: must be NAME=PATH", "evaluate --predictions {root}/rows.parquet", EVALUATE),
    ("two models are named □; give one a name with --predictions NAME=PATH", f"{EVALUATE} a={{root}}/rows.parquet",
     f"{EVALUATE} b={{root}}/rows.parquet"),
    ("--spill □: no such directory; create it, or leave the option out", f"{EVALUATE} --spill {{new}}/x", EVALUATE),
    ("--train □ is not a file or a directory", f"{EVALUATE} --train {{new}}/x", EVALUATE),
    ("□ is of a run; name it with --run-dir, or leave it out", f"{EVALUATE} --checkpoint latest", EVALUATE),
    ("--□ belongs to the regression gate; name its reference with --baseline", f"{EVALUATE} --max-drop 1",
     f"{EVALUATE} b={{root}}/rows.parquet --max-drop 1 --baseline b"),
    ("--baseline □ is neither a file nor a compared model", f"{EVALUATE} --baseline b",
     f"{EVALUATE} b={{root}}/rows.parquet --baseline b"),
    ("--baseline □ is the model to be judged itself; name another of the comparison",
     f"{EVALUATE} b={{root}}/rows.parquet --baseline a", f"{EVALUATE} b={{root}}/rows.parquet --baseline b"),
    ("users (--user) with rows of both classes",
     "evaluate --split valid --draws 0 --no-tensorboard --output {new} --predictions a={root}/bare.parquet "
     "b={root}/bare.parquet --baseline b --max-gauc-drop 0.1",
     "evaluate --split valid --draws 0 --no-tensorboard --output {new} --predictions a={root}/rows.parquet "
     "b={root}/rows.parquet --baseline b --max-gauc-drop 0.1 --user user_id"),
    ("no column 'label'; it has □; name the column of labels with --label",
     EVALUATE.replace("rows.parquet", "clicked.parquet") + " --timestamp NONE",
     EVALUATE.replace("rows.parquet", "clicked.parquet") + " --timestamp NONE --label clicked"),
    ("a probability lies in 0..1; pass a logit through the sigmoid, or leave --probability out",
     f"{EVALUATE} --probability a=logit", EVALUATE),
    ("□; give seconds, or leave it out (--timestamp NONE)", EVALUATE.replace("rows.parquet", "timed.parquet"),
     EVALUATE.replace("rows.parquet", "timed.parquet") + " --timestamp NONE"),
    ("□ has □ rows, □ □; models are compared row by row: write both in one order, or put both scores into one file",
     f"{EVALUATE} b={{root}}/fewer.parquet", f"{EVALUATE} b={{root}}/rows.parquet --score b=other"),
    ("--train needs columns of users and items in both; name them with --user and --item",
     EVALUATE.replace("rows.parquet", "bare.parquet") + " --train {root}/rows.parquet",
     f"{EVALUATE} --train {{root}}/rows.parquet --user user_id --item item_id"),
    ("name a store: --items, --users or both", "embed --run {run} --checkpoint latest",
     "embed --run {run} --checkpoint latest --items {new}"),
    ("--items and --users are one folder, □: items and users need a store each",
     "embed --run {run} --checkpoint latest --items {new} --users {new}",
     "embed --run {run} --checkpoint latest --items {new}/i --users {new}/u"),
    ("name a store: --users, --items or both", "exposures --run {run} --checkpoint latest",
     "exposures --run {run} --checkpoint latest --users {new}"),
    ("--checkpoint □: neither best nor latest nor a directory", "embed --run {run} --checkpoint lst --items {new}",
     "embed --run {run} --checkpoint latest --items {new}"),
    ("--dataset □: no such directory; name one that `hllm prepare` wrote",
     "embed --run {run} --checkpoint latest --items {new} --dataset {new}/x",
     "embed --run {run} --checkpoint latest --items {new} --dataset {root}/data"),
    ("; name the directory with --dataset", "embed --run {moved} --checkpoint latest --items {new}",
     "embed --run {moved} --checkpoint latest --items {new} --dataset {root}/data"),
    ("--output □: already exists: choose another folder, or remove it",
     "index --run {run} --checkpoint latest --output {root}/full",
     "index --run {run} --checkpoint latest --output {new}"),
    ("□ was trained with other ids than those of □: □. Name the run's dataset or a later version of it (--dataset",
     "embed --run {run} --checkpoint latest --items {new} --dataset {others}",
     "embed --run {run} --checkpoint latest --items {new} --dataset {root}/data"),
    ("--output □: must be a folder of this machine", "index --run {run} --checkpoint latest --output memory://index",
     "index --run {run} --checkpoint latest --output {new}"),
    ("at a URL no run pins its version: name the versions", "dataset prune file://{data}",
     "dataset prune file://{data} --keep 1"),
    ("nothing to forget: name --user, --users-file, --item or --items-file", "forget --dataset {data}",
     "forget --dataset {data} --user u1"),
    ("--baseline □ was measured on other rows: □ □ there, □ here; AUCs of different rows do not compare: evaluate",
     f"{EVALUATE} --baseline {{judged}}/fewer/metrics-valid.json",
     f"{EVALUATE} --baseline {{judged}}/rows/metrics-valid.json"),
    ("□: no embedding store (no □); `hllm embed` makes one", "store info memory://store",
     "embed --run {run} --checkpoint latest --items memory://store"),
    ("□: no embedding store (no store.json); `hllm embed` makes one", "store info {new}",
     "embed --run {run} --checkpoint latest --items {new}"),
    ("delete: no ids: give --id or --ids FILE", "store delete {users}", "store delete {users} --id u1"),
    ("--rows □: □ is prepared and has the numbers of rows: remove it",
     "plan --config {run}/config.yaml --rows genres=4", "plan --config {run}/config.yaml"),
    ("□: not prepared here: say how many with --items and --users",
     "plan --config {run}/config.yaml --data.dataset {new}",
     "plan --config {run}/config.yaml --data.dataset {new} --items 40 --users 20"),
    ("--rows □: must be FEATURE=N; features are □",
     "plan --config {run}/config.yaml --data.dataset {new} --items 40 --users 20 --rows genre=4",
     "plan --config {run}/config.yaml --data.dataset {new} --items 40 --users 20 --rows genres=4"),
    ("--dataset □: split by □; prepare one with --split □", "retrieval --dataset {root}/data --output {new}",
     "prepare --source table --path {shop}/mapping.yaml --output {new} --split leave_one_out"),
    ("□ has no predictions: no part-*.parquet in □ or in itself; `hllm baselines` and `hllm evaluate --run-dir",
     "evaluate --compare {root}/full", "baselines --dataset {root}/data --output {new} --only item_mean"),
    ("--run-dir □: another model has the name □; give it one with --predictions NAME=DIR",
     "evaluate --run-dir {run} --checkpoint latest --draws 0 --no-tensorboard --split valid --compare {twin}/run",
     "evaluate --run-dir {run} --checkpoint latest --draws 0 --no-tensorboard --split valid "
     "--predictions twin={twin}/run --output {new}"),
]  # fmt: skip


def places(tmp_path: Path, line: str) -> dict[str, Path]:
    """Where the names of a command line are; made if the line has them."""
    root = world()
    found = {"root": root, "shop": root / "shop", "new": tmp_path / "new"}
    if "{data}" in line:
        found["data"] = shutil.copytree(root / "data", tmp_path / "data")
    for name, options in (("core", "--min-events 2"), ("held", "--hold-out-items 0.2")):
        if f"{{{name}}}" in line:
            found[name] = tmp_path / name
            say("prepare", f"--source table --path {root}/shop/mapping.yaml --output {found[name]} {options}")
    if "{cut}" in line:
        found["cut"] = shutil.copytree(root / "data", tmp_path / "cut")
        pq.write_table(pq.read_table(found["cut"] / "items.parquet")[:-1], found["cut"] / "items.parquet")
    if "{others}" in line:
        found["others"] = tmp_path / "others"
        fixtures.write_shop(tmp_path / "shop", seed=1)
        say("prepare", f"--source table --path {tmp_path}/shop/mapping.yaml --output {found['others']}")
    if "{judged}" in line:
        found["judged"] = tmp_path / "judged"
        for name in ("rows", "fewer"):
            words = f"--split valid --draws 0 --no-tensorboard --predictions a={root}/{name}.parquet"
            say("evaluate", f"{words} --output {found['judged']}/{name}")
    if re.search(r"\{(run|users|moved|twin)\}", line):
        found["run"] = run()
        found["users"] = shutil.copytree(root / "users", tmp_path / "users")
    if "{moved}" in line:
        found["moved"] = shutil.copytree(run(), tmp_path / "moved")
        text = (found["moved"] / "config.yaml").read_text()
        (found["moved"] / "config.yaml").write_text(text.replace(str(root / "data"), str(root / "gone")))
    if "{twin}" in line:
        found["twin"] = tmp_path / "twin"
        shutil.copytree(run(), found["twin"] / "run")
        say("evaluate", f"--run-dir {found['twin']}/run --checkpoint latest --draws 0 --no-tensorboard --split valid")
    return found


@pytest.mark.parametrize(("part", "wrong", "remedy"), COMMANDS, ids=[part for part, *_ in COMMANDS])
def test_a_command_or_option_that_a_message_names_works(
    part: str, wrong: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = places(tmp_path, wrong + remedy)
    capsys.readouterr()
    assert say(*wrong.format(**where).split(" ", 1)) == 2
    refused = capsys.readouterr().err
    assert re.search(pattern(part), refused), refused
    status = say(*remedy.format(**where).split(" ", 1))
    assert status == 0, capsys.readouterr().err


def with_remedies() -> list[tuple[str, str]]:
    """(file:line, text) of the messages that name a command, an option or a setting."""
    found = []
    for place, text in messages(with_help=False):
        names = [*COMMAND.findall(text), *OPTION.findall(text)]
        names += [name for name, _ in SETTING.findall(text) if name in settings()]
        if names and " " in text.strip():
            found.append((place, text))
    return found


LEARNING: list[tuple[str, Settings, Settings]] = [
    # (part of the message, settings of a training that provoke it, those that the remedy adds)
    ("the loss is □: lower optim.lr or optim.table_lr, or set optim.clip_norm above 0", {"optim__table_lr": 1e30},
     {"optim__table_lr": 0.01}),
    ("no event since □ (data.train_since)", {"data__train_since": "2090-01-01"}, {"data__train_since": "2014-05-20"}),
]  # fmt: skip


@pytest.mark.parametrize(("part", "wrong", "remedy"), LEARNING, ids=[part for part, *_ in LEARNING])
def test_a_training_that_stops_goes_on_with_what_its_message_asks_for(
    part: str, wrong: Settings, remedy: Settings, tmp_path: Path
) -> None:
    given: Settings = {"data__dataset": world() / "data", "max_steps": 3, **ID_ONLY}
    with pytest.raises((ValueError, FloatingPointError), match=pattern(part)):
        train(config(tmp_path / "wrong", **given | wrong))
    destroy_distributed()
    train(config(tmp_path / "right", **given | wrong | remedy))


def test_every_message_with_a_remedy_has_a_case() -> None:
    cases = [part for part, *_ in CONFIGURATIONS + MODELS + COMMANDS + LEARNING]
    known = [*cases, *ELSEWHERE, *NOT_RUN]
    texts = with_remedies()
    assert len(texts) > 120
    assert [f"{place}: {text}" for place, text in texts if not any(part in text for part in known)] == []
    every = [text for _, text in messages()]
    assert [part for part in known if not any(part in text for text in every)] == [], "parts of no message"


def test_the_tests_that_run_other_remedies_exist() -> None:
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text() if name else (ROOT / file).is_file(), place
