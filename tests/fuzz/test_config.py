"""Fuzz: the YAML configuration and dotted overrides."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.config.loading import load_config, to_dict
from hllm_torchrec.config.schema import Config
from tests.fuzz.mutations import FEWER, Target, byte_changes, change_bytes, check_reader, edit, edits
from tests.helpers import fixtures

OPTIONS = (
    "seed",
    "output",
    "data.dataset",
    "data.batch_users",
    "item_llm.shape",
    "optim.lr",
    "stages",
    "user",
    "nothing",
)
TEXTS = (
    "", "1", "-1", "1e999", "nan", "null", "[", "{a: {b: [", "- - -", "!!python/object:os.system {}", "&a [*a]",
    "\x00", "\ud800", "9" * 5000, "{}", "[]", "true", "../../etc", "x: y", "--seed", "@file", "2020-01-01", "0x10",
)  # fmt: skip


@cache
def good() -> tuple[Path, dict[str, Any]]:
    """Where the file is written, and a configuration that loads."""
    return fixtures.folder() / "fuzz-config.yaml", to_dict(fixtures.config())


def check(mutation: Any) -> None:
    path, document = good()
    arguments = ["--config", str(path)]
    data = yaml.safe_dump(document).encode()
    match mutation:
        case ("document", changes):
            data = yaml.safe_dump(edit(document, changes)).encode("utf-8", "surrogatepass")
        case ("bytes", changes):
            data = change_bytes(data, changes)
        case ("raw", text):
            data = text.encode("utf-8", "surrogatepass")
        case ("options", *options):
            arguments += [word for name, text in options for word in (f"--{name}", text)]
    path.write_bytes(data)
    check_reader(lambda: use(arguments), [str(path), "--", *document])


def use(arguments: list[str]) -> None:
    """Load it."""
    assert isinstance(load_config(arguments), Config)


TARGET = Target(
    "config",
    st.one_of(
        st.tuples(st.just("document"), edits()),
        st.tuples(st.just("bytes"), byte_changes()),
        st.tuples(st.just("raw"), st.sampled_from(TEXTS) | st.text(max_size=40)),
        st.builds(
            lambda pairs: ("options", *pairs),
            st.lists(
                st.tuples(st.sampled_from(OPTIONS), st.sampled_from(TEXTS) | st.text(max_size=20)),
                min_size=1, max_size=3,
            ),
        ),
    ),
    check,
)  # fmt: skip


@pytest.mark.slow
@FEWER
@example(("raw", "!!python/object/apply:os.getpid []"))
@example(("raw", "[" * 3000))
@example(("raw", "a: &a [*a]"))
@example(("raw", "{[1]: 2}"))
@example(("raw", "1: 2"))
@example(("bytes", [("insert", 0.0, 255)]))
@example(("options", ("optim.lr", "nan")))
@example(("options", ("output", "\x00")))
@example(("options", ("nothing", "1")))
@given(TARGET.inputs)
def test_a_configuration_is_loaded_or_refused_by_its_fields(mutation: Any) -> None:
    check(mutation)


def test_what_is_not_mutated_is_loaded() -> None:
    assert good()[0].write_text(yaml.safe_dump(good()[1]))
    assert check_reader(lambda: use(["--config", str(good()[0])]), [])
