"""Every command and Python block of the tutorials runs and prints what the page says."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.tutorials import Reader, blocks, find_nearly

ORDER = (
    "first_run",
    "your_own_data",
    "add_a_feature",
    "add_a_user_encoder",
    "serving_vectors",
    "serving",
    "dlrm_plugin",
    "personalized_titles",
    "clusters",
)
"""As the site lists them: each goes on in the folder that the one before left behind."""

PAGE = """
```python
x = 6 * 7
```

<!-- not executed: why -->
```bash
rm -rf /
```

```python
print("the answer", x)
```

```text
...
the answer  42
```

<!-- fails -->
```bash
export GREETING=hello
echo $GREETING; exit 3
```
"""


@pytest.fixture
def reader(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """Somebody at the root of a checkout."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    somebody = Reader(root, folder)
    yield somebody
    somebody.close()


def test_every_tutorial_is_in_the_order(root: Path) -> None:
    assert {path.stem for path in (root / "docs" / "tutorials").glob("*.md")} == set(ORDER)


@pytest.mark.slow
def test_every_block_of_the_tutorials_runs_and_prints_what_the_page_says(reader: Reader) -> None:
    for name in ORDER:
        reader.work_through(reader.root / "docs" / "tutorials" / f"{name}.md")


@pytest.mark.parametrize(
    ("line", "is_there"),
    [
        ("AUC 0.84 [0.80, 0.87] of 233 users", True),
        ("AUC ... of 233 users", True),
        ("AUC 0.95 [0.80, 0.87]", False),  # further off than machines differ
        ("AUC 0.84 [0.80, 0.87] of 234 users", False),  # whole numbers are exact
        ("of 233 users AUC", False),  # in this order
    ],
)
def test_measured_numbers_need_only_be_near(line: str, is_there: bool) -> None:
    assert (find_nearly(line, "model AUC 0.8322 [0.8067, 0.8549] of 233 users", 0) is not None) == is_there


def page(reader: Reader, text: str) -> Path:
    reader.root = reader.folder
    path = reader.folder / "page.md"
    path.write_text(text)
    return path


def test_blocks_run_in_order_and_what_fails_is_expected_to(reader: Reader) -> None:
    assert [block.language for block in blocks(PAGE)] == ["python", "bash", "python", "text", "bash"]
    reader.work_through(page(reader, PAGE))
    assert reader.printed == "hello\n\n" and reader.environment["GREETING"] == "hello"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nexit 4\n```", r"page.md:2: exit status 4"),
        ("<!-- fails -->\n```bash\ntrue\n```", r"page.md:3: exit status 0"),
        ("```python\nprint(1)\n```\n```text\n2\n```", r"page.md:5: '2' is not \(or not there\) in what was printed"),
        ("```bash\nhllm trane\n```", r"(?s)page.md:2: .*invalid choice: 'trane'"),
    ],
)
def test_a_block_that_goes_wrong_is_named(text: str, message: str, reader: Reader) -> None:
    with pytest.raises(AssertionError, match=message):
        reader.work_through(page(reader, text))
