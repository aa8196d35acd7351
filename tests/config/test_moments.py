"""Moments in a configuration: as a date in YAML, as an option, in seconds."""

from pathlib import Path

import pytest

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.loading import config_from_file, load_config, save_config

TINY = ["--user.shape", "{model_type: llama, hidden_size: 8}", "--item_llm.enabled", "false"]


def test_a_date_survives_file_option_and_saved_configuration(tmp_path: Path) -> None:
    file = tmp_path / "since.yaml"
    file.write_text("data: {train_since: 2023-11-22}\n")
    for given in (["--config", str(file)], ["--data.train_since", "2023-11-22"]):
        config = load_config([*TINY, *given])
        assert config.data.train_since == "2023-11-22"
        save_config(config, tmp_path / "saved.yaml")
        assert config_from_file(tmp_path / "saved.yaml") == config
    assert load_config([*TINY, "--data.train_since=1700611200"]).data.train_since == 1_700_611_200


def test_what_is_no_date_is_one_line() -> None:
    with pytest.raises(ConfigError, match="data.train_since: 'yesterday' is not a moment"):
        load_config([*TINY, "--data.train_since", "yesterday"])
