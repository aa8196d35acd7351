"""The configuration: every problem is reported, with its remedy, and a file says what was run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.config.loading import config_from_file, load_config, load_dataclass, save_config, to_dict
from hllm_torchrec.config.rules import OWN_TABLES
from hllm_torchrec.config.schema import Config
from hllm_torchrec.lifecycle.night_config import NightConfig

USER = "{model_type: llama, hidden_size: 8}"
VALID = ["--user.shape", USER, "--item_llm.enabled", "false"]


def write(folder: Path, text: str) -> list[str]:
    """A configuration file; returns the arguments that load it."""
    (folder / "c.yaml").write_text(text)
    return ["--config", str(folder / "c.yaml")]


def problems_of(arguments: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load_config(arguments)
    return raised.value.problems


def test_unknown_keys_and_wrong_types_of_file_and_options_are_reported_together(tmp_path: Path) -> None:
    text = """
    data: {max_histry: 5, batch_users: many}
    optim: 3
    stages: [{name: one, epochs: 1}, {nam: two, epochs: soon}]
    colour: red
    """
    found = problems_of([*write(tmp_path, text), "--objective.fuson", "late", "--optim.lr=fast", "--seed", "1"])
    file = tmp_path / "c.yaml"
    assert found == [
        f"{file}: data.max_histry: unknown key (did you mean 'max_history'?)",
        f"{file}: data.batch_users: 'many': must be an integer",
        f"{file}: optim: 3: must be a mapping of OptimConfig fields",
        f"{file}: stages[1].nam: unknown key (did you mean 'name'?)",
        f"{file}: stages[1].epochs: 'soon': must be a number",
        f"{file}: stages[1].name: missing: must be text",
        f"{file}: colour: unknown key",
        "--objective.fuson: unknown option (did you mean 'objective.fusion'?)",
        "--optim.lr: 'fast': must be a number",
    ]


def test_a_value_in_a_mapping_of_numbers_is_checked() -> None:
    options = ["--optim.table_options.eps", "small", "--user.shape.width", "any"]
    assert problems_of(options) == ["--optim.table_options.eps: 'small': must be a number"]
    assert problems_of(["--optim.table_options", "{eps: small}"]) == [
        "--optim.table_options: '{eps: small}': must be a mapping, each value a number"
    ]
    assert load_config([*VALID, "--optim.table_options.eps=1e-6"]).optim.table_options == {"eps": 1e-6}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--objective.fusion=middle", "must be one of late, early, none"),
        ("--resume=maybe", "must be true or false"),
        ("--item_llm.layers=two", "must be an integer or null"),
        ("--evaluation.ks=[10, x]", "must be a list, each an integer"),
        ("--user.shape=[1]", "must be a mapping or null"),
        ("--stages=[{name: a, epoch: 2}]", "stages[0].epoch: unknown key (did you mean 'epochs'?)"),
        ("--stages=[{name: a", "not valid YAML"),
        ("--data={max_histry: 2}", "data.max_histry: unknown key"),
        ("--seed", "must be an integer"),
    ],
)
def test_a_wrong_option_says_what_it_must_be(option: str, message: str) -> None:
    (problem,) = problems_of([*VALID, option])
    assert message in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must be a mapping of Config fields"),
        ("data: {a: [}\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(text: str, message: str, tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, text))
    assert problem.startswith(str(tmp_path / "c.yaml")) and message in problem


def test_a_missing_file_and_a_stray_word_are_named(tmp_path: Path) -> None:
    assert problems_of(["--config", str(tmp_path / "no.yaml")]) == [f"--config: {tmp_path}/no.yaml: no such file"]
    assert problems_of([*VALID, "--config"]) == ["--config: no file given"]
    (problem,) = problems_of([*VALID, "resume"])
    assert "unrecognized arguments: resume" in problem


def test_broken_rules_are_reported_together() -> None:
    found = problems_of(
        [
            *(
                "--data.max_history=1",
                "--data.id_dropout=1",
                "--features.time_depth=7",
                "--optim.accumulate=0",
            ),
            *("--objective.temperature=0.001", "--evaluation.retrieval=true", "--parallel.timeout=0"),
            *("--stages", "[{name: a, epochs: 0}, {name: b, max_history: 1}]"),
        ]
    )
    assert found == [
        "data.max_history: 1: must be >= 2",
        "data.id_dropout: 1.0: must be >= 0 and < 1",
        "features.time_depth: 7: must be >= 0 and <= 6",
        "objective.temperature: 0.001: must be >= 0.01",
        "optim.accumulate: 0: must be >= 1",
        "parallel.timeout: 0.0: must be > 0",
        "stages[0].epochs: 0.0: must be > 0",
        "stages[1].max_history: 1: must be >= 2",
        "item_llm: pretrained=None, shape=None: give one of them (weights, or a shape for random ones), "
        "or item_llm.enabled: false for a model without texts",
        "user: pretrained=None, shape=None: give one of them (weights, or a shape for random ones)",
        "evaluation.retrieval: true without a generative loss: set objective.generative_weight above 0, "
        "or retrieval to false",
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--features.item_id=false", "items would have no features"),
        ("--stages=[]", "stages: empty: give at least one"),
        ("--user.pretrained=some/folder", "give one of them"),
    ],
)
def test_a_rule_that_spans_fields_names_the_remedy(option: str, message: str) -> None:
    assert any(message in problem for problem in problems_of([*VALID, option]))


RETRIEVAL = ["--objective.fusion=none", "--objective.positive_targets_only=false"]
HSTU = ["--user.encoder=hstu", "--user.shape", "{width: 8, layers: 1}", "--item_llm.enabled=false"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objective.item_space=text"], "objective.item_space: 'text' while item_llm.enabled is false"),
        (["--user.layers=2"], "user.layers: 2: only for user.encoder llm; leave it out"),
        (["--user.shape", "{width: 8, layer: 1}"], "user.shape.layer: unknown key (did you mean 'layers'?)"),
        (["--user.shape", "{width: 8}"], "user.shape.layers: missing: must be an integer"),
        (["--user.shape", "{width: 8, layers: two}"], "user.shape.layers: 'two': must be an integer"),
        (["--user.shape", "{width: 8, layers: 1, silu: q}"], "user.shape.silu: 'q': must be one of all, u or null"),
        (["--user.shape", "{width: 8, layers: 1, dropout: 1}"], "user.shape.dropout: 1: must be >= 0 and < 1"),
        (["--user.shape", "{width: 8, layers: 0}"], "user.shape.layers: 0: must be >= 1"),
        (
            ["--user.encoder=sasrec", "--user.shape", "{width: 8, layers: 1, attention_dropout: 1.5}"],
            "user.shape.attention_dropout: 1.5: must be >= 0 and < 1",
        ),
        (
            ["--user.encoder=sasrec", "--user.shape", "{width: 8, layers: 1, max_positions: 9}"],
            "user.shape.max_positions: 9: must be at least the longest history, 1024",
        ),
        (
            ["--user.shape", "{width: 8, layers: 1, time_of: next}", "--objective.fusion=late"],
            "user.shape.time_of: 'next': only with objective.fusion none",
        ),
        (
            ["--creative.enabled=true", "--objective.tasks", "{click: {}, like: {}}"],
            "creative.enabled: true with several objective.tasks",
        ),
        (
            ["--creative.enabled=true", "--objective.fusion=early"],
            "creative.enabled: true with objective.fusion 'early'",
        ),
        (
            ["--user.shape", "{width: 8, layers: 1, prefix: 1, prefix_mask: history}"],
            "user.shape.prefix_mask: 'history': training and evaluation read many moments",
        ),
        (
            [
                "--user.encoder=ligr",
                "--user.shape",
                "{width: 8, layers: 1, count_from: end}",
                "--objective.fusion=early",
            ],
            "user.shape.count_from: 'end': only with objective.fusion none",
        ),
        (
            ["--evaluation.protocol=leave_one_out", "--data.train_part=train_and_valid"],
            "data.train_part: 'train_and_valid': must be 'train' under evaluation.protocol leave_one_out",
        ),
        (
            ["--evaluation.protocol=ml1m_hstu", "--objective.positive_targets_only=true"],
            "objective.positive_targets_only: True: must be False under evaluation.protocol ml1m_hstu",
        ),
        (
            ["--data.train_part=train_and_valid", "--stages", "[{name: a, epochs: 2}]"],
            "evaluation.every: 1.0: must be at least the 2 epochs of all stages",
        ),
    ],
)
def test_a_rule_of_encoders_and_protocols_names_the_remedy(options: list[str], message: str) -> None:
    load_config([*HSTU, *RETRIEVAL])
    assert any(message in problem for problem in problems_of([*HSTU, *RETRIEVAL, *options]))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--features.item_id=true"], "item_id"),
        (["--features.action=true"], "action"),
        (["--features.action_gate=true"], "action_gate"),
        (["--features.time_depth=2"], "time_month"),
        (["--data.context", "[device]"], "context_device"),
        (["--data.user_features", "[genres]"], "genres"),
    ],
)
def test_a_feature_does_not_take_the_place_of_another_table(options: list[str], name: str) -> None:
    off = ["--features.item_id=false", "--features.action=false", "--features.time_depth=0"]
    given = ["--user.shape", USER, "--item_llm.shape", USER, *off, "--data.item_features", f"[{name}]"]
    load_config(given)
    kind = "user_features" if "--data.user_features" in options else "item_features"
    message = f"data.{kind}: '{name}' is the name of another table of the model: leave it out, or rename the column"
    assert problems_of([*given, *options]) == [message]


def test_a_feature_with_a_dot_cannot_name_a_table() -> None:
    given = ["--user.shape", USER, "--item_llm.shape", USER, "--data.user_features", "[geo.country]"]
    assert problems_of(given) == [
        "data.user_features: 'geo.country': the name of a table has no dot: leave it out, or rename the column"
    ]


def test_the_tables_of_the_model_are_those_that_it_builds() -> None:
    from hllm_torchrec.modules.features.hybrid import ACTION_GATE
    from hllm_torchrec.modules.features.timestamps import TIME_FEATURES

    assert OWN_TABLES == ("item_id", "action", ACTION_GATE, *TIME_FEATURES)


def test_ks_must_be_positive_where_retrieval_is_measured() -> None:
    retrieval = ["--user.shape", USER, "--item_llm.shape", USER, "--objective.fusion=none"]
    for ks in ("[10, 0]", "[]"):
        found = problems_of([*retrieval, f"--evaluation.ks={ks}"])
        assert found == [f"evaluation.ks: {ks}: give at least one K, each at least 1"]


def test_a_configuration_built_in_code_keeps_the_rules_too() -> None:
    config = load_config(VALID)
    with pytest.raises(ConfigError, match=r"data.batch_users: 0: must be >= 1"):
        replace(config, data=replace(config.data, batch_users=0))


def test_options_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    text = f"seed: 5\nuser: {{shape: {USER}}}\nitem_llm: {{enabled: false}}\noptim: {{lr: 0.5, accumulate: 3}}\n"
    config = load_config([*write(tmp_path, text), "--optim.lr", "0.25", "--user.shape.hidden_size=16"])
    assert (config.seed, config.optim.lr, config.optim.accumulate, config.optim.table_lr) == (
        5,
        0.25,
        3,
        0.05,
    )
    assert config.user.shape == {"model_type": "llama", "hidden_size": 16}


def test_a_later_file_overrides_an_earlier_one(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(f"seed: 1\nmax_steps: 7\nuser: {{shape: {USER}}}\nitem_llm: {{enabled: false}}\n")
    second.write_text("seed: 2\n")
    config = load_config(["--config", str(first), f"--config={second}"])
    assert (config.seed, config.max_steps) == (2, 7)


FULL = [
    *(
        "--item_llm.shape",
        "{model_type: llama, hidden_size: 8, rope_parameters: {rope_theta: 1.0, list: [1, 2]}}",
    ),
    *(
        "--user.shape",
        USER,
        "--data.item_features",
        "[genres, tags]",
        "--item_llm.text_keys",
        "[title, plot]",
    ),
    *("--stages", "[{name: Ünï, epochs: 0.5, max_history: 9}, {name: b, item_embeddings: cached}]"),
    *("--evaluation.ks=[1, 2]", "--optim.user_lr=1e-5", "--objective.generative_weight=0.5", "--resume=true"),
    *("--item_llm.prompt", "Compress: ", "--item_llm.separator", " | "),
]


def test_a_saved_configuration_loads_equal(tmp_path: Path) -> None:
    config = load_config(FULL)
    save_config(config, tmp_path / "run" / "config.yaml")
    assert config_from_file(tmp_path / "run" / "config.yaml") == config
    assert config.stages[1].epochs == 1.0 and config.item_llm.separator == " | "


def test_the_printed_configuration_loads_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        load_config([*FULL, "--print_config"])
    assert exited.value.code == 0
    assert load_config(write(tmp_path, capsys.readouterr().out)) == load_config(FULL)


def test_fields_named_like_methods_of_the_parser_are_read_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, "append: {items: new.csv}\nstores: {items: false}\n")
    night = load_dataclass(NightConfig, file, prog="nightly", description="")
    assert (night.append.items, night.stores.items) == ("new.csv", False)
    assert load_dataclass(NightConfig, ["--stores.items=false"], prog="nightly", description="").stores.items is False
    with pytest.raises(SystemExit):
        load_dataclass(NightConfig, [*file, "--print_config"], prog="nightly", description="")
    printed = write(tmp_path, capsys.readouterr().out)
    assert load_dataclass(NightConfig, printed, prog="nightly", description="") == night


def test_plain_form_survives_json() -> None:
    plain = to_dict(load_config(FULL))
    assert json.loads(json.dumps(plain)) == plain
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


def test_every_field_has_a_docstring_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Earlier events that form the history" in text
    assert "Seconds that a rank waits for the others" in text


def test_defaults_are_a_configuration_but_for_the_models() -> None:
    assert len(problems_of([])) == 2  # no backbone is given
    assert isinstance(load_config(VALID), Config)


def test_the_defaults_are_printed_even_though_they_are_no_whole_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        load_config(["--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["stages"][0]["name"] == "end to end" and printed["user"]["shape"] is None
