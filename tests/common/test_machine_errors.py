"""Errors of the machine: what they are, and the path that they get."""

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from hllm_torchrec.common.machine_errors import is_disk_full, is_machine_error, path_in_errors


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError("12 requested and 0 written"),  # numpy
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter: No space left on device"),
    ],
)
def test_a_full_disk_is_known_in_every_librarys_words_and_gets_a_path(error: Exception) -> None:
    assert is_disk_full(error)
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: 'here'"), path_in_errors(Path("here")):
        raise error


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "x", "y"), ValueError("damaged"), KeyError("a")])
def test_errors_of_contents_pass(error: Exception) -> None:
    assert not is_disk_full(error) and not is_machine_error(error)
    with pytest.raises(type(error)) as found, path_in_errors("here"):
        raise error
    assert found.value is error


def test_a_path_that_is_named_stays_and_a_lack_of_memory_gets_one() -> None:
    with pytest.raises(PermissionError, match="'there'"), path_in_errors("here"):
        raise PermissionError(errno.EACCES, "Permission denied", "there")
    with pytest.raises(OSError, match=r"\[Errno 12\] Cannot allocate memory: 'here'") as found, path_in_errors("here"):
        raise MemoryError
    assert is_machine_error(found.value) and is_machine_error(MemoryError())
