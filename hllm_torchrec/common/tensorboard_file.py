"""Scalars for TensorBoard, written by the caller's thread.

The writers of torch and TensorBoard have a thread: what fails on it is printed as a traceback, and closing waits for
it, after an interruption for up to two minutes.
"""

import itertools
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_number = itertools.count()


class ScalarFile:
    """A new event file in a folder, which is created if missing."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Open the file; purge_step: earlier files' events from this step on are hidden, as they are written again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # takes a second, which other ranks save
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        self._file = (folder / name).open("wb")
        self._records, self._event = RecordWriter(self._file), Event
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of one event, by name.

        Raises:
            OSError: the file cannot be written to; it then ends with the event before, and no more can be written.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        if values:
            self._write(step=step, summary=Summary(value=values))
            self._file.flush()

    def close(self) -> None:
        """Close the file; what could not be written is left out."""
        with suppress(OSError):
            self._file.close()

    def _write(self, **event: object) -> None:
        self._records.write(self._event(wall_time=time.time(), **event).SerializeToString())
