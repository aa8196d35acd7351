"""Error types and message helpers: all problems of a configuration at once, name suggestions, no credentials."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class ConfigError(ValueError):
    """Invalid configuration; the message contains all problems, one line each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Store one or several problems; each is a line with the dotted field, the value, the rule and the remedy."""
        assert problems, "a ConfigError without a problem"
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(self.problems)  # pickle calls the class with `args`, so they must be the problems

    def __str__(self) -> str:
        """Return a single problem as it is; several as a list with a heading that counts them."""
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n  - ".join([f"{len(self.problems)} problems in the configuration:", *self.problems])


class ArgumentError(ValueError):
    """Invalid argument of a module. The message starts with the argument's name: 'heads: 3: must ...'."""


@contextmanager
def configured_by(section: str, **fields: str) -> Iterator[None]:
    """Context manager: `ArgumentError` messages name the configuration field instead of the argument.

    section: configuration section that has a field with the argument's name; fields: argument -> dotted field, for
    arguments whose field has another name or is in another section.
    """
    try:
        yield
    except ArgumentError as error:
        argument, _, problem = str(error).partition(":")
        raise ArgumentError(f"{fields.get(argument, f'{section}.{argument}')}:{problem}") from error


class UnavailableError(ValueError):
    """A file that cannot be written or read now (a full disk, a lock): the same request may succeed later."""


class Preempted(Exception):
    """The run was asked to stop, which is not a fault. The message states where the run's state is saved.

    interrupted: True for Ctrl-C (SIGINT), False for SIGTERM.
    """

    def __init__(self, message: str = "", *, interrupted: bool = False) -> None:
        super().__init__(message)
        self.interrupted = interrupted


# `user:password@` may precede the host of a URL; it ends at the last @ before the path. A password may contain slashes
# that should have been percent-encoded: it is recognized because the text after the colon is not a port and a slash.
_CREDENTIALS = re.compile(r"(?<=:/)(/?)(?:[^\s/'\"]*|[^\s/:'\"]*:(?!\d+/)[^\s'\"]*)@")
_QUERY = re.compile(r"(?<=:/)(/?[^\s?'\"]*\?)[^\s'\"]+")


def without_credentials(text: str) -> str:
    """Replace user names, passwords and tokens of URLs in `text`, before an @ or after a ?, by `***`."""
    return _QUERY.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", text))


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the candidate most like `name`, or an empty string if none is similar.

    Case is ignored. The hint starts with a space, so that it can be appended to a message.
    """
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
