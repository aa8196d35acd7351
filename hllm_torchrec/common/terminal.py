"""Output to the terminal: control characters in data are escaped, and credentials in URLs are replaced by `***`."""

import logging
import sys
import unicodedata
from typing import TextIO

from hllm_torchrec.common.errors import without_credentials

_CONTROL = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that move the cursor, start an escape sequence, reorder the text or end a line."""
_HARMLESS = "\u200c\u200d"  # zero-width (non-)joiners, which some scripts and emoji need


def printable(text: str) -> str:
    r"""Return `text` as one line: each control character is replaced by its escape, such as \x1b or \n."""
    if text.isascii() and text.isprintable():
        return text
    escaped = {c: c.encode("unicode_escape").decode() for c in text if unicodedata.category(c) in _CONTROL}
    return "".join(c if c in _HARMLESS else escaped.get(c, c) for c in text)


def shown(text: str) -> str:
    """Return `text` without credentials and with each of its lines made `printable`; tabs are kept."""
    lines = without_credentials(text).split("\n")
    return "\n".join("\t".join(printable(part) for part in line.split("\t")) for line in lines)


def say(text: object, stream: TextIO | None = None) -> None:
    """Print `shown(text)` to standard output, or to `stream`. Jobs print all but `--print_config` by this function."""
    print(shown(str(text)), file=stream or sys.stdout, flush=True)


class _ShownRecord(logging.LogRecord):
    """Log record whose message goes through `shown`, for every handler."""

    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        """See `logging.LogRecord.getMessage`."""
        return shown(super().getMessage())


def show_logs_safely() -> None:
    """Make the messages of all loggers go through `shown`."""
    logging.setLogRecordFactory(_ShownRecord)
