"""What `mkdocs` does not do by itself for this repository (see mkdocs.yml).

- CHANGELOG.md and CONTRIBUTING.md of the root are pages of the site, their links into docs/ mended.
- The API reference is read from a tree laid out like the wheel, where modules/ is hllm_torchrec/modules.
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
    """Lay the packages out where the reference looks for them, before it does."""
    package = ROOT / "build" / "api" / "hllm_torchrec"
    shutil.rmtree(package.parent, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "hllm_torchrec", package, ignore=ignore)
    for name in ("modules", "launch", "configs"):
        shutil.copytree(ROOT / name, package / name, ignore=ignore)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages."""
    for page, name in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=re.sub(r"\]\(docs/", "](", text)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links from docs/ to the root's pages, which are one folder up in the repository and beside them on the site."""
    return re.sub(
        r"\]\(\.\./((?:\.\./)*)(CHANGELOG|CONTRIBUTING)\.md", lambda m: f"]({m[1]}{m[2].lower()}.md", markdown
    )
