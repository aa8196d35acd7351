import pickle

import pytest

from hllm_torchrec.common.errors import ArgumentError, ConfigError, configured_by, did_you_mean


def test_all_problems_are_reported_together() -> None:
    error = ConfigError(["trainer.steps is -1: must be at least 0", "data.path is empty: name a folder"])
    assert str(error) == (
        "2 problems in the configuration:\n"
        "  - trainer.steps is -1: must be at least 0\n"
        "  - data.path is empty: name a folder"
    )
    with pytest.raises(ValueError, match=r"(?s)trainer\.steps.*data\.path"):
        raise error


def test_one_problem_is_the_whole_message() -> None:
    error = ConfigError(["data.path is empty: name a folder"])
    assert str(error) == "data.path is empty: name a folder"
    assert error.problems == ["data.path is empty: name a folder"]
    assert ConfigError("data.path is empty: name a folder").problems == error.problems


def test_the_error_survives_pickling_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(ConfigError(["a", "b"])))
    assert copy.problems == ["a", "b"] and "2 problems" in str(copy)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("learning_rat", " (did you mean 'learning_rate'?)"),
        ("Learning_Rate", " (did you mean 'learning_rate'?)"),
        ("steps", " (did you mean 'max_steps'?)"),
        ("zzz", ""),
    ],
)
def test_nearest_names_the_likeliest_key_or_nothing(name: str, hint: str) -> None:
    assert did_you_mean(name, ["learning_rate", "max_steps", "batch_size"]) == hint


def test_nearest_without_candidates_is_empty() -> None:
    assert did_you_mean("x", []) == ""


def test_an_argument_is_named_by_its_field_of_the_configuration() -> None:
    with pytest.raises(ArgumentError, match=r"^user\.shape\.heads: 3: must be even$"), configured_by("user.shape"):
        raise ArgumentError("heads: 3: must be even")
    with pytest.raises(ArgumentError, match=r"^data\.max_history: 9 positions: at most 8$"):
        with configured_by("user.shape", length="data.max_history"):
            raise ArgumentError("length: 9 positions: at most 8")
    with pytest.raises(ValueError, match="^heads: 3: another kind of error$"), configured_by("user.shape"):
        raise ValueError("heads: 3: another kind of error")
