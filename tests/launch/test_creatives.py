"""`hllm creatives`: from a dataset to a table, a run and its evaluation."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hllm_torchrec.distributed.process_group import destroy_distributed
from hllm_torchrec.launch import creatives
from tests.helpers import creative_fixtures, fixtures
from tests.helpers.training_fixtures import config, train


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def test_a_table_is_built_shown_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(fixtures.dataset().root, tmp_path / "shop")
    given = ["--dataset", str(tmp_path / "shop"), "--name", "lines"]
    build = [
        "build",
        *given,
        "--least",
        "1",
        "--template",
        "{value} like {liked}",
        "--fractions",
        "0.5",
        "0.25",
        "0.25",
    ]
    assert creatives.main(build) == 0
    made = json.loads((tmp_path / "shop" / "creatives" / "lines" / "manifest.json").read_text())
    assert f"{sum(made['counts'].values())} texts by rule" in capsys.readouterr().out
    assert made["writer"] == "template" and made["rule"]["least"] == 1
    assert creatives.main(build) == 2 and "choose another, or remove it" in capsys.readouterr().err
    assert creatives.main(["info", *given]) == 0
    out = capsys.readouterr().out
    assert f"train  {made['counts']['train']:>10,} texts of {made['users']['train']} users" in out
    assert creatives.main(["show", *given, "--rows", "2"]) == 0
    assert len(lines := capsys.readouterr().out.splitlines()) == 2 and " like " in lines[0]


def test_a_run_is_evaluated_on_users_that_it_was_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config(tmp_path, **creative_fixtures.settings(max_steps=2)))
    destroy_distributed()
    assert creatives.main(["evaluate", "--run", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    gap = found["differences"]["null - right"]
    assert gap["mean"] == pytest.approx(found["nll"]["null"] - found["nll"]["right"])
    assert gap["interval"][0] <= gap["mean"] <= gap["interval"][1] and found["users"] > 1
    assert creatives.main(["evaluate", "--run", str(tmp_path), "--most", "5"]) == 0
    assert "5 texts of" in capsys.readouterr().out
    destroy_distributed()
    asked = ["evaluate", "--run", str(tmp_path), "--lamp", str(tmp_path / "lamp.json")]
    assert creatives.main(asked) == 2 and "is of template, not of LaMP; leave the option" in capsys.readouterr().err
