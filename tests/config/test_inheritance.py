"""Inheritance: a file takes its base's values, and what is wrong with a base is one line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.checking import dotted_fields
from hllm_torchrec.config.loading import config_from_file, load_config, save_config, to_dict
from hllm_torchrec.config.schema import Config

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = "user: {shape: {model_type: llama, hidden_size: 8}}\nitem_llm: {enabled: false}\n"

DEFAULTS = load_config(["--user.shape", "{model_type: llama, hidden_size: 8}", "--item_llm.enabled", "false"])

RESOLVED = json.loads((Path(__file__).parent / "resolved_configs.json").read_text())
"""Configuration -> hash of what it sets, as it was when every file still stood by itself."""


def complete_files() -> list[Path]:
    """Configurations of `hllm train`: all but parts to inherit from, and those of other commands."""
    others = {CONFIGS / "stages" / "3.yaml", *(CONFIGS / "baselines").glob("*"), *(CONFIGS / "base").glob("*")}
    return sorted(set(CONFIGS.rglob("*.yaml")) - others)


def settings_hash(path: Path) -> str:
    """Hash of the values that are not the defaults, so that a new field changes none of them."""
    config = config_from_file(path)
    found = {}
    for name in dotted_fields(Config):
        value: Any = config
        default: Any = DEFAULTS
        for part in name.split("."):
            value, default = getattr(value, part), getattr(default, part)
        if value != default and not hasattr(value, "__dataclass_fields__"):
            found[name] = to_dict(value)
    for stage in found.get("stages", ()):  # a list holds all fields of its entries: new ones are left out by hand
        if stage["trains"] == "all":
            del stage["trains"]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.slow
def test_every_configuration_resolves_to_what_it_was() -> None:
    found = {path.relative_to(CONFIGS).as_posix(): settings_hash(path) for path in complete_files()}
    assert found == RESOLVED  # of a configuration that was changed on purpose, the new hash goes into the file


def write(folder: Path, **files: str) -> dict[str, Path]:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: folder / f"{name}.yaml" for name in files}


def problems_of(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(["--config", str(path)])
    assert all("\n" not in problem for problem in raised.value.problems)
    return raised.value.problems


def test_mappings_merge_at_any_depth_and_everything_else_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    first = SMALL + "seed: 1\ndata: {item_features: [a, b], max_history: 64}\noptim: {user_lr: 0.5, lr: 0.25}\n"
    second = "base: ../first.yaml\ndata: {item_features: [c]}\nuser: {shape: {hidden_size: 16}}\n"
    write(tmp_path, first=first)
    write(tmp_path / "deeper", second=second)
    files = write(tmp_path, third="base: deeper/second.yaml\nseed: 3\noptim: {user_lr: null}\n")
    config = load_config(["--config", str(files["third"]), "--data.batch_users", "5"])
    assert (config.seed, config.data.batch_users, config.data.max_history) == (3, 5, 64)
    assert config.data.item_features == ("c",)
    assert (config.optim.user_lr, config.optim.lr) == (None, 0.25)
    assert config.user.shape == {"model_type": "llama", "hidden_size": 16}


def test_what_is_saved_and_printed_is_resolved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write(tmp_path, first=SMALL + "seed: 1\n", second="base: first.yaml\nmax_steps: 3\n")
    config = config_from_file(files["second"])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert "base:" not in (tmp_path / "run" / "config.yaml").read_text()
    assert config_from_file(tmp_path / "run" / "config.yaml") == config
    with pytest.raises(SystemExit):
        load_config([f"--config={files['second']}", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert config_from_file(tmp_path / "printed.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere.yaml", "{x}: base: 'nowhere.yaml': no such file; the path is relative to {folder}/"),
        ("base: null", "{x}: base: None: must be the path of a YAML file, relative to this one"),
        ("base: [a.yaml]", "{x}: base: ['a.yaml']: must be the path of a YAML file, relative to this one"),
        ("base: x.yaml", "{x}: base: {x} -> {x}: a file cannot be based on itself; remove one of these lines"),
        (
            "base: to_x.yaml",
            "{folder}/to_x.yaml: base: {x} -> {folder}/to_x.yaml -> {x}: a file cannot be based on itself; remove "
            "one of these lines",
        ),
        ("base: typo.yaml", "{folder}/typo.yaml: optim.lrr: unknown key (did you mean 'lr'?)"),
        ("base: good.yaml\nsed: 1", "{x}: sed: unknown key (did you mean 'seed'?)"),
        ("base: good.yaml\nstages: [{epochs: 1}]", "{x}: stages[0].name: missing: must be text"),
        ("base: good.yaml\noptim: 3", "{x}: optim: 3: must be a mapping of OptimConfig fields"),
        ("base: broken.yaml", "{folder}/broken.yaml: not valid YAML: "),
    ],
)
def test_what_is_wrong_with_a_base_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, to_x="base: x.yaml\n", typo=SMALL + "optim: {lrr: 1}\n", good=SMALL, broken="a: [")
    (problem,) = problems_of(write(tmp_path, x=text)["x"])
    assert problem.startswith(message.format(x=tmp_path / "x.yaml", folder=tmp_path))


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    """PyYAML keeps the last one, so that the first `base` would be lost without a word."""
    (tmp_path / "a.yaml").write_text("seed: 1\nbase: b.yaml\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"a\.yaml.*the key 'seed' occurs twice: keep one of them.*line 3"):
        load_config(["--config", str(tmp_path / "a.yaml")])
    (tmp_path / "c.yaml").write_text("data: {max_history: 8, max_history: 9}\n")
    with pytest.raises(ConfigError, match="'max_history' occurs twice"):
        load_config(["--config", str(tmp_path / "c.yaml")])


def test_a_number_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.table_options\.eps: inf: must be a finite number"):
        load_config(["--optim.table_options", "{eps: .inf}"])
    with pytest.raises(ConfigError, match=r"optim\.weight_decay: inf: must be a finite number"):
        load_config(["--optim.weight_decay", ".inf"])


def test_whole_numbers_have_at_most_64_bits(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"seed: {'1' * 400}\nmax_steps: {2**63}\n")
    with pytest.raises(ConfigError, match=r"max_steps: \d+: must be at most 9223372036854775807") as found:
        load_config(["--config", str(tmp_path / "c.yaml")])
    assert "seed: 1111" in str(found.value) and "1" * 300 not in str(found.value)
