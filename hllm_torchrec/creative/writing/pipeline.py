"""`build_by_writer`: builds texts with a language model in three stages: profiles of users, titles, filters.

The answers of the first two stages and of the judge are stored in files (`AnswerFile`), so that a build can be resumed.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hllm_torchrec.common.hashing import hash_texts
from hllm_torchrec.creative.filters import ALIKE, INSTRUCTION, TextRules, check_text, nearly_equal
from hllm_torchrec.creative.writing import prompts
from hllm_torchrec.creative.writing.answers import AnswerFile
from hllm_torchrec.creative.writing.prompts import JUDGE, PROFILE, PROPOSE
from hllm_torchrec.creative.writing.requests import Wanted
from hllm_torchrec.creative.writing.writer import Ask, Writer

if TYPE_CHECKING:
    from hllm_torchrec.creative.writing.text_cosine import TextCosine

_SEEDS = 1_000_003
"""Difference of the seeds of two attempts."""
NO_POINT, UNCONFIRMED, FAR = "no selling point for the user", "not confirmed by the judge", "far from the facts"


@dataclass(frozen=True)
class Parameters:
    """Parameters of answers, which are part of the answers' keys, and the number of attempts.

    max_tokens: maximum number of tokens of an answer; temperature: sampling temperature, 0 for greedy decoding; seed:
    random seed of sampling; attempts: maximum number of answers to sample until one has the JSON object that the prompt
    asks for.
    """

    max_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0
    attempts: int = 3


@dataclass(frozen=True)
class Checks:
    """Filters that use models.

    judge: writer that must confirm each text twice; encoder: sentence encoder that computes the cosine of a text and
    the item's facts, which must be at least `least_cosine`. None: the filter is not used.
    """

    judge: Writer | None = None
    encoder: "TextCosine | None" = None
    least_cosine: float = 0.5


@dataclass
class Draft:
    """State of a text between the stages.

    wanted: the like that gets the text; profile: fields of the user's profile; text: the title; checks: values of
    filters; reasons: names of the filters that the text did not pass.
    """

    wanted: Wanted
    profile: dict[str, str] = field(default_factory=dict)
    text: str = ""
    checks: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Built:
    """Result of a build.

    rows: texts that passed the filters, in the columns of a table of creatives; dropped: the other texts, with a column
    `reasons`; left_out: number of texts for each reason (a text may have several reasons); errors: messages of writers
    about prompts without an answer.
    """

    rows: pa.Table
    dropped: pa.Table
    left_out: dict[str, int]
    errors: list[str] = field(default_factory=list)


class _Stages:
    """Lets a writer answer the prompts of stages, and stores the answers in files in `folder`."""

    def __init__(self, folder: Path, writer: Writer, parameters: Parameters) -> None:
        self.folder, self.writer, self.parameters = folder, writer, parameters
        self.errors: list[str] = []

    def ask(
        self, stage: str, drafts: Sequence[Draft], prompt: Callable[[Draft], str], *, of_item: bool = True
    ) -> Iterator[tuple[Draft, dict[str, str]]]:
        """Yield each draft with the fields of its answer. A draft without a valid answer gets a reason instead.

        of_item: whether the prompt contains the item, so that `hllm forget` of the item removes the answer.
        """
        file, left = AnswerFile(self.folder / f"{stage}.jsonl"), list(drafts)
        for attempt in range(self.parameters.attempts if self.parameters.temperature else 1):
            asks = [self._ask(stage, draft, prompt(draft), attempt, of_item) for draft in left]
            texts, failed = file.ask(asks, self.writer)
            incomplete = []
            for i, (draft, ask, text) in enumerate(zip(left, asks, texts, strict=True)):
                answer = None if text is None else prompts.parse_answer(stage, text)
                if i in failed:
                    self.errors.append(failed[i])
                    draft.reasons.append(f"{stage}: no answer")
                elif answer is None:
                    incomplete.append(draft)
                elif any(mark in str(text) for mark in prompts.marks_in(ask.prompt)):
                    draft.reasons.append(INSTRUCTION)
                else:
                    yield draft, answer
            left = incomplete
        for draft in left:
            draft.reasons.append(f"{stage}: no JSON of its fields")

    def _ask(self, stage: str, draft: Draft, prompt: str, attempt: int, of_item: bool) -> Ask:
        wanted, parameters = draft.wanted, self.parameters
        return Ask(
            stage,
            prompts.SYSTEM[stage],
            prompt,
            wanted.raw_user,
            wanted.raw_item if of_item else None,
            parameters.max_tokens,
            parameters.temperature,
            parameters.seed + attempt * _SEEDS,
        )


def build_by_writer(
    wanted: Sequence[Wanted],
    writer: Writer,
    folder: Path,
    parameters: Parameters,
    rules: TextRules,
    checks: Checks | None = None,
) -> Built:
    """Ask for a profile and a text for each of `wanted`, and filter the texts.

    Args:
        folder: folder of the files of answers; the caller holds its lock.
        checks: filters that use models; None: none.

    Raises:
        Preempted: the writer has reached a limit. A repeated call continues from there.
        ValueError: the writer cannot answer, or a file of answers is damaged.
    """
    drafts = [Draft(one) for one in wanted]
    stages = _Stages(folder, writer, parameters)
    for draft, answer in stages.ask(PROFILE, drafts, lambda d: prompts.profile_prompt(d.wanted.titles), of_item=False):
        draft.profile = answer
    for draft, answer in stages.ask(PROPOSE, [d for d in drafts if d.profile], lambda d: _propose(d, rules)):
        draft.text = answer["title"].strip()
        if not answer["points"].strip():
            draft.reasons.append(NO_POINT)
    _filter([draft for draft in drafts if not draft.reasons], rules)
    if checks is not None and checks.encoder is not None:
        _compare([draft for draft in drafts if not draft.reasons], checks.encoder, checks.least_cosine)
    errors = stages.errors
    if checks is not None and checks.judge is not None:
        questions = _Stages(folder, checks.judge, parameters)
        _judge([draft for draft in drafts if not draft.reasons], questions)
        errors = errors + questions.errors
    return _built(drafts, writer.name, errors)


def _propose(draft: Draft, rules: TextRules) -> str:
    return prompts.propose_prompt(draft.wanted.titles, draft.profile, _item(draft), rules.added_words)


def _item(draft: Draft) -> dict[str, str]:
    return {"title": draft.wanted.title, **draft.wanted.facts}


def _filter(drafts: Sequence[Draft], rules: TextRules) -> None:
    instructions = [prompts.SYSTEM[PROPOSE], prompts.propose_prompt([], {}, {}, rules.added_words)]
    for draft in drafts:
        wanted = draft.wanted
        description = "\n".join(wanted.facts.values())
        found = check_text(draft.text, wanted.title, description, rules, instructions, [wanted.raw_user])
        draft.checks, draft.reasons = found.checks, found.reasons
    kept = sorted((draft for draft in drafts if not draft.reasons), key=lambda draft: draft.wanted.raw_item)
    for _, group in groupby(kept, key=lambda draft: draft.wanted.raw_item):
        of_item = list(group)
        for draft, is_copy in zip(of_item, nearly_equal([d.text for d in of_item], rules.alike), strict=True):
            draft.reasons += [ALIKE] * is_copy


def _compare(drafts: Sequence[Draft], encoder: "TextCosine", least: float) -> None:
    """Give a reason to the drafts whose cosine with the item's facts is below `least`."""
    facts = ["\n".join(_item(draft).values()) for draft in drafts]
    for draft, cosine in zip(drafts, encoder.cosines([d.text for d in drafts], facts) if drafts else [], strict=True):
        draft.checks["cosine"] = cosine
        draft.reasons += [FAR] * (cosine < least)


def _judge(drafts: Sequence[Draft], stages: _Stages) -> None:
    """Give a reason to the drafts that the judge does not confirm twice, once in each order of title and facts."""
    confirmed: Counter[int] = Counter()
    for title_first in (False, True):
        for draft, answer in stages.ask(JUDGE, drafts, partial(_judge_prompt, title_first=title_first)):
            confirmed[id(draft)] += answer["verdict"].strip(" .!").lower() == "yes"
    for draft in drafts:
        if confirmed[id(draft)] < 2:
            draft.reasons = [UNCONFIRMED]


def _judge_prompt(draft: Draft, title_first: bool) -> str:
    return prompts.judge_prompt(draft.text, _item(draft), title_first)


def _built(drafts: Sequence[Draft], origin: str, errors: list[str]) -> Built:
    kept = [draft for draft in drafts if not draft.reasons]
    dropped = [draft for draft in drafts if draft.reasons]
    reasons = pa.array([draft.reasons for draft in dropped], pa.list_(pa.string()))
    counts = Counter(reason for draft in dropped for reason in draft.reasons)
    table = _table(dropped, origin).append_column("reasons", reasons)
    return Built(_table(kept, origin), table, dict(sorted(counts.items())), errors)


def _table(drafts: Sequence[Draft], origin: str) -> pa.Table:
    columns: dict[str, Any] = {
        "raw_user_id": pa.array([d.wanted.raw_user for d in drafts], pa.string()),
        "raw_item_id": pa.array([d.wanted.raw_item for d in drafts], pa.string()),
        "timestamp": pa.array([d.wanted.second for d in drafts], pa.int64()),
        "response": pa.array([d.text for d in drafts], pa.string()),
        "profile": pa.array([json.dumps(d.profile, ensure_ascii=False) for d in drafts], pa.string()),
        "origin": pa.array([origin] * len(drafts), pa.string()),
        "checks": pa.array([list(d.checks.items()) for d in drafts], pa.map_(pa.string(), pa.float32())),
    }
    return pa.table(columns)


def prompts_hash() -> str:
    """Hash of the prompts of this version, for a table's manifest."""
    empty = [prompts.profile_prompt([]), prompts.propose_prompt([], {}, {}, 0), prompts.judge_prompt("", {}, True)]
    return hash_texts([*prompts.SYSTEM.values(), *empty])
