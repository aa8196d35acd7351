"""Fuzz: small text files of ids, whole or damaged."""

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from hllm_torchrec.common.text_files import read_list
from tests.fuzz.mutations import FEW, Target, byte_changes, change_bytes, check_reader
from tests.helpers import fixtures
from tests.helpers.text_tables import COMPRESSIONS

IDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r\n\ufeff", exclude_categories=["Cs"]), min_size=1, max_size=9
)


def check(mutation: Any) -> None:
    kind, ids, line_end, encoding, compression, changes = mutation
    path = fixtures.folder() / "fuzz-list"
    path.write_bytes(COMPRESSIONS[compression](line_end.join(ids).encode(encoding)))
    if kind == "damaged":
        path.write_bytes(change_bytes(path.read_bytes(), changes))
        check_reader(lambda: read_list(path), [str(path)])
        return
    expected = [name for name in ids if name.strip()]
    try:
        assert read_list(path) == expected
    except ValueError as error:
        assert not expected and "has no lines" in str(error), error


TARGET = Target(
    "lists",
    st.tuples(
        st.sampled_from(["whole", "damaged"]),
        st.lists(IDS, min_size=1, max_size=6),
        st.sampled_from(["\n", "\r\n", "\r"]),
        st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
        st.sampled_from(list(COMPRESSIONS)),
        byte_changes(),
    ),
    check,
)


@FEW
@example(("damaged", ["a", "b"], "\n", "utf-8", "zstd", [("cut", 0.5, 1)]))
@given(TARGET.inputs)
def test_lists_are_read_as_written_or_refused_by_file(mutation: Any) -> None:
    check(mutation)
