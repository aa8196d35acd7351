"""`Writer`: what answers the prompts of a build; one of the library's, or your own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.common.hashing import hash_json
from hllm_torchrec.config.extensions import EXTENSION_FORM, is_extension, load_extension

LLM_WRITERS = ("openai", "local")


@dataclass(frozen=True)
class Ask:
    """A prompt. max_tokens: of the answer; user, item: raw ids, for the file of answers, never part of a prompt."""

    stage: str
    system: str
    prompt: str
    user: str
    item: str | None = None
    max_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0

    def key(self, writer: str) -> str:
        """Hash of everything that an answer depends on."""
        asked = [self.stage, writer, self.system, self.prompt, self.max_tokens, self.temperature, self.seed]
        return hash_json(asked)


@dataclass(frozen=True)
class Answer:
    """Answer to the ask at `index` of those given. text: None if there is none, and `error` says why; tokens: of the
    prompt and of the answer."""

    index: int
    text: str | None
    error: str = ""
    tokens: tuple[int, int] = (0, 0)


class Writer(Protocol):
    """Answers prompts.

    name: names the model in the table (`origin`) and in the keys of answers: another model has another name.
    leaves_machine: host that prompts are sent to; empty, or left out by a writer of your own, if they stay here.
    """

    name: str
    leaves_machine: str

    def write(self, asked: Sequence[Ask]) -> Iterable[Answer]:
        """Answer each of `asked` once, in any order; answers are kept as they come.

        Raises:
            Preempted: a limit of its own is reached; what it has answered is kept.
            ValueError: no prompt can be answered, such as for a wrong key.
        """
        ...


def check_writer(name: str) -> None:
    """Raise ValueError for a name that is neither one of the library's writers nor `module:Name`."""
    known = ("template", *LLM_WRITERS)
    if name not in known and not is_extension(name):
        raise ValueError(
            f"--writer {name!r}: must be one of {', '.join(known)}, or {EXTENSION_FORM}{did_you_mean(name, known)}"
        )


def own_writer(name: str) -> Writer:
    """An instance of a writer of your own, named `module:Name`; its class takes no arguments.

    Raises:
        ValueError: there is no such class, or it is no writer.
    """
    found: Any = load_extension(name, "--writer")
    writer = found() if callable(found) else found
    if not isinstance(getattr(writer, "name", None), str) or not callable(getattr(writer, "write", None)):
        raise ValueError(f"--writer {name!r}: must have a name and write(asked), as `creative.writing.writer.Writer`")
    result: Writer = writer
    return result
