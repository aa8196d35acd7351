"""What messages tell people to do works: each is provoked, its remedy followed to the letter, and the message gone.

A message that names a command, an option or a setting belongs to a case here (a command line) or in
`test_remedies_of_settings.py`, or to NOT_RUN with the reason.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hllm_torchrec.distributed.process_group import destroy_distributed
from tests.docs.messages import ROOT, messages
from tests.docs.remedies_not_run import ELSEWHERE, NOT_RUN
from tests.docs.remedy_world import pattern, run, say, world
from tests.docs.test_remedies import COMMAND, OPTION, SETTING, settings
from tests.docs.test_remedies_of_settings import CONFIGURATIONS, LEARNING, MODELS
from tests.helpers import fixtures


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


PREPARE = "prepare --source table --path {shop}/mapping.yaml --output {new}"
EVALUATE = "evaluate --split valid --draws 0 --no-tensorboard --output {new} --predictions a={root}/rows.parquet"
COMMANDS: list[tuple[str, str, str]] = [
    # (part of the message, a command line that provokes it, the line with the remedy)
    ("--time-unit belongs to □, not to □ (table: set it in the mapping)", f"{PREPARE} --time-unit seconds", PREPARE),
    ("--items belongs to □, not to □", f"{PREPARE} --items {{shop}}/items.csv", PREPARE),
    ("--stars belongs to □, not to □ (table: declare an ordinal label)", f"{PREPARE} --stars", PREPARE),
    ("--html belongs to □, not to □ (table: set items.html in the mapping)", f"{PREPARE} --html keep", PREPARE),
    ("--□ belongs to --□ □, not to □; leave it out",
     "creatives build --dataset {data} --name a --least 1 --users 3",
     "creatives build --dataset {data} --name a --least 1"),
    ("--template □: {□} is neither {value} nor {liked}",
     "creatives build --dataset {data} --name a --least 1 --template {{value}}-{{likd}}",
     "creatives build --dataset {data} --name a --least 1 --template {{value}}-{{liked}}"),
    ("□: no like gets a text (□); lower --least, or choose another --feature",
     "creatives build --dataset {data} --name a --least 9999", "creatives build --dataset {data} --name a --least 1"),
    ("--name □: must consist of letters, digits, '-', '_'", "creatives build --dataset {data} --name ../a --least 1",
     "creatives build --dataset {data} --name a --least 1"),
    ("--path is missing: □ cannot be fetched", "prepare --source table --output {new}", PREPARE),
    ("split date: train until □, valid until □: give both (--train-until, --valid-until)",
     f"{PREPARE} --train-until 2014-06-01", f"{PREPARE} --train-until 2014-05-20 --valid-until 2014-05-25"),
    ("split.rule=□ with dates: --train-until and --valid-until belong to --split date",
     f"{PREPARE} --split time --train-until 2014-05-20 --valid-until 2014-05-25",
     f"{PREPARE} --split date --train-until 2014-05-20 --valid-until 2014-05-25"),
    ("--bad-rows □: no kind □; kinds: □", f"{PREPARE} --bad-rows bad_tmie=drop", f"{PREPARE} --bad-rows bad_time=drop"),
    ("□ holds another dataset (□; different: □). Choose another folder, or overwrite it (--overwrite)",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --min-events 2",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --min-events 2 --overwrite"),
    ("at a URL no run pins its version: name the versions", "dataset prune file://{data}",
     "dataset prune file://{data} --keep 1"),
    ("□: a k-core needs all events; prepare them all again (--extend), or without --min-events",
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
    ("allow a larger share (--bad-share □)", PREPARE.replace("mapping", "bad") + " --bad-rows bad_time=drop",
     PREPARE.replace("mapping", "bad") + " --bad-rows bad_time=drop --bad-share 1"),
    ("□ □, the manifest says □; prepare again with --overwrite", "baselines --dataset {cut} --output {new}",
     "prepare --source table --path {shop}/mapping.yaml --output {cut} --overwrite"),
    ("□: its first line is □; an Amazon rating file has user, item, rating and timestamp",
     "prepare --source amazon --path {shop}/events.csv --items {shop}/items.json --output {new}", PREPARE),
    ("--append --split □: the dataset is split by □, and only dates can move",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append --split leave_one_out",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append"),
    ("--append --min-events □: a k-core needs all events; leave it out",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append --min-events 2",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append"),
    ("--append --hold-out-items □: held-out items are fixed; leave it out",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append --hold-out-items 0.1",
     "prepare --source table --path {shop}/mapping.yaml --output {data} --append"),
    ("□ is not a prepared dataset: no □. Make one with `hllm prepare --output □`", "dataset info {new}", PREPARE),
    ("nothing to evaluate: name a run (--run-dir) or predictions (--compare, --predictions)",
     "evaluate --output {new}", EVALUATE),
    ("--predictions □: must be NAME=PATH", "evaluate --predictions {root}/rows.parquet", EVALUATE),
    ("two models are named □; rename one of them by --predictions NAME=PATH", f"{EVALUATE} a={{root}}/rows.parquet",
     f"{EVALUATE} b={{root}}/rows.parquet"),
    ("--spill □: no such directory; create it, or leave the option out", f"{EVALUATE} --spill {{new}}/x", EVALUATE),
    ("--train □ is not a file or a directory", f"{EVALUATE} --train {{new}}/x", EVALUATE),
    ("□ applies to a run; name the run with --run-dir", f"{EVALUATE} --checkpoint latest", EVALUATE),
    ("--□ belongs to the regression gate; name its reference with --baseline", f"{EVALUATE} --max-drop 1",
     f"{EVALUATE} b={{root}}/rows.parquet --max-drop 1 --baseline b"),
    ("--baseline □ is neither a file nor a compared model", f"{EVALUATE} --baseline b",
     f"{EVALUATE} b={{root}}/rows.parquet --baseline b"),
    ("--baseline □ is the judged model itself; name another model of the comparison",
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
    ("--train needs columns of users and items in all files; name them with --user and --item",
     EVALUATE.replace("rows.parquet", "bare.parquet") + " --train {root}/rows.parquet",
     f"{EVALUATE} --train {{root}}/rows.parquet --user user_id --item item_id"),
    ("name a store: --items, --users or both", "embed --run {run} --checkpoint latest",
     "embed --run {run} --checkpoint latest --items {new}"),
    ("--items and --users are one folder, □: items and users need a store each",
     "embed --run {run} --checkpoint latest --items {new} --users {new}",
     "embed --run {run} --checkpoint latest --items {new}/i --users {new}/u"),
    ("--output □: holds something else than clusters; name a new folder",
     "cluster --users {users} --clusters 2 --output {root}/full",
     "cluster --users {users} --clusters 2 --output {new}"),
    ("--clusters: □ holds no clusters yet: give their number", "cluster --users {users} --output {new}",
     "cluster --users {users} --output {new} --clusters 2"),
    ("□: a store of □, not of users: see hllm embed --users",
     "cluster --users {root}/items --clusters 2 --output {new}",
     "cluster --users {users} --clusters 2 --output {new}"),
    ("□: no clusters of users (no □): choose their folder, or make them with `hllm cluster`",
     "create --run {run} --clusters {new} --output {new}/titles",
     "cluster --users {users} --clusters 2 --output {new}"),
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
    ("nothing to forget: name --user, --users-file, --item or --items-file", "forget --dataset {data}",
     "forget --dataset {data} --user u1"),
    ("--baseline □ was measured on other rows: □ □ there, □ here; AUCs of different rows are not comparable: evaluate",
     f"{EVALUATE} --baseline {{judged}}/fewer/metrics-valid.json",
     f"{EVALUATE} --baseline {{judged}}/rows/metrics-valid.json"),
    ("□: no embedding store (no □); `hllm embed` makes one", "store info memory://store",
     "embed --run {run} --checkpoint latest --items memory://store"),
    ("□: no embedding store (no store.json); `hllm embed` makes one", "store info {new}",
     "embed --run {run} --checkpoint latest --items {new}"),
    ("delete: no ids: give --id or --ids FILE", "store delete {users}", "store delete {users} --id u1"),
    ("--rows □: not needed, because □ is prepared and has the numbers of rows: leave out --rows",
     "plan --config {run}/config.yaml --rows genres=4", "plan --config {run}/config.yaml"),
    ("□: not prepared here: give the numbers of items and users with --items and --users",
     "plan --config {run}/config.yaml --data.dataset {new}",
     "plan --config {run}/config.yaml --data.dataset {new} --items 40 --users 20"),
    ("--rows □: must be FEATURE=N; features are □",
     "plan --config {run}/config.yaml --data.dataset {new} --items 40 --users 20 --rows genre=4",
     "plan --config {run}/config.yaml --data.dataset {new} --items 40 --users 20 --rows genres=4"),
    ("--dataset □: split by □; prepare one with --split □", "retrieval --dataset {root}/data --output {new}",
     "prepare --source table --path {shop}/mapping.yaml --output {new} --split leave_one_out"),
    ("□ has no predictions: no part-*.parquet in □ or in itself; `hllm baselines` and `hllm evaluate --run-dir",
     "evaluate --compare {root}/full", "baselines --dataset {root}/data --output {new} --only item_mean"),
    ("--run-dir □: another model has the name □; rename that model by --predictions NAME=DIR",
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
