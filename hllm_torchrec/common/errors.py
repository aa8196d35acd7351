"""Errors that name what to mend: all problems of a configuration at once, the nearest right name, no credentials."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class ConfigError(ValueError):
    """A configuration that cannot run, with all of its problems (one line each) in one message."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        """Keep `problems`, one or several lines: each names the dotted field, the value, the rule and the remedy."""
        assert problems, "a ConfigError without a problem"
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(self.problems)  # the argument itself, so that the error survives pickling

    def __str__(self) -> str:
        """Return the one problem, or their number and then each on its own line."""
        if len(self.problems) == 1:
            return self.problems[0]
        return "\n  - ".join([f"{len(self.problems)} problems in the configuration:", *self.problems])


class ArgumentError(ValueError):
    """An argument of a building block that breaks a rule. The message begins with its name: 'heads: 3: must ...'."""


@contextmanager
def configured_by(section: str, **fields: str) -> Iterator[None]:
    """Within the context messages of `ArgumentError` name the field of the configuration instead of the argument.

    section: the dotted section that has the arguments as its fields; fields: argument -> dotted field, for others.
    """
    try:
        yield
    except ArgumentError as error:
        argument, _, problem = str(error).partition(":")
        raise ArgumentError(f"{fields.get(argument, f'{section}.{argument}')}:{problem}") from error


class Preempted(Exception):
    """The run was asked to leave (SIGTERM): no fault, and its state is saved where it says so."""


def without_credentials(text: str) -> str:
    """`text` with `***` for what stands between `//` and `@` in addresses: names and passwords, which may be tokens."""
    return re.sub(r"(?<=://)[^\s/@]+@", "***@", text)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the candidate most like `name`, or an empty string if none is.

    Case is ignored. The hint starts with a space, so that it can be appended to any message as it is.
    """
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
