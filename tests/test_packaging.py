"""The package imports the same from a checkout, from elsewhere and from its wheel; nothing else leaks."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import hllm_torchrec
from hllm_torchrec import _versions
from hllm_torchrec.launch import cli

SUBPACKAGES = ("modules", "launch", "configs")
IMPORT = "".join(f"import hllm_torchrec.{name} as m\nprint(m.__file__)\n" for name in SUBPACKAGES)


def run_python(
    *args: str, cwd: Path, path: Path | None = None, python: str | Path = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run a program, by default Python, in `cwd` with `path` (or nothing) as PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run([python, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def copy_checkout(root: Path, target: Path) -> Path:
    """A copy of what a build reads, so that it leaves nothing behind in the checkout."""
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, target)
    for name in ("hllm_torchrec", *SUBPACKAGES):
        shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def build_wheel(checkout: Path, target: Path) -> Path:
    """The wheel of a checkout, in `target`."""
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(target), "."]
    result = run_python(*command, cwd=checkout)
    assert result.returncode == 0, result.stderr
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_checkout(root, folder / "checkout"), folder)


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents in a folder, as site-packages would have them."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def wheel_names(root: Path) -> set[str]:
    """What the wheel must hold: Python, YAML and templates of the four folders, under their installed names."""
    names = {"hllm_torchrec/py.typed"}
    for folder in ("hllm_torchrec", *SUBPACKAGES):
        for file in (root / folder).rglob("*"):
            if file.suffix in (".py", ".j2", ".html") or (folder == "configs" and file.suffix == ".yaml"):
                name = file.relative_to(root).as_posix()
                names.add(name if folder == "hllm_torchrec" else f"hllm_torchrec/{name}")
    return names


@pytest.mark.slow
def test_wheel_holds_every_python_and_yaml_file_and_template_and_nothing_else(root: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == wheel_names(root)


@pytest.mark.slow
def test_wheel_requires_neither_torch_nor_torchrec_nor_fbgemm(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata_file = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(metadata_file).decode()
    required = re.findall(r"^Requires-Dist: ([\w.-]+)", metadata, re.MULTILINE)
    assert "transformers" in required and "torchx" in required
    assert not {"torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"} & set(required)
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE))
    assert extras == {
        *(
            "bench",
            "calibrate",
            "cluster",
            "dev",
            "docs",
            "faiss",
            "flash-attn",
            "lora",
            "ray",
            "s3",
            "sentences",
            "serve",
            "wandb",
        )
    }


def places(package: Path) -> str:
    """What IMPORT prints where the folders are those of `package`."""
    return "".join(f"{package / name / '__init__.py'}\n" for name in SUBPACKAGES)


@pytest.mark.slow
def test_wheel_imports_from_elsewhere(unpacked: Path, tmp_path: Path) -> None:
    result = run_python("-c", IMPORT, cwd=tmp_path, path=unpacked)
    assert result.stdout == places(unpacked / "hllm_torchrec"), result.stderr


@pytest.mark.slow
def test_wheel_installs_the_command(unpacked: Path) -> None:
    entry_points = next(unpacked.glob("*.dist-info/entry_points.txt")).read_text()
    assert "hllm = hllm_torchrec.launch.cli:main" in entry_points


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["installed", "editable"])
def test_pip_install_gives_the_command_and_only_our_name(mode: str, root: Path, tmp_path: Path) -> None:
    checkout = copy_checkout(root, tmp_path / "checkout")
    python, site = make_venv(tmp_path / "venv")
    before = {path.name for path in site.iterdir()}
    command = ["-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-build-isolation"]
    result = run_python(*command, *(["-e"] if mode == "editable" else []), str(checkout), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    new = {path.name for path in site.iterdir()} - before
    assert new and all(re.match(r"(__editable__\w*\.?)?hllm_torchrec|__pycache__", name) for name in new)
    shown = run_python("--version", cwd=tmp_path, python=python.parent / "hllm")
    assert shown.stdout == f"hllm {hllm_torchrec.__version__}\n"
    shown = run_python("-c", IMPORT, cwd=tmp_path, python=python)
    assert shown.stdout == places(checkout if mode == "editable" else site / "hllm_torchrec"), shown.stderr


def make_venv(folder: Path) -> tuple[Path, Path]:
    """An environment that sees this one's packages but not what is installed here as editable.

    Returns:
        its Python, and its site-packages.
    """
    result = run_python("-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python", site


@pytest.mark.slow
def test_build_refuses_a_folder_that_the_wheel_would_miss(root: Path, tmp_path: Path) -> None:
    checkout = copy_checkout(root, tmp_path / "checkout")
    (checkout / "modules" / "experimental").mkdir()
    (checkout / "modules" / "experimental" / "attention.py").touch()
    result = run_python("setup.py", "--version", cwd=checkout)
    assert result.returncode != 0
    assert "modules/experimental holds Python files but no __init__.py" in result.stderr


@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_checkout_imports_without_installation(where: str, root: Path, tmp_path: Path) -> None:
    code = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n" + IMPORT
    cwd, path = (root, None) if where == "root" else (tmp_path, root)
    result = run_python("-c", code, cwd=cwd, path=path)
    assert result.stdout == places(root), result.stderr


@pytest.fixture(scope="module")
def two_checkouts(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two checkouts, the first installed as editable: both, and the environment's Python."""
    folder = tmp_path_factory.mktemp("two")
    first, second = (copy_checkout(root, folder / name) for name in ("first", "second"))
    (first / "hllm_torchrec" / "only_first.py").write_text("")
    python, _ = make_venv(folder / "venv")
    command = ["-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-build-isolation", "-e"]
    result = run_python(*command, str(first), cwd=folder)
    assert result.returncode == 0, result.stderr
    return first, second, python


@pytest.mark.slow
def test_a_checkout_is_not_mixed_with_one_that_is_installed(
    two_checkouts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    first, second, python = two_checkouts
    shown = run_python("-c", "import hllm_torchrec as m; print(m.__file__)", cwd=tmp_path, python=python)
    assert shown.stdout.startswith(str(first)), shown.stderr
    files = ", ".join(f"hllm_torchrec.{name}" for name in ("", *SUBPACKAGES, "common.errors")).replace(".,", ",")
    code = f"import {files}; import sys; print([m.__file__ for n, m in sys.modules.items() if 'hllm_torchrec' in n])"
    shown = run_python("-c", code, cwd=second, python=python)
    assert shown.returncode == 0, shown.stderr
    assert str(second) in shown.stdout and str(first) not in shown.stdout
    refused = run_python("-c", "import hllm_torchrec.only_first", cwd=second, python=python)
    assert "hllm_torchrec.only_first is not in the checkout" in refused.stderr and str(first) in refused.stderr


@pytest.mark.slow
def test_the_installed_checkout_is_refused_to_programs_of_another(
    two_checkouts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    first, second, python = two_checkouts
    (second / "scripts").mkdir(exist_ok=True)
    (second / "scripts" / "program.py").write_text("import hllm_torchrec\n")
    refused = run_python(str(second / "scripts" / "program.py"), cwd=tmp_path, python=python)
    message = f"belongs to the checkout {second}, but hllm_torchrec is imported from {first}"
    assert f"program.py {message}" in refused.stderr and f"PYTHONPATH={second}" in refused.stderr
    works = run_python(str(second / "scripts" / "program.py"), cwd=tmp_path, path=second, python=python)
    assert works.returncode == 0, works.stderr
    command = run_python("--version", cwd=second, python=python.parent / "hllm")
    assert command.returncode != 0 and f"the current directory {message}" in command.stderr
    assert run_python("--version", cwd=first, python=python.parent / "hllm").returncode == 0


@pytest.mark.parametrize("name", SUBPACKAGES)
def test_bare_name_is_refused_with_the_right_one(name: str, root: Path) -> None:
    result = run_python("-c", f"import {name}", cwd=root)
    assert result.returncode != 0
    assert f"Error: {name} is hllm_torchrec.{name}: write 'from hllm_torchrec.{name}" in result.stderr


@pytest.mark.parametrize("name", ["setup", "train", "tests", "scripts"])
def test_nothing_else_of_the_root_is_a_submodule(name: str, root: Path) -> None:
    result = run_python("-c", f"import hllm_torchrec.{name}", cwd=root)
    assert f"No module named 'hllm_torchrec.{name}'" in result.stderr


def test_import_is_light(root: Path) -> None:
    code = "import sys, hllm_torchrec.launch.cli as _; print({'torch', 'torchrec', 'numpy'} & set(sys.modules))"
    assert run_python("-c", code, cwd=root).stdout == "set()\n"


def test_command_help_lists_every_subcommand(root: Path) -> None:
    result = run_python("-m", "hllm_torchrec.launch.cli", "--help", cwd=root)
    assert result.returncode == 0, result.stderr
    for name, what in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", result.stdout, re.MULTILINE)


HELP = """
import os, sys
from pathlib import Path
from hllm_torchrec.launch import cli
for name in cli.COMMANDS:  # each in a process that has imported nothing more than this one
    if os.fork() == 0:
        sys.stdout = sys.stderr = open(Path(sys.argv[1]) / name, "w")
        try:
            cli.main([name, "--help"])
        finally:
            print({"torch", "matplotlib", "sklearn", "transformers"} & set(sys.modules), flush=True)
            os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_subcommands_say_what_they_take_and_soon(root: Path, tmp_path: Path) -> None:
    result = run_python("-c", HELP, str(tmp_path), cwd=root)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == set(cli.COMMANDS)
    for name in cli.COMMANDS:
        said = (tmp_path / name).read_text()
        assert said.startswith("usage:") and f"hllm {name}" in said, said
        assert said.splitlines()[-1] == "set()", name  # nothing that takes seconds to import


@pytest.mark.slow
def test_training_runs_as_a_module(root: Path) -> None:
    result = run_python("-m", "hllm_torchrec.launch.train", "--help", cwd=root)
    assert result.returncode == 0, result.stderr
    assert "--config" in result.stdout


def test_unknown_subcommand_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["trian"])
    assert "invalid choice: 'trian' (choose from 'fetch', 'prepare', 'dataset', " in capsys.readouterr().err


GOOD = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}


@pytest.mark.parametrize(
    "installed",
    [
        GOOD,
        {"torch": "2.12.1", "torchrec": "1.7.0", "fbgemm-gpu": "1.7.0"},
        {"torch": "2.11.0a0+git123", "torchrec": "1.6.1", "fbgemm-gpu": "1.6.0"},
        {"torch": "2.14.0", "torchrec": "1.9.0", "fbgemm-gpu": "1.9.0"},
        {"torch": "2.15.0", "torchrec": "1.10.0", "fbgemm-gpu": "1.10.0"},  # newer than tested: only a warning
    ],
)
def test_matching_versions_are_accepted(installed: dict[str, str]) -> None:
    assert _versions.find_version_problem(installed) is None


@pytest.mark.parametrize(
    ("installed", "problem"),
    [
        ({}, "torch, torchrec, fbgemm-gpu or fbgemm-gpu-cpu not installed"),
        ({"torch": "2.13.0"}, "torchrec, fbgemm-gpu or fbgemm-gpu-cpu not installed"),
        ({**GOOD, "torch": "2.12.0"}, r"torch 2\.12 needs torchrec 1\.7, not 1\.8\.0"),
        ({**GOOD, "fbgemm-gpu-cpu": "1.7.0"}, r"torch 2\.13 needs fbgemm-gpu-cpu 1\.8, not 1\.7\.0"),
        ({**GOOD, "torch": "2.9.1"}, r"torch 2\.9\.1 is too old; supported: torch 2\.11\.0 with"),
        ({**GOOD, "torch": "2.14.1"}, r"torch 2\.14 needs torchrec 1\.9, not 1\.8\.0"),
        ({**GOOD, "torch": "2.15.0"}, r"torchrec 1\.8\.0 was built for another torch than 2\.15"),
        ({**GOOD, "fbgemm-gpu": "1.8.0"}, "overwrite each other's files"),
    ],
)
def test_versions_that_do_not_belong_together_are_named(installed: dict[str, str], problem: str) -> None:
    assert re.search(problem, _versions.find_version_problem(installed) or "")


def write_distribution(folder: Path, name: str, version: str) -> None:
    """A distribution's metadata, as `importlib.metadata` finds it on the path."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_import_beside_another_torchrec_says_what_is_installed_and_the_remedy(root: Path, tmp_path: Path) -> None:
    for name, version in {"torch": "2.13.0", "torchrec": "1.7.0"}.items():
        write_distribution(tmp_path, name, version)  # comes first on the path, so it is the one found
    result = run_python("-c", "import hllm_torchrec", cwd=root, path=tmp_path)
    assert result.returncode != 0
    assert "torch 2.13 needs torchrec 1.8, not 1.7.0 (installed: torch 2.13.0" in result.stderr
    assert "run: bash scripts/install.sh --cpu (or --cuda, or auto)" in result.stderr


def test_import_without_torch_says_the_remedy(root: Path) -> None:
    result = run_python("-S", "-c", "import hllm_torchrec", cwd=root)  # -S: no site-packages at all
    assert result.returncode != 0
    assert "not installed (installed: none of them); from the checkout, run: bash scripts" in result.stderr


def test_untested_newer_release_warns(root: Path, tmp_path: Path) -> None:
    for name, version in {"torch": "2.99.0", "torchrec": "1.99.0", "fbgemm-gpu-cpu": "1.99.0"}.items():
        write_distribution(tmp_path, name, version)
    result = run_python("-c", "import hllm_torchrec", cwd=root, path=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "UserWarning: hllm_torchrec is not tested with torch 2.99.0" in result.stderr


def test_install_script_asks_this_file_for_versions(root: Path) -> None:
    result = run_python("hllm_torchrec/_versions.py", cwd=root)
    assert result.stdout == "2.13.0 1.8.0 1.8.0 3.7.1\n"
    assert run_python("hllm_torchrec/_versions.py", "2.11", cwd=root).stdout == "2.11.0 1.6.1 1.6.0 3.6.0\n"
    wrong = run_python("hllm_torchrec/_versions.py", "2.7", cwd=root)
    assert wrong.returncode == 1 and "torch 2.7 is not supported; supported: torch 2.11.0" in wrong.stderr
