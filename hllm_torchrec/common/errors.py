"""Error types and message helpers: all problems of a configuration at once, name suggestions, no credentials."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class ConfigError(ValueError):
    """Invalid configuration; the message contains all problems, one line each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Store `problems`, one or several lines: each names the dotted field, the value, the rule and the remedy."""
        assert problems, "a ConfigError without a problem"
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(self.problems)  # the argument itself, so that the error survives pickling

    def __str__(self) -> str:
        """Return the problem if there is one; else their number, and each on a line."""
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n  - ".join([f"{len(self.problems)} problems in the configuration:", *self.problems])


class ArgumentError(ValueError):
    """Invalid argument of a module. The message starts with its name: 'heads: 3: must ...'."""


@contextmanager
def configured_by(section: str, **fields: str) -> Iterator[None]:
    """Context manager: `ArgumentError` messages name the configuration field instead of the argument.

    section: dotted section whose fields are the arguments; fields: argument -> dotted field, for all other arguments.
    """
    try:
        yield
    except ArgumentError as error:
        argument, _, problem = str(error).partition(":")
        raise ArgumentError(f"{fields.get(argument, f'{section}.{argument}')}:{problem}") from error


class UnavailableError(ValueError):
    """A file that cannot be written or read now (a full disk, a lock): the same request may succeed later."""


class Preempted(Exception):
    """The run was asked to stop. This is not a fault; the message states where its state is saved.

    interrupted: True for Ctrl-C (SIGINT), False for SIGTERM.
    """

    def __init__(self, message: str = "", *, interrupted: bool = False) -> None:
        super().__init__(message)
        self.interrupted = interrupted


# The host of a URL may follow user names and passwords, which end with the last @ before the path. A password with
# slashes, which should have been quoted, is recognized by a colon that no port follows.
_CREDENTIALS = re.compile(r"(?<=:/)(/?)(?:[^\s/'\"]*|[^\s/:'\"]*:(?!\d+/)[^\s'\"]*)@")
_QUERY = re.compile(r"(?<=:/)(/?[^\s?'\"]*\?)[^\s'\"]+")


def without_credentials(text: str) -> str:
    """Replace user names, passwords and tokens of URLs in `text`, before an @ or after a ?, by `***`."""
    return _QUERY.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", text))


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the candidate most like `name`, or an empty string if none is.

    Case is ignored. The hint starts with a space, so that it can be appended to any message as it is.
    """
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
