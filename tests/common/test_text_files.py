import gzip
from pathlib import Path

import pytest

from hllm_torchrec.common.text_files import PlainFile, Utf8File, read_list
from tests.helpers.text_tables import COMPRESSIONS, zipped


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_lists_are_read_from_any_compression(tmp_path: Path, compression: str) -> None:
    (tmp_path / "ids").write_bytes(COMPRESSIONS[compression](b"a\n\nb c\r\n d\xc2\x85e\n"))
    assert read_list(tmp_path / "ids") == ["a", "b c", " d\x85e"], "only line ends divide"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_are_told_by_their_marks(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "ids").write_bytes("first\nzw\u00f6lf\n".encode(encoding))
    assert read_list(tmp_path / "ids") == ["first", "zw\u00f6lf"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\x00x", r"ids: 'utf-8' codec .*write UTF-8 text, one entry per line"),
        (b"a\nPAR1\x00\x01", r"ids is not text; write UTF-8 text"),
        (b"\n \n", r"ids has no lines; write UTF-8 text"),
        (gzip.compress(b"a\nb\n" * 1000, mtime=0)[:-9], r"ids is a damaged gzip file .*fetch or write it again"),
        (b"\x28\xb5\x2f\xfd nonsense", r"ids is a damaged zstd file"),
        (zipped({"a": b"1"}).replace(b"\x08\x00", b"\x63\x00"), r"ids is a damaged zip file \(That compression method"),
        (zipped({"a": b"1", "b": b"2"}), r"ids holds 2 files \(a, b\); give an archive of one"),
        (zipped({"[Content_Types].xml": b"", "x": b""}), r"ids is a workbook or a document, not a table"),
        (b"\xff\xfea\x00\n", r"ids, after line 1: not utf-16 .*write the file as UTF-8"),
    ],
)
def test_what_is_no_list_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "ids").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "ids")


def test_an_unknown_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"a")
    with pytest.raises(ValueError, match=r"t: 'klingon' is not an encoding; choose one"):
        Utf8File(tmp_path / "t", "klingon")


def test_an_error_of_the_machine_is_not_damage(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        PlainFile(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_list(tmp_path / "none")
