"""scripts/reliability/fuzz.py: knows every target, finds what fails, and says where."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import strategies as st

from tests.fuzz.mutations import Target, change_bytes, check_reader, edit


@pytest.fixture(scope="module")
def script(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_script", root / "scripts" / "reliability" / "fuzz.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_target_is_known(script: ModuleType, root: Path) -> None:
    assert {f"test_{name}.py" for name in script.READERS} == {f.name for f in (root / "tests/fuzz").glob("test_*.py")}


def test_a_reader_is_fuzzed_for_a_while(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--reader", "manifest", "--seconds", "0.5", "--seed", "1", "--in-process"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reader"] == "manifest" and found["inputs"] > 0 and found["failures"] == {}


def test_what_fails_is_counted_by_place(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def check(number: int) -> None:
        def read() -> None:
            if number > 90:
                raise IndexError("beyond")  # a kind of error that no reader may raise
            if number < 10:
                raise ValueError("something is wrong")  # names nothing

        check_reader(read, ["file.bin"])

    found = script.fuzz("none", script.Limits(2, seed=1), Target("none", st.integers(0, 100), check))
    assert len(found["failures"]) == 2, found
    assert sorted(key.split(" at ")[0] for key in found["failures"]) == [
        "AssertionError/ValueError",
        "IndexError/IndexError",
    ]
    assert "none: " in capsys.readouterr().err


def test_rounds_in_the_log_are_not_repeated(script: ModuleType, tmp_path: Path) -> None:
    tried: list[int] = []
    target, log = Target("none", st.integers(0, 10**6), tried.append), tmp_path / "fuzz.jsonl"
    for inputs in (150, 300, 300):
        found = script.fuzz("none", script.Limits(inputs=inputs, log=log), target)
        assert found["inputs"] >= inputs and found["failures"] == {}
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1] and len(tried) == sum(line["inputs"] for line in lines)


def test_mutations_change_what_they_say() -> None:
    assert change_bytes(b"abcd", [("flip", 0.5, 1)]) == b"abbd"
    assert change_bytes(b"abcd", [("cut", 0.5, 1)]) == b"ab"
    assert change_bytes(b"abcd", [("zero", 0.25, 2)]) == b"a\0\0d"
    assert change_bytes(b"", [("flip", 0.5, 1), ("cut", 0.5, 1)]) == b""
    assert edit({"a": {"b": 1}, "c": [1, 2]}, [([0, 0], "set", None), ([1, 1], "delete", 0)]) == {
        "a": {"b": None},
        "c": [1],
    }
    assert edit({"a": 1}, [([0], "rename", "../x")]) == {"../x": 1}
