"""Files from others run nothing and lead nowhere; what is temporary is private; secrets stay where they are."""

import ast
import dataclasses
import json
import logging
import os
import re
import shutil
import stat
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hllm_torchrec.checkpoint import layout as files
from hllm_torchrec.checkpoint.load import save_checkpoint
from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.common.errors import without_credentials
from hllm_torchrec.common.machine import machine_info
from hllm_torchrec.common.run_log import RunLog
from hllm_torchrec.common.terminal import printable, say
from hllm_torchrec.config.loading import config_from_file, load_config, save_config
from hllm_torchrec.data import quickstart_files
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.data.item_factors import item_vectors
from hllm_torchrec.data.token_store import build_token_store
from hllm_torchrec.evaluation.report import write_report
from hllm_torchrec.launch.entry import CommandParser, run_job
from hllm_torchrec.launch.train import main as train
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.store import EmbeddingStore
from tests.helpers import fixtures, training_fixtures

# --- the source ----------------------------------------------------------------------------------------

FOLDERS = ("hllm_torchrec", "modules", "launch", "configs", "scripts", "examples")
RUNS_CODE = {"eval", "exec", "compile", "__import__", "input"}
FORBIDDEN = {
    "pickle.load", "pickle.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "dill.load",
    "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "tempfile.mktemp",
    "torch.hub.load", "torch.jit.load", "pd.read_pickle", "pandas.read_pickle", "shutil.unpack_archive",
}  # fmt: skip
METHODS = {"extractall", "extract"}
OUR_UNPICKLER = ("hllm_torchrec/checkpoint/safe_reader.py", "pickle.Unpickler")


def problems(source: str, name: str) -> Iterator[str]:
    """Calls in a Python file that could run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            if any("Unpickler" in base and (name, base) != OUR_UNPICKLER for base in bases):
                yield f"{name}:{node.lineno}: another unpickler"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        last = called.rpartition(".")[2]
        rules = {
            "runs code": called in RUNS_CODE,
            "is not safe": called in FORBIDDEN or (last in METHODS and "pc." not in called),
            "needs weights_only=True": called == "torch.load" and given.get("weights_only") != "True",
            "runs remote code": given.get("trust_remote_code", "False") != "False",
            "must say trust_remote_code=False": last in ("from_pretrained", "from_config")
            and called.startswith("Auto")
            and "trust_remote_code" not in given,
            "needs use_safetensors=True": called == "AutoModel.from_pretrained"
            and given.get("use_safetensors") != "True"
            and "gguf_file" not in given,
            "unpickles": given.get("allow_pickle", "False") != "False",
            "goes through a shell": given.get("shell", "False") != "False",
        }
        yield from (f"{name}:{node.lineno}: {called} {rule}" for rule, broken in rules.items() if broken)


def test_nothing_in_the_source_runs_what_a_file_says(root: Path) -> None:
    found = [file for folder in FOLDERS for file in (root / folder).rglob("*.py")] + [root / "train.py"]
    assert len(found) > 150
    assert not [p for file in found for p in problems(file.read_text(), file.relative_to(root).as_posix())]


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "pickle.loads(b'')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.FullLoader)",
        "AutoModel.from_pretrained(path, use_safetensors=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "AutoConfig.from_pretrained(path, trust_remote_code=options.trust)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "archive.extractall(folder)",
        "class Mine(pickle.Unpickler): pass",
    ],
)
def test_the_search_finds_what_it_is_for(line: str) -> None:
    assert list(problems(line, "x.py"))


# --- code that comes with a model ------------------------------------------------------------------------


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    mapped = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of", "auto_map": mapped}))
    with pytest.raises(ValueError, match="custom code|unheard_of"):
        build_backbone(str(tmp_path), None)
    assert not (tmp_path / "ran").exists()


def test_a_configuration_imports_no_class(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {class_path: os.system, init_args: {command: 'true'}}\n")
    with pytest.raises(ValueError, match=r"data\.class_path: unknown key"):
        load_config(["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text("output: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="not valid YAML: could not determine a constructor"):
        load_config(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("number", ["0x" + "f" * 10**6, "9" * 10**6])
def test_a_number_of_a_million_digits_is_refused_by_file(number: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"seed: {number}\n")
    with pytest.raises(ValueError, match=r"c\.yaml: .*limit .*digits") as found:
        load_config(["--config", str(tmp_path / "c.yaml")])
    assert len(str(found.value)) < 1000


def test_aliases_do_not_fill_the_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"c\.yaml: not valid YAML: more than 100000 values.*correct its aliases"):
        load_config(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("quoted", [False, True])
def test_merge_keys_do_not_fill_the_memory(quoted: bool, tmp_path: Path) -> None:
    lines = ["a0: &a0 {k: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    text = "\n".join(lines)
    (tmp_path / "c.yaml").write_text(f"output: {json.dumps(text)}" if quoted else text)
    if quoted:  # jsonargparse reads texts as YAML
        assert "<<" in load_config([*training_fixtures.arguments(tmp_path), "--output", text]).output
        return
    with pytest.raises(ValueError, match=r"c\.yaml: not valid YAML: more than 100000 merged values: correct its merge"):
        load_config(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "[{"])
def test_brackets_do_not_overflow_the_stack(opening: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"output: '{opening * 50_000}'\n")
    for arguments in (["--config", str(tmp_path / "c.yaml")], ["--stages", opening * 50_000]):
        with pytest.raises(ValueError, match=r"(c\.yaml|--stages): .*not valid YAML"):
            load_config(arguments)


# --- names that lead out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", "", "C:\\x", "a\x00b"])
def test_no_name_in_a_manifest_leads_out_of_the_dataset(name: str, tmp_path: Path) -> None:
    root = shutil.copytree(fixtures.dataset().root, tmp_path / "d")
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["items.parquet"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged \(files is .*within the dataset\)"):
        Dataset.open(root)


def test_no_link_in_a_dataset_leads_out_of_it(tmp_path: Path) -> None:
    root = shutil.copytree(fixtures.dataset().root, tmp_path / "d")
    (root / "items.parquet").rename(tmp_path / "items.parquet")
    (root / "items.parquet").symlink_to(tmp_path / "items.parquet")
    with pytest.raises(ValueError, match=r"'items\.parquet' leads out of the dataset; copy the file there"):
        Dataset.open(root)
    linked = tmp_path / "linked"
    linked.symlink_to(fixtures.dataset().root)  # the folder itself may be a link
    assert Dataset.open(linked).num_items == fixtures.dataset().num_items


@pytest.mark.parametrize("place", ["vectors", "vectors/mine.npy"])
def test_no_link_beside_the_manifest_leads_out(place: str, tmp_path: Path) -> None:
    root = shutil.copytree(fixtures.dataset().root, tmp_path / "d", ignore=shutil.ignore_patterns("tokens", "vectors"))
    (root / "vectors").mkdir()
    np.save(root / "vectors" / "mine.npy", np.ones((fixtures.ITEMS + 1, 2), np.float32))
    assert item_vectors(Dataset.open(root), "mine").shape == (fixtures.ITEMS + 1, 2)
    (root / place).rename(tmp_path / "elsewhere")
    (root / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{place}: is a link or no plain file, .*; replace it by a copy"):
        item_vectors(Dataset.open(root), "mine")


def test_tokens_that_are_links_pipes_or_of_other_items_are_refused(tmp_path: Path) -> None:
    root = shutil.copytree(fixtures.dataset().root, tmp_path / "d", ignore=shutil.ignore_patterns("tokens", "vectors"))

    def tokens() -> Path:
        return build_token_store(Dataset.open(root), fixtures.tokenizer_dir(), keys=["title"], max_text_length=8)

    facts = tokens() / "store.json"
    assert tokens() == facts.parent
    text = facts.read_text()
    facts.write_text(text.replace('"title"', '"brand"'))
    with pytest.raises(ValueError, match=r"its store\.json is of other items or settings than its name; "):
        tokens()
    facts.rename(tmp_path / "store.json")
    facts.symlink_to(tmp_path / "store.json")
    with pytest.raises(ValueError, match=r"store\.json: is a link or no plain file"):
        tokens()
    facts.unlink()
    os.mkfifo(facts)
    with pytest.raises(ValueError, match=r"store\.json: is a link or no plain file"):
        tokens()


def test_the_name_of_item_vectors_is_a_plain_one() -> None:
    with pytest.raises(ValueError, match=r"data\.item_vectors: '\.\./\.\./x': must be a plain name"):
        item_vectors(fixtures.dataset(), "../../x")


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", ""])
def test_no_name_in_a_store_leads_out_of_it(name: str, tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path / "s", 2)
    run = {"name": name, "rows": 1, "deleted": 0, "files": {}}
    (store.root / "manifest.json").write_text(json.dumps({"version": 1, "live": 1, "runs": [run]}))
    with pytest.raises(ValueError, match="is not a plain name: the file is damaged"):
        store.snapshot()
    run |= {"name": "run", "files": {name: [1, 1]}}
    (store.root / "manifest.json").write_text(json.dumps({"version": 1, "live": 1, "runs": [run]}))
    with pytest.raises(ValueError, match="is not a plain name: the file is damaged"):
        store.snapshot()


def test_no_link_in_a_store_leads_out_of_it(tmp_path: Path) -> None:
    store = EmbeddingStore.create(tmp_path / "s", 2, "fp32")
    with store.writer() as writer:
        writer.upsert(["a"], torch.ones(1, 2))
        writer.commit()
    (file,) = store.root.glob("runs/*/vectors-0000.bin")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"vectors-0000\.bin: is a link, which may lead out of the store"):
        store.snapshot()


def test_no_name_or_link_in_a_checkpoint_leads_out_of_it(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(2)}}, {})
    marker = files.read_marker(path)
    outside = {"../x": marker["files"]["extra.json"]}
    changed = files.with_checksum(marker | {"files": marker["files"] | outside})
    (path / "COMPLETE").write_text(json.dumps(changed))
    assert files.find_damage(path) == "is damaged: '../x' leads out of it"
    (path / "COMPLETE").write_text(json.dumps(marker))
    assert files.find_damage(path) is None
    (path / "extra.json").rename(tmp_path / "elsewhere")
    (path / "extra.json").symlink_to(tmp_path / "elsewhere")
    assert files.find_damage(path) == "is damaged: 'extra.json' leads out of it"


def test_an_archive_gives_its_named_members_only_and_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/wanted", b"0" * 100_000)
        archive.writestr("../outside", b"x")
        archive.writestr("/absolute", b"x")
    named = quickstart_files.Wheel(
        "w", "1", wheel.name, quickstart_files.hash_file(wheel), {"a/wanted": "wanted"}, "note"
    )
    target = quickstart_files.fetch_wheel(named, "out", tmp_path / "cache", wheel)
    assert [path.name for path in target.iterdir()] == ["wanted"]
    assert not (tmp_path / "cache" / "outside").exists() and not (tmp_path / "outside").exists()
    monkeypatch.setattr(quickstart_files, "LARGEST_MEMBER", 99_999)
    with pytest.raises(ValueError, match=r"w\.whl: a/wanted has 100000 bytes, more than 99999: it is not extracted"):
        quickstart_files.fetch_wheel(named, "again", tmp_path / "cache", wheel)
    assert not (tmp_path / "cache" / "again").exists()


# --- what is temporary, and what is secret -----------------------------------------------------------------


def test_temporary_folders_are_private(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "made") as folder:
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert (tmp_path / "made").is_dir() and list(tmp_path.iterdir()) == [tmp_path / "made"]


def test_temporary_files_come_from_tempfile_alone(root: Path) -> None:
    folders = ("hllm_torchrec", "launch", "modules")
    text = "\n".join(file.read_text() for folder in folders for file in (root / folder).rglob("*.py"))
    assert not re.findall(r"""["']/(?:tmp|var/tmp|dev/shm)\b""", text), "a fixed name in a public folder"
    made = set(re.findall(r"tempfile\.(\w+)", text))
    assert made <= {"TemporaryDirectory", "NamedTemporaryFile", "mkdtemp"}  # modes 0700 and 0600


def test_secrets_of_the_environment_are_in_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cr3t-value-of-a-token"
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PIP_INDEX_URL", "DATABASE_PASSWORD"):
        monkeypatch.setenv(name, secret)
    with RunLog(tmp_path, 0) as log:
        log.write("start", 0, machine=machine_info())
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 2 and not any(secret.encode() in data for data in written)


def test_no_source_logs_the_whole_environment(root: Path) -> None:
    for folder in ("hllm_torchrec", "launch", "modules"):
        for file in (root / folder).rglob("*.py"):
            text = file.read_text()
            for node in ast.walk(ast.parse(text)) if "os.environ" in text else ():
                names = (child for child in ast.iter_child_nodes(node) if isinstance(child, ast.Attribute))
                uses = [name for name in names if ast.unparse(name) == "os.environ"]
                plain = isinstance(node, ast.Attribute | ast.Subscript | ast.Compare)  # .get(NAME), [NAME], NAME in
                assert plain or not uses, f"{file}:{getattr(node, 'lineno', '?')} takes all of os.environ"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no match for https://user:token@host/here", "no match for https://***@host/here"),
        ("https://token@host/x and http://a:b@c", "https://***@host/x and http://***@c"),
        ("mail user@host, https://host/a@b", "mail user@host, https://host/a@b"),
        ("s3://host:8080/a@b", "s3://host:8080/a@b"),
        ("sftp://user:pa@ss@host/x", "sftp://***@host/x"),
        ("smb://user:pa/ss@host: down", "smb://***@host: down"),
        ("webdav:/user:pass@host/x", "webdav:/***@host/x"),  # as a Path shows it
        ("https://host/x?X-Amz-Signature=1f&y=2, is", "https://host/x?*** is"),
        ('href="https://host/x" title="a?b@c"', 'href="https://host/x" title="a?b@c"'),
    ],
)
def test_credentials_in_addresses_are_not_shown(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


def test_a_url_of_a_configuration_has_no_credentials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(training_fixtures.arguments(tmp_path / "run", data__dataset="https://me:s3cr3t@host/data")) == 2
    said = capsys.readouterr().err
    assert "data.dataset: https://***@host/data: a URL here must have no credentials" in said and "s3cr3t" not in said
    with pytest.raises(ValueError, match=r"start_from: s3://host/x\?\*\*\*: .* set them in the environment"):
        training_fixtures.config(tmp_path, start_from="s3://host/x?sig=s3cr3t")
    saved = config_from_file(_saved_with(tmp_path, "https://me:s3cr3t@host/data"))  # a run of an earlier version
    assert saved.data.dataset == "https://me:s3cr3t@host/data"


def _saved_with(folder: Path, dataset: str) -> Path:
    config = fixtures.config()
    save_config(dataclasses.replace(config, data=dataclasses.replace(config.data, dataset=dataset)), folder / "c.yaml")
    return folder / "c.yaml"


def test_a_report_shows_no_credentials(tmp_path: Path) -> None:
    _saved_with(tmp_path, "https://me:s3cr3t@host/data").rename(tmp_path / "config.yaml")
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 1, "loss": 1.0}\n')
    text = write_report(tmp_path).read_text()
    assert "https://***@host/data" in text and "s3cr3t" not in text


# --- terminals -----------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b1mred\r\u202egnp.exe\u2028\ud800"


def test_text_from_elsewhere_does_not_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"a\tb\n{HOSTILE} é 木 👩\u200d🚀 https://me:s3cr3t@host")
    said = capsys.readouterr().out
    assert said.startswith("a\tb\n\\x1b]0;title\\x07\\x1b[2J\\x9b1mred\\r\\u202egnp.exe\\u2028\\ud800 é 木 👩\u200d🚀")
    assert said.endswith(" https://***@host\n") and said.count("\n") == 2
    assert printable("one\ntwo") == "one\\ntwo"


def test_errors_warnings_and_usage_are_shown_safely(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        logging.getLogger("hllm_torchrec.test").warning("warned: %s", HOSTILE)
        raise ValueError(f"https://me:s3cr3t@host: {HOSTILE}")

    root, before, printing = logging.getLogger(), logging.getLogRecordFactory(), logging.StreamHandler(sys.stderr)
    root.addHandler(printing)  # a library has configured logging
    try:
        assert run_job("job", job) == 2
    finally:
        root.removeHandler(printing)
        logging.setLogRecordFactory(before)
    with pytest.raises(SystemExit):
        CommandParser(prog="job").error(HOSTILE)
    said = capsys.readouterr().err
    assert said.count("\\x1b]0;title") == 3 and not re.search(r"[\x00-\x09\x0b-\x1f\x80-\x9f]", said)
    assert "s3cr3t" not in said


def test_jobs_print_by_one_function(root: Path) -> None:
    own = {"hllm_torchrec/common/terminal.py", "hllm_torchrec/config/loading.py", "hllm_torchrec/_versions.py"}
    for folder in ("hllm_torchrec", "launch", "modules"):
        for file in (root / folder).rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            prints = [node.lineno for node in calls if ast.unparse(node.func) in ("print", "sys.stdout.write")]
            assert not prints or file.relative_to(root).as_posix() in own, f"{file}: {prints}: use common.terminal.say"


# --- the default install -----------------------------------------------------------------------------------


def test_every_requirement_has_an_exact_version_and_hashes(root: Path) -> None:
    text = (root / "scripts" / "requirements" / "requirements-hashes.txt").read_text()
    blocks = re.split(r"\n(?=[a-zA-Z0-9])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    pinned = {}
    for block in blocks:
        name, version = re.match(r"([\w.-]+)==(\S+)", block).groups()  # type: ignore[union-attr]
        pinned[_normal(name)] = version
        assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", block)) >= 1, name
    lines = (root / "scripts" / "requirements" / "constraints.txt").read_text().splitlines()
    constraints = {_normal(n): v for n, _, v in (line.partition("==") for line in lines if "==" in line)}
    assert {name for name, version in pinned.items() if constraints.get(name, version) != version} == set()
    required = re.search(r"^REQUIREMENTS = \[(.*?)^\]", (root / "setup.py").read_text(), re.MULTILINE | re.DOTALL)
    assert required is not None
    names = {_normal(name) for name in re.findall(r'"([\w.-]+)', required[1])}
    assert names | {"torchrec", "fbgemm-gpu-cpu", "tensordict"} <= pinned.keys()
    assert "://" not in text


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
