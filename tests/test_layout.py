"""The tree keeps its order: what may import what, how many files stand where, and that no name has two meanings."""

import ast
import dataclasses
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hllm_torchrec import _moved
from hllm_torchrec.config.encoders import ItemLLMConfig, UserEncoderConfig
from hllm_torchrec.config.schema import Config

LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"
BELOW_LAUNCH = (
    "common modules config distributed embedding data store metrics checkpoint models evaluation training inference "
    "downstream baselines weights planning creative lifecycle serving"
).split()


@pytest.fixture
def tree(root: Path, tmp_path: Path) -> Path:
    """A tree laid out like the wheel, as scripts/test.sh makes it."""
    package = tmp_path / "hllm_torchrec"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "hllm_torchrec", package, ignore=ignore)
    for name in ("modules", "launch", "configs"):
        shutil.copytree(root / name, package / name, ignore=ignore)
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree: Path) -> tuple[int, str]:
    command = [sys.executable, "-c", LINT, "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stdout + result.stderr


def test_packages_import_only_what_is_below_them(tree: Path) -> None:
    status, said = lint(tree)
    assert status == 0, said
    assert "2 kept, 0 broken" in said


def test_an_import_of_a_package_above_and_a_package_without_a_place_in_the_order_are_found(tree: Path) -> None:
    (tree / "hllm_torchrec" / "misc").mkdir()
    (tree / "hllm_torchrec" / "misc" / "__init__.py").touch()
    for name in BELOW_LAUNCH:
        (tree / "hllm_torchrec" / name / "planted.py").write_text("def f():\n    import hllm_torchrec.launch.cli\n")
    status, said = lint(tree)
    assert status == 1 and "misc" in said
    found = set(re.findall(r"^- hllm_torchrec\.(\w+)\.planted -> hllm_torchrec\.launch\.cli", said, re.MULTILINE))
    assert found == set(BELOW_LAUNCH)


def test_few_files_stand_at_the_top(root: Path) -> None:
    assert len(list((root / "hllm_torchrec").glob("*.py"))) <= 6
    assert len(list((root / "tests").glob("test_*.py"))) <= 8
    tops = {path.name for path in (root / "scripts").iterdir() if path.is_file()}
    assert tops == {"install.sh", "quickstart.sh", "test.sh", "docs.sh"}


def test_no_two_modules_of_the_library_have_one_name(root: Path) -> None:
    """launch/ is left out: its modules are named as the commands are."""
    names = Counter(
        path.stem
        for path in (root / "hllm_torchrec").rglob("*.py")
        if path.stem != "__init__" and "sources" not in path.parts
    )
    assert not [name for name, count in names.items() if count > 1]


def test_building_blocks_know_no_files_and_no_configuration(root: Path) -> None:
    for path in (root / "modules").rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"os", "pathlib", "io", "json", "yaml", "safetensors"} & {n.split(".")[0] for n in names}, path
        named = CONFIGURED.search(text)
        assert not named, f"{path}: {named[0]}: a message or docstring names a field; see `configured_by`"


def configured_fields() -> Iterator[str]:
    """Dotted names of all fields in sections of the configuration, such as user.shape."""
    for section in dataclasses.fields(Config):
        default = getattr(Config(user=UserEncoderConfig(shape={}), item_llm=ItemLLMConfig(shape={})), section.name)
        for part in default if isinstance(default, tuple) else (default,):
            if dataclasses.is_dataclass(part):
                yield from (f"{section.name}.{field.name}" for field in dataclasses.fields(part))


CONFIGURED = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, configured_fields()))})\b")


def test_the_rule_of_field_names_finds_them_in_messages_and_docstrings() -> None:
    for text in ("user.shape.heads: 3", "raise it, or lower data.max_history", "`optim.ema` leaves it out"):
        assert CONFIGURED.search(text), text
    for text in ("features.stride()", "hllm_torchrec.data.features", "self.user.width"):
        assert not CONFIGURED.search(text), text


PACKAGES_NOW = {"config", "checkpoint", "downstream", "serving", "modules.attention", "modules.hstu", "modules.losses"}
"""They were modules; `from hllm_torchrec.config import Config` fails in Python's own words."""


@pytest.mark.parametrize("old", sorted(_moved.MODULES.keys() - PACKAGES_NOW))
def test_an_old_module_names_its_successor(old: str, root: Path) -> None:
    first = "remote" if old.startswith("remote") else old  # whose package is gone, too
    new = _moved.MODULES[first]
    top, _, rest = _moved.MODULES[old].partition(".")
    folder = root / top if top in ("modules", "launch") else root / "hllm_torchrec" / top
    assert folder.with_suffix(".py").is_file() if not rest else (folder / f"{rest.replace('.', '/')}.py").is_file()
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"hllm_torchrec.{first} is now hllm_torchrec.{new}")):
        __import__(f"hllm_torchrec.{old}")


def test_the_migration_page_lists_all_that_moved(root: Path) -> None:
    page = (root / "docs" / "migration.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", page, re.MULTILINE))
    assert {old: rows.get(old) for old in _moved.MODULES.keys() - {"remote"}} == {
        old: new for old, new in _moved.MODULES.items() if old != "remote"
    }
    for old, names in _moved.SYMBOLS.items():
        for name, new in names.items():
            assert old == "remote" or rows[f"{old}.{name}"].startswith(f"{new}."), f"{old}.{name}"


def test_what_the_migration_page_names_is_there(root: Path) -> None:
    page = (root / "docs" / "migration.md").read_text(encoding="utf-8")
    defined = dict(definitions(root))
    for old, new in re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", page, re.MULTILINE):
        module, _, name = new.rpartition(".")
        assert new in defined or name in defined.get(module, ()), f"{old} is said to be {new}"
    for script in re.findall(r"^\| `scripts/\S+` \| `(scripts/\S+)` \|$", page, re.MULTILINE):
        assert (root / script).is_file()


def definitions(root: Path) -> Iterator[tuple[str, set[str]]]:
    """Every module of the library, and the names that it binds."""
    for folder in ("hllm_torchrec", "modules", "launch"):
        for path in (root / folder).rglob("*.py"):
            dotted = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
            nodes = list(ast.walk(ast.parse(path.read_text())))
            names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            names |= {node.asname for node in nodes if isinstance(node, ast.alias) and node.asname}
            yield dotted.removeprefix("hllm_torchrec."), names
