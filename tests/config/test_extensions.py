"""Encoders and numeric features of the user's own, named in a configuration as module:name."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.extensions import ALLOWED_CODE, load_extension
from hllm_torchrec.config.loading import config_from_file, load_config, save_config
from hllm_torchrec.data.numeric_features import numeric_columns
from hllm_torchrec.launch.entry import CommandParser, entry_point
from hllm_torchrec.models.build import build_user_encoder
from hllm_torchrec.modules.history_cache import check_encoder

CODE = """
from dataclasses import dataclass
import numpy as np
from torch import nn
from hllm_torchrec.modules.encoders.base import UserEncoder

@dataclass(frozen=True)
class Shape:
    width: int
    layers: int = 1

class Linear(UserEncoder):
    Shape = Shape

    def __init__(self, shape, dropout=0.0):
        super().__init__(shape.width, dropout)
        self.layers = nn.ModuleList(nn.Linear(shape.width, shape.width) for _ in range(shape.layers))

    def encode(self, x_SD, rows):
        for layer in self.layers:
            x_SD = self.run_layer(layer, x_SD)
        return x_SD

    def flops(self, tokens, keys):
        return 2.0 * tokens * len(self.layers) * self.width**2

class Shapeless(Linear):
    Shape = None

def earlier(timestamps, labels, targets, seen):
    return seen.astype(np.float32)
"""
ID_ONLY = ["--item_llm.enabled=false", "--objective.fusion=early"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's."""
    (tmp_path / "my_code.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_code", raising=False)
    return "my_code"


def test_an_encoder_of_ones_own_stands_in_the_user_llms_place(module: str) -> None:
    config = load_config([*ID_ONLY, f"--user.encoder={module}:Linear", "--user.shape", "{width: 8, layers: 2}"])
    encoder = build_user_encoder(config.user)
    x_TD = torch.randn(3, 8)
    h_TD, q_QD = encoder(x_TD, torch.tensor([0, 2, 3]))
    expected = encoder.layers[1](encoder.layers[0](x_TD))
    torch.testing.assert_close(h_TD, expected)
    assert q_QD.shape == (0, 8)
    with pytest.raises(ValueError, match=r"^encoder: Linear cannot cache the keys and values of a history"):
        check_encoder(encoder.eval())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hstuu", r"user.encoder: 'hstuu': must be one of llm, hstu, sasrec, ligr, or .*\(did you mean 'hstu'\?\)"),
        ("no_such_module:X", r"'no_such_module:X': there is no module 'no_such_module': install it, or put its folder"),
        (
            "hllm_torchrec.modules.sasrec:SASRec",
            r"'hllm_torchrec.modules.sasrec:SASRec': hllm_torchrec.modules.sasrec is now "
            r"hllm_torchrec.modules.encoders.sasrec",
        ),
        ("my_code:Linea", r"my_code.py has no 'Linea' \(did you mean 'Linear'\?\)"),
        (
            "my_code:earlier",
            r"'my_code:earlier': must be a subclass of hllm_torchrec.modules.encoders.base.UserEncoder",
        ),
        ("my_code:Shapeless", r"Shapeless.Shape must be a dataclass with the fields width and layers"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(name: str, message: str, module: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([*ID_ONLY, f"--user.encoder={name}", "--user.shape", "{width: 8}"])


def test_the_shape_of_an_own_encoder_is_checked_like_ours(module: str) -> None:
    config = load_config([*ID_ONLY, f"--user.encoder={module}:Linear", "--user.shape", "{width: 8}"])
    with pytest.raises(ConfigError, match=r"user.shape.layer: unknown key \(did you mean 'layers'\?\)"):
        replace(config, user=replace(config.user, shape={"width": 8, "layer": 1}))
    with pytest.raises(ConfigError, match=r"user.shape.layers: 0: must be >= 1"):
        replace(config, user=replace(config.user, shape={"width": 8, "layers": 0}))


def test_a_module_that_fails_to_import_something_else_says_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_code.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"'broken_code:X': No module named 'not_installed_anywhere'"):
        load_extension("broken_code:X", "user.encoder")


def test_a_numeric_feature_of_ones_own_is_a_column(module: str) -> None:
    times, labels = np.array([5, 5, 9]), np.full(3, np.nan, np.float32)
    found = numeric_columns(["history_length", f"{module}:earlier"], times, labels, np.array([1, 2]))
    np.testing.assert_array_equal(found[:, 1], [0.0, 2.0])


ENCODER = ["--user.encoder=my_code:Linear", "--user.shape={width: 8}"]
FEATURE = ["--user.encoder=sasrec", "--user.shape={width: 8, layers: 1}", "--data.numeric_features=[my_code:earlier]"]


def run_from_elsewhere(folder: Path, options: list[str]) -> Path:
    """Write the configuration of a run that names the module; returns its file."""
    save_config(load_config([*ID_ONLY, *options]), folder / "config.yaml")
    (folder / "checkpoints").mkdir()
    sys.modules.pop("my_code", None)
    return folder / "config.yaml"


@pytest.mark.parametrize(("field", "options"), [("user.encoder", ENCODER), ("data.numeric_features", FEATURE)])
@pytest.mark.usefixtures("module")
def test_the_configuration_of_a_run_imports_nothing_unasked(field: str, options: list[str], tmp_path: Path) -> None:
    file = run_from_elsewhere(tmp_path / "run", options)
    remedy = rf"^{field}: 'my_code:\w+': .* use --allow-code or set HLLM_ALLOW_CODE=my_code$"
    for read in (lambda: config_from_file(file), lambda: load_config(["--config", str(file)])):
        with pytest.raises(ValueError, match=remedy):
            read()
    assert "my_code" not in sys.modules


def test_a_run_names_no_function_of_python_itself(tmp_path: Path) -> None:
    file = run_from_elsewhere(tmp_path / "run", ["--user.encoder=sasrec", "--user.shape={width: 8, layers: 1}"])
    file.write_text(file.read_text().replace("numeric_features: []", "numeric_features: ['os:system']"))
    with pytest.raises(ValueError, match=r"^data.numeric_features: 'os:system': the run's configuration names code"):
        config_from_file(file)


@pytest.mark.parametrize("allowed", ["my_code", " other, my_code", "*"])
@pytest.mark.usefixtures("module")
def test_the_code_of_a_run_is_imported_if_it_is_listed(
    allowed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run_from_elsewhere(tmp_path / "run", ENCODER)
    monkeypatch.setenv(ALLOWED_CODE, "my_cod,my_code.below")
    with pytest.raises(ValueError, match="names code"):
        config_from_file(file)
    monkeypatch.setenv(ALLOWED_CODE, allowed)
    assert config_from_file(file).user.encoder == "my_code:Linear"


@pytest.mark.usefixtures("module")
def test_the_code_of_a_run_is_imported_if_it_is_allowed_or_here_already(tmp_path: Path) -> None:
    file = run_from_elsewhere(tmp_path / "run", ENCODER)

    def read(options: Any) -> None:
        assert config_from_file(file).user.encoder == "my_code:Linear"

    def parser() -> CommandParser:
        found = CommandParser(prog="job")
        found.add_run()
        return found

    job = entry_point(parser, read)
    assert job(["--run", str(file.parent)]) == 2 and "my_code" not in sys.modules
    assert job(["--run", str(file.parent), "--allow-code"]) == 0
    assert job(["--run", str(file.parent)]) == 0, "it is imported already"
