"""Package metadata, and the mapping of the top-level folders to subpackages.

`modules/`, `launch/` and `configs/` are installed as `hllm_torchrec.modules` and so on, not as top-level packages in
site-packages. torch, torchrec and fbgemm are not among the requirements, because their builds depend on the machine
and torchrec's requirements install CUDA. `scripts/install.sh` installs them.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PACKAGE_DIR = {
    "hllm_torchrec": "hllm_torchrec",
    "hllm_torchrec.modules": "modules",
    "hllm_torchrec.launch": "launch",
    "hllm_torchrec.configs": "configs",
}
REQUIREMENTS = [
    "accelerate>=1.15,<2",  # transformers needs it to read GGUF (`hllm fetch smollm2`)
    "filelock>=4.2,<5",
    "fsspec>=2026.9,<2027",
    "gguf>=0.19,<1",  # for GGUF as well
    "Jinja2>=3.1,<4",
    "jsonargparse[signatures]>=4.53,<5",
    "matplotlib>=3.11,<4",
    "numpy>=2.4,<3",
    "pyarrow>=26,<27",
    "PyYAML>=6,<7",
    "safetensors>=0.8,<1",
    "scipy>=1.17,<2",
    "tensorboard>=2.21,<3",  # imported by torch.utils.tensorboard
    "torchx==0.7.0",
    "tqdm>=4.70,<5",
    "transformers>=5.23,<6",
]
PEFT = "peft>=0.21,<1"
SCIKIT_LEARN = "scikit-learn>=1.9,<2"  # `hllm calibrate` and `hllm cluster` fit with it; tests compare with it
RAY = "ray[serve]>=2.60,<3"  # a cluster of `serving.ray_serve`; tested by scripts/test.sh --extras
S3 = ["s3fs>=2026.9,<2027"]
SERVE = ["fastapi>=0.165,<1", "prometheus_client>=0.26,<1", "uvicorn>=0.54,<1"]
WANDB = "wandb>=0.31,<1"
BENCH = ["pylance>=14,<15"]  # Lance, which scripts/bench/bench_store.py compares the store with
DOCS = [  # the site (scripts/docs.sh); neither the library nor its tests need them
    "mkdocs>=1.6.1,<2",
    "mkdocs-material>=9.8,<10",
    "mkdocstrings[python]>=1.0,<2",
]
DEV = [
    *S3,
    *SERVE,
    "duckdb>=2.0,<3",  # a second reader of tables, which tests compare with
    "faiss-cpu>=1.15,<2",
    "flask-cors>=6,<7",
    "httpx>=0.28,<1",  # starlette's client for tests
    "hypothesis>=6.170,<7",
    "import-linter>=2.16,<3",
    "kubernetes>=36,<37",
    "moto[s3]>=5.2,<6",
    "mypy>=2.4,<3",
    "pandas>=3.1,<4",  # writes the tables of tests
    SCIKIT_LEARN,
    PEFT,
    "pytest>=9.2,<10",
    "pytest-xdist>=3.8,<4",
    "ruff>=0.17.6,<0.18",
    "setuptools>=77",
    'triton>=3.6,<4; platform_system == "Linux"',
    WANDB,
]


def find_packages() -> list[str]:
    """Dotted package names of all folders with Python files under the mapped folders.

    Raises:
        ValueError: such a folder has no `__init__.py`, so it would be missing from the wheel.
    """
    names = []
    for name, folder in PACKAGE_DIR.items():
        for path in sorted({file.parent for file in (ROOT / folder).rglob("*.py")}):
            if not (path / "__init__.py").is_file():
                raise ValueError(f"{path.relative_to(ROOT)} holds Python files but no __init__.py; add one")
            names.append(".".join([name, *path.relative_to(ROOT / folder).parts]))
    return names


def read_version() -> str:
    """Version of the package, read without importing it."""
    text = (ROOT / "hllm_torchrec" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


setup(
    name="hllm_torchrec",
    version=read_version(),
    description="Hybrid recommenders from two LLMs (HLLM) with TorchRec tables, sequences and ranking models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(),
    package_dir=PACKAGE_DIR,
    package_data={
        "hllm_torchrec": ["py.typed"],
        "hllm_torchrec.configs": ["**/*.yaml"],
        "hllm_torchrec.evaluation": ["*.j2"],
        "hllm_torchrec.serving": ["*.html"],
    },
    install_requires=REQUIREMENTS,
    extras_require={
        "bench": BENCH,
        "calibrate": [SCIKIT_LEARN],
        "cluster": [SCIKIT_LEARN],
        "dev": DEV,
        "docs": DOCS,
        "faiss": ["faiss-cpu>=1.15,<2"],
        "flash-attn": ["flash-attn>=2.7"],
        "lora": [PEFT],
        "ray": [RAY],
        "s3": S3,
        "sentences": ["sentence-transformers>=6.2,<7"],  # compares an exported folder with it; not needed to export
        "serve": SERVE,
        "wandb": [WANDB],
    },
    entry_points={"console_scripts": ["hllm = hllm_torchrec.launch.cli:main"]},
)
