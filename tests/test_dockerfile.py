"""What can be said of the Dockerfile without Docker: what it copies is there and enough, and what it runs exists."""

import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest


@pytest.fixture
def instructions(root: Path) -> list[tuple[str, str]]:
    """(instruction, the rest of it) in order, continued lines joined."""
    text = (root / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


@pytest.fixture
def image(root: Path, tmp_path: Path, instructions: list[tuple[str, str]]) -> Path:
    """A folder with what the image would hold of the checkout."""
    ignored = [line for line in (root / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for sources, target in ((words[:-1], words[-1]) for words in copies(instructions)):
        for source in sources:
            assert (root / source).exists(), source
            assert not any(fnmatch(source, pattern) for pattern in ignored), f"{source} is kept from the build"
            if (root / source).is_dir():
                shutil.copytree(root / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(root / source, tmp_path / target)
    return tmp_path


def copies(instructions: list[tuple[str, str]]) -> list[list[str]]:
    """Sources and target of each COPY."""
    return [[word for word in rest.split() if word[:2] != "--"] for name, rest in instructions if name == "COPY"]


def test_what_is_copied_is_enough_to_install(image: Path, root: Path) -> None:
    said = subprocess.run([sys.executable, "setup.py", "--version"], cwd=image, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", said.stdout.split()[-1])
    packages = "import setuptools; setuptools.setup = lambda **given: print(sorted(given['packages'])); import setup"
    here, there = (
        subprocess.run([sys.executable, "-c", packages], cwd=folder, capture_output=True, text=True, check=True).stdout
        for folder in (root, image)
    )
    assert here == there and "hllm_torchrec.launch" in there


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_install_script_knows_its_options(device: str, image: Path, instructions: list[tuple[str, str]]) -> None:
    (command,) = (rest for name, rest in instructions if name == "RUN" and "install.sh" in rest)
    words = shlex.split(command.replace("$DEVICE", device))
    script, options = words[1], words[2 : words.index("&&")]
    assert options == [f"--{device}", "--no-venv"]
    said = subprocess.run(["bash", script, *options, "--help"], cwd=image, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.startswith("usage: bash scripts/install.sh"), said.stderr
    constraints = Path(words[words.index("--constraint") + 1])
    assert f"\n{words[-1]}==" in (image / constraints).read_text()


def test_the_base_is_pinned_and_the_user_is_not_root(root: Path, instructions: list[tuple[str, str]]) -> None:
    (base,) = (rest for name, rest in instructions if name == "FROM")
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", base)
    assert version and version[1] in ("3.11", "3.12", "3.13")
    (user,) = (rest for name, rest in instructions if name == "USER")
    assert user == "1000" and [name for name, _ in instructions].index("USER") > len(instructions) - 3
