"""Runs a tutorial as its reader would: its blocks in order, in one folder that looks like the checkout's root.

    ```yaml title="shop.yaml"    a block with a title is a file to save
    ```bash                      run; `hllm ...` and torchrun's one rank within this process, torchrun's two ranks as
                                 forks, to spare imports of torch; `hllm ... > FILE 2>&1 &` in a process of its own,
                                 until `kill %1` or `close`
    ```python                    run; names last to the end of the tutorial
    ```text                      what the block before it printed has these lines (`...` stands for any others)

A comment before a block says what the text cannot: `<!-- not executed: why -->`, `<!-- fails -->`.
"""

import contextlib
import io
import logging
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from hllm_torchrec.launch import cli
from tests.helpers.processes import end, start_ranks

FENCE = re.compile(r"^```(\w+)?(?: title=\"([^\"]+)\")?\s*$")
COMMENT = re.compile(r"^<!-- (not executed: .+|fails) -->$")
ONE_RANK = "torchrun --nproc_per_node 1 "
TWO_RANKS = "torchrun --nproc_per_node 2 "
IN_BACKGROUND = re.compile(r"^hllm (.+) > (\S+) 2>&1 &$")
SERVICE_PORT = "8400"
"""The port on the pages; here another one, which is free."""
CHECKOUT = ("examples", "configs", "launch", "train.py", ".torchxconfig")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is (or None), text, first line, and what the comment says."""

    language: str
    title: str | None
    text: str
    line: int
    comment: str = ""


def blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = markdown.splitlines()
    comment, number = "", 0
    while number < len(lines):
        if found := COMMENT.match(lines[number]):
            comment = found[1]
        elif opened := FENCE.match(lines[number]):
            first = number + 1
            number = next(at for at in range(first, len(lines)) if lines[at].rstrip() == "```")
            text = "\n".join(lines[first:number]) + "\n"
            yield Block(opened[1] or "", opened[2], text, first + 1, comment)
            comment = ""
        elif lines[number].strip():
            comment = ""
        number += 1


@dataclass
class Reader:
    """Somebody who works through tutorials, one after the other, in `folder`."""

    root: Path
    folder: Path
    printed: str = ""
    names: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    background: subprocess.Popen[bytes] | None = None
    port: str = field(default_factory=lambda: free_port())

    def __post_init__(self) -> None:
        for name in CHECKOUT:
            copy = shutil.copytree if (self.root / name).is_dir() else shutil.copy
            copy(self.root / name, self.folder / name)
        programs = Path(sys.executable).parent
        self.environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}

    def work_through(self, page: Path) -> None:
        """Run every block of a tutorial.

        Raises:
            AssertionError: one failed, or printed something else; it names file and line.
        """
        self.names = {"__name__": "__main__"}
        for block in blocks(page.read_text(encoding="utf-8")):
            where = f"{page.relative_to(self.root)}:{block.line}"
            if block.comment.startswith("not executed"):
                continue
            if block.title is not None:
                (self.folder / block.title).write_text(block.text, encoding="utf-8")
            elif block.language == "text":
                self.compare(block.text, where)
            elif block.language in ("bash", "python"):
                self.run(block, where)

    def run(self, block: Block, where: str) -> None:
        """Run a block; `printed` is then what it printed."""
        said, level = io.StringIO(), logging.getLogger().level
        own = importable(self.environment["PYTHONPATH"])
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), own:
            status = self.run_python(block, where) if block.language == "python" else self.run_lines(block.text)
        logging.getLogger().setLevel(level)  # `hllm prepare` turns it up
        if dist.is_initialized():
            dist.destroy_process_group()
        self.printed = said.getvalue()
        assert (status != 0) == (block.comment == "fails"), f"{where}: exit status {status}:\n{self.printed[-4000:]}"

    def run_python(self, block: Block, where: str) -> int:
        """In this process, as one program with the tutorial's other blocks."""
        exec(compile(block.text, where, "exec"), self.names)
        return 0

    def run_lines(self, text: str) -> int:
        """Commands, each after the other until one fails; its exit status."""
        for line in text.replace("\\\n", " ").replace(SERVICE_PORT, self.port).splitlines():
            try:
                if found := IN_BACKGROUND.match(line):
                    status = self.start(self.words(found[1]), self.folder / found[2])
                elif line == "kill %1":
                    status = self.close()
                elif line.startswith("hllm "):
                    status = cli.main(self.words(line)[1:])
                elif line.startswith(ONE_RANK):
                    status = run_as_only_rank(self.words(line.removeprefix(ONE_RANK)))
                elif line.startswith(TWO_RANKS):
                    status = self.run_two_ranks(self.words(line.removeprefix(TWO_RANKS)))
                else:
                    status = self.run_program(line)
            except SystemExit as left:  # a parser's, after its message
                status = int(left.code or 0)
            if status:
                return status
        return 0

    def start(self, words: list[str], file: Path) -> int:
        """`hllm` with these arguments, which prints to a file, until `close`."""
        assert self.background is None, "one job in the background at a time"
        environment = self.environment | {"PYTHONPATH": str(self.root), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "hllm_torchrec.launch.cli", *words]
        with file.open("wb") as said:
            self.background = subprocess.Popen(command, env=environment, stdout=said, stderr=subprocess.STDOUT)
        return 0

    def close(self) -> int:
        """End the job in the background, if there is one; its exit status."""
        job, self.background = self.background, None
        if job is None:
            return 0
        job.terminate()
        try:
            return job.wait(timeout=60)
        finally:
            job.kill()

    def words(self, line: str) -> list[str]:
        """A command's words, as bash expands them."""
        command = ["bash", "-c", f"printf '%s\\0' {line}"]
        found = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return found.stdout.split("\0")[:-1]

    def run_two_ranks(self, words: list[str]) -> int:
        """A script and its arguments, as torchrun would start its two ranks."""
        ranks = start_ranks(words[0], [words[1:]] * 2, self.root, self.folder)
        try:
            for rank in ranks:
                print(*rank.communicate(timeout=240))
        finally:
            end(ranks)
        return max(abs(rank.returncode or 0) for rank in ranks)

    def run_program(self, line: str) -> int:
        """One line of bash in a process of its own; what it exports lasts."""
        own = self.environment["PYTHONPATH"]
        environment = self.environment | {"PYTHONPATH": os.pathsep.join(filter(None, [own, str(self.root)]))}
        exports = line.startswith("export ")
        command = f"{line}; env -0" if exports else line
        process = subprocess.run(
            ["bash", "-ec", command], env=self.environment if exports else environment, capture_output=True, text=True
        )
        if exports:
            self.environment = dict(pair.split("=", 1) for pair in process.stdout.split("\0") if "=" in pair)
        else:
            print(process.stdout + process.stderr)
        return process.returncode

    def compare(self, expected: str, where: str) -> None:
        """Whether each line of `expected` is in what was printed, in this order; spaces count as one.

        `...` stands for anything, and a number with a decimal point for one that is nearly the same: a measured one
        differs a little from machine to machine.
        """
        printed, at = squeeze(self.printed), 0
        for line in filter(None, map(squeeze, expected.splitlines())):
            end = find_nearly(line, printed, at)
            assert end is not None, (
                f"{where}: {line!r} is not (or not there) in what was printed:\n{self.printed[-4000:]}"
            )
            at = end


def run_as_only_rank(words: list[str]) -> int:
    """A script and its arguments in this process, as torchrun would start its one rank."""
    port = free_port()
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with (
        mock.patch.dict(os.environ, rank | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}),
        mock.patch.object(sys, "argv", words),
    ):
        runpy.run_path(words[0], run_name="__main__")
    return 0


def free_port() -> str:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])


def squeeze(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


DECIMAL = r"[-+]?\d*\.\d+"
CLOSE = 0.1
"""How far a number may be from the one on the page."""


def find_nearly(line: str, printed: str, at: int) -> int | None:
    """Where the first passage from `at` on ends that is `line`, its numbers nearly; None if there is none."""
    numbers = [float(text) for text in re.findall(DECIMAL, line.replace("...", " "))]
    pattern = "|".join([r"\.\.\.", DECIMAL])
    parts = [re.escape(text) for text in re.split(pattern, line)]
    kinds = [".*?" if text == "..." else f"({DECIMAL})" for text in re.findall(pattern, line)]
    searched = re.compile("".join(part + kind for part, kind in zip(parts, [*kinds, ""], strict=True)))
    for found in searched.finditer(printed, at):
        if all(abs(float(text) - number) <= CLOSE for text, number in zip(found.groups(), numbers, strict=True)):
            return found.end()
    return None


@contextlib.contextmanager
def importable(path: str) -> Iterator[None]:
    """The folders of a PYTHONPATH are searched for modules; those imported from them are forgotten afterwards."""
    folders = [folder for folder in path.split(os.pathsep) if folder]
    sys.path[:0] = folders
    try:
        yield
    finally:
        del sys.path[: len(folders)]
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and any(Path(file).parent == Path(folder) for folder in folders):
                del sys.modules[name]
