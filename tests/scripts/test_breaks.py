"""scripts/reliability/breaks.py: its breaks are of the code as it is, and their tests are there."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(root: Path) -> ModuleType:
    path = root / "scripts" / "reliability" / "breaks.py"
    spec = importlib.util.spec_from_file_location("breaks_script", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_every_break_stands_in_the_code_once_and_its_tests_are_there(script: ModuleType, root: Path) -> None:
    assert len({broken.name for broken in script.BREAKS}) == len(script.BREAKS) >= 30
    for broken in script.BREAKS:
        assert script.place_of(broken.old, root).is_file() and broken.new != broken.old
        assert (root / broken.tests[0].split("::")[0]).is_file(), broken.name


def test_a_text_that_does_not_stand_in_the_code_once_is_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    for name in ("a.py", "b.py"):
        (tmp_path / "modules" / name).write_text("x = 1\n")
    with pytest.raises(
        ValueError, match=r"'x = 1' must occur in the code exactly once, but occurs in modules/a.py, mod"
    ):
        script.place_of("x = 1", tmp_path)
    with pytest.raises(ValueError, match=r"'y = 1' must occur in the code exactly once, but occurs nowhere: adapt the"):
        script.place_of("y = 1", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asserted", "caught", "by"),
    [
        ("from code_of_x import X; assert X == 1", True, r"test_it\.py::test_x\[one two\]$"),
        ("pass", False, "every test passed"),
        ("import no_such_module; =", False, r"the tests did not run \(status 2\)"),
    ],
)
def test_a_break_is_caught_by_a_test_that_fails_and_undone(
    asserted: str, caught: bool, by: str, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds to import
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "code_of_x.py").write_text("X = 1\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = modules\n")
    header = "import pytest\n@pytest.mark.parametrize('name', ['one two'])\n"
    (tmp_path / "test_it.py").write_text(f"{header}def test_x(name):\n    {asserted}\n")
    broken = script.Break("x", "X = 1", "X = 2", ("test_it.py",))
    found = script.try_break(broken, tmp_path, "")
    assert found[0] is caught
    assert re.search(by, found[1]), found
    assert (tmp_path / "modules" / "code_of_x.py").read_text() == "X = 1\n"
