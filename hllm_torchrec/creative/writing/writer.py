"""`Writer`: the interface between a build and the language model that answers its prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hllm_torchrec.common.errors import did_you_mean
from hllm_torchrec.common.hashing import hash_json
from hllm_torchrec.config.extensions import EXTENSION_FORM, is_extension, load_extension

LLM_WRITERS = ("openai", "local")


@dataclass(frozen=True)
class Ask:
    """A prompt of a stage.

    system, prompt: the two messages; user, item: raw ids that are written to the file of answers and are never part of
    a prompt; max_tokens, temperature, seed: parameters of the answer.
    """

    stage: str
    system: str
    prompt: str
    user: str
    item: str | None = None
    max_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0

    def key(self, writer: str) -> str:
        """Return the hash of everything that an answer depends on."""
        return hash_json([self.stage, writer, self.system, self.prompt, self.max_tokens, self.temperature, self.seed])


@dataclass(frozen=True)
class Answer:
    """Answer to a prompt.

    index: position of the prompt in the sequence that the writer was given; text: the answer, or None if there is none,
    for the reason `error`; tokens: numbers of tokens of the prompt and of the answer.
    """

    index: int
    text: str | None
    error: str = ""
    tokens: tuple[int, int] = (0, 0)


class Writer(Protocol):
    """Answers prompts.

    name: name of the model. It is the column `origin` of the table and part of the keys of answers, so every model
    needs a different name.
    leaves_machine: host to which prompts are sent; empty if prompts stay on this machine. Optional for custom writers.
    """

    name: str
    leaves_machine: str

    def write(self, asks: Sequence[Ask]) -> Iterable[Answer]:
        """Answer each prompt once, in any order. The build stores every answer when it is yielded.

        Raises:
            Preempted: the writer has reached a limit. Answers that were yielded before are stored.
            ValueError: no prompt can be answered, for example because the key is wrong.
        """
        ...


def check_writer(name: str) -> None:
    """Raise ValueError for a name that is neither one of the library's writers nor `module:Name`."""
    known = ("template", *LLM_WRITERS)
    if name not in known and not is_extension(name):
        raise ValueError(
            f"--writer {name!r}: must be one of {', '.join(known)}, or {EXTENSION_FORM}{did_you_mean(name, known)}"
        )


def custom_writer(name: str) -> Writer:
    """Create the writer that `name`, `module:Name`, refers to: a class without arguments, or an instance.

    Raises:
        ValueError: the module or the name does not exist, or the object lacks `name` or `write`.
    """
    found: Any = load_extension(name, "--writer")
    try:
        writer = found() if callable(found) else found
    except TypeError as error:
        raise ValueError(f"--writer {name!r}: must be made without arguments ({error}); give it defaults") from error
    if not isinstance(getattr(writer, "name", None), str) or not callable(getattr(writer, "write", None)):
        where = "see `Writer` in hllm_torchrec.creative.writing.writer"
        raise ValueError(f"--writer {name!r}: must have a name and write(asks); {where}")
    result: Writer = writer
    return result
