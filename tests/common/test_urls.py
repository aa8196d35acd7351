"""URLs that cannot be opened: one line that names them, without their credentials."""

from pathlib import Path

import pytest

from hllm_torchrec.common.urls import open_filesystem, read_text, upload_files


@pytest.mark.parametrize("url", ["reference://x", "github://a", "dir://x", "blockcache://x", "zip://x"])
def test_a_url_of_a_file_system_inside_another_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^{url}: such a URL cannot be opened by itself \(.*give one of a server"):
        read_text(url)


def test_errors_of_clients_name_the_url_without_its_password() -> None:
    for error in (PermissionError, FileNotFoundError, ConnectionResetError, TimeoutError):
        with pytest.raises(OSError, match=r"^memory://\*\*\*@host/x: .*memory://\*\*\*@host/x") as raised:
            with open_filesystem("memory://me:s3cr@et!@host/x"):
                raise error("at memory://me:s3cr@et!@host/x")
        assert "s3cr" not in str(raised.value) and "et!" not in str(raised.value)


def test_a_local_file_that_is_missing_is_not_blamed_on_the_bucket(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone.parquet") as raised:
        upload_files(tmp_path, ["gone.parquet"], "memory://host/x")
    assert "bucket" not in str(raised.value)
