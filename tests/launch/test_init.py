"""`hllm init` and `recipe:` of a configuration: chosen from the dataset, below what is set, kept by a resumed run."""

from pathlib import Path

import pytest
import yaml

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.loading import load_config, save_config
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.launch import init
from hllm_torchrec.launch.recipes import with_recipe
from hllm_torchrec.training.trainer_setup import build_trainer
from tests.helpers import fixtures, task_shop

RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "ranking.yaml"


def arguments(*options: str) -> list[str]:
    """The recipe on the shop, with an encoder of its own (nothing to fetch)."""
    shape = "{model_type: llama, hidden_size: 8}"
    own = ["--item_llm.pretrained", "null", "--item_llm.shape", shape, "--item_llm.tokenizer", "t"]
    return ["--config", str(RECIPE), "--data.dataset", str(fixtures.dataset().root), *own, *options]


def test_the_choices_stay_below_files_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.yaml").write_text("item_llm: {max_text_length: 99}\n")
    own = ["--config", str(tmp_path / "own.yaml"), "--data.user_features", "[]", "--features.item_id=true"]
    config = load_config(with_recipe([*arguments(), *own]))
    assert config.recipe is None
    assert (config.item_llm.max_text_length, config.data.user_features, config.features.item_id) == (99, (), True)
    assert config.item_llm.text_keys == ("title", "brand") and config.data.item_features == ("genres",)
    assert config.data.evidence[-1] == "crosses" and config.objective.value_weight == 0.5
    said = capsys.readouterr().out.splitlines()
    assert "recipe ranking: data.item_features: [genres], chosen because items have genres" in said
    assert not any("max_text_length" in line or "user_features" in line for line in said)


def test_without_a_recipe_nothing_changes_and_an_unknown_one_is_named() -> None:
    assert with_recipe(["--seed", "1"]) == ["--seed", "1"]
    wrong = [*arguments(), "--recipe", "rankin"]
    assert with_recipe(wrong) == wrong
    with pytest.raises(ConfigError, match="recipe: 'rankin': must be one of ranking"):
        load_config(wrong)


def test_a_resumed_run_keeps_its_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--output", str(tmp_path / "run"), "--resume", "true"]
    first = load_config(with_recipe(arguments("--data.item_features", "[]", *more)))
    save_config(first, tmp_path / "run" / "config.yaml")
    capsys.readouterr()
    assert load_config(with_recipe(arguments(*more))).data.item_features == ()
    assert "data.item_features: [], chosen because the resumed run has it" in capsys.readouterr().out


def test_a_recipe_that_nobody_filled_in_is_not_trained() -> None:
    config = load_config(arguments())
    with pytest.raises(
        ConfigError, match="recipe: ranking: not completed for a dataset yet: complete it with `hllm init`"
    ):
        build_trainer(config, init_distributed())
    destroy_distributed()


def test_init_says_what_the_dataset_declares_and_the_recipe_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = tmp_path / ".cache" / "models" / "all-minilm-l6-v2"
    encoder.mkdir(parents=True)
    (encoder / "config.json").write_text("{}")  # there already: not fetched
    assert init.main(["--data", str(task_shop.dataset().root)]) == 0
    hint = "not used: the labels like, watch, stars and the context device, place, price; add them by objective.tasks"
    assert hint in capsys.readouterr().out and f"#   {hint}" in (tmp_path / "ranking.yaml").read_text()
    assert load_config(["--config", "ranking.yaml"]).recipe is None


def test_init_writes_what_the_recipe_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = tmp_path / ".cache" / "models" / "all-minilm-l6-v2"
    encoder.mkdir(parents=True)
    (encoder / "config.json").write_text("{}")  # there already: not fetched
    root = str(fixtures.dataset().root)
    assert init.main(["--data", root, "--output", "new/mine.yaml"]) == 0
    assert "train with `hllm train --config new/mine.yaml`" in capsys.readouterr().out
    filled = load_config(["--config", "new/mine.yaml"])
    assert filled == load_config(with_recipe(["--config", str(RECIPE), "--data.dataset", root]))
    head = (tmp_path / "new" / "mine.yaml").read_text().splitlines()
    assert head[0].startswith("# The recipe ranking for ") and ", chosen because " in head[1]
    assert yaml.safe_load((tmp_path / "new" / "mine.yaml").read_text())["data"]["dataset"] == root
    assert init.main(["--data", root, "--output", "new/mine.yaml"]) == 2
    assert "--output new/mine.yaml: exists; name another file" in capsys.readouterr().err
