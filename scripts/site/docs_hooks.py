"""Hooks of `mkdocs` for this repository (see mkdocs.yml).

- CHANGELOG.md and CONTRIBUTING.md of the root become pages of the site, and their links into docs/ are rewritten.
- The API reference is read from a tree with the layout of the wheel, where modules/ is hllm_torchrec/modules.
"""

import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Page of the site -> file of the root."""


def on_startup(**_: object) -> None:
    """Copy the packages to build/api, in the layout of the wheel, from which the API reference is built."""
    package = ROOT / "build" / "api" / "hllm_torchrec"
    shutil.rmtree(package.parent, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "hllm_torchrec", package, ignore=ignore)
    for name in ("modules", "launch", "configs"):
        shutil.copytree(ROOT / name, package / name, ignore=ignore)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root."""
    for page, name in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=re.sub(r"\]\(docs/", "](", text)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Rewrite links from docs/ to the pages of the root: these are in the parent folder in the repository, and in the
    same folder on the site."""
    return re.sub(
        r"\]\(\.\./((?:\.\./)*)(CHANGELOG|CONTRIBUTING)\.md", lambda m: f"]({m[1]}{m[2].lower()}.md", markdown
    )
