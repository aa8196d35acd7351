"""TensorBoard event files of scalars, written by the caller's thread.

The writers of torch and TensorBoard use a background thread: an error on that thread is only printed as a traceback,
and closing the writer after an interruption waits for the thread for up to two minutes.
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
        """Open the file. purge_step: TensorBoard hides the events of earlier files from this step on."""
        # This import takes a second; ranks other than 0 do not need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
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
        """Write the numbers (name -> value) of one event.

        Raises:
            OSError: the file cannot be written to. It may then end with half an event, after which TensorBoard reads no
                further: write later events to a new file.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        if values:
            self._write(step=step, summary=Summary(value=values))
            self._file.flush()

    def close(self) -> None:
        """Close the file; data that cannot be written is dropped."""
        with suppress(OSError):
            self._file.close()

    def _write(self, **event: object) -> None:
        self._records.write(self._event(wall_time=time.time(), **event).SerializeToString())
