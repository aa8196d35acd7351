"""`hllm fetch`: a folder that is there already is used without network; mistakes are one line."""

import pytest

from hllm_torchrec.launch.fetch import main


def test_a_local_folder_is_taken_as_it_is(tmp_path, capsys) -> None:
    for suffix in ("inter", "item", "user"):
        (tmp_path / f"ml-100k.{suffix}").write_text("x\n")
    assert main(["ml-100k", "--output", str(tmp_path / "cache"), "--local", str(tmp_path)]) == 0
    assert str(tmp_path) in capsys.readouterr().out.splitlines()[-1]


def test_a_local_folder_without_the_files_is_an_error(tmp_path, capsys) -> None:
    assert main(["smollm2", "--output", str(tmp_path), "--local", str(tmp_path)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]  # the licence note stands before it
    assert message.startswith("hllm fetch: error: ") and "lacks config.json" in message


def test_an_unknown_name_is_an_error(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["gpt5"])
    assert stop.value.code == 2
    assert "ml-100k" in capsys.readouterr().err
