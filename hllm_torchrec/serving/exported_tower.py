"""Export of the user encoder and head of a late-fusion run as one torch.export program that needs only torch to run.

    export_tower(scorer, Path("tower.pt2"))
    tower = torch.export.load("tower.pt2").module()      # in any process with torch
    logits = tower(users, items, actions, timestamps, lengths, times, candidates, numeric)     # [B, M]

Inputs are dense ids of the dataset (0: unknown), padded on the right; the number of users, events and candidates is
dynamic. The terms that depend only on an item, or only on a user, are tables within the program.

Legend: B users, T padded events, S positions (events and the query of every user), M candidates, F numeric features,
D width.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from hllm_torchrec.modules.attention.padded import PaddedPlan
from hllm_torchrec.modules.encoders.softmax import SoftmaxEncoder
from hllm_torchrec.modules.features.hybrid import ACTION_GATE
from hllm_torchrec.modules.features.timestamps import END_OF_TABLES, TimestampMLP, calendar_fields
from hllm_torchrec.modules.heads import PredictionHead
from hllm_torchrec.serving.batch_scorer import BatchScorer, Request
from hllm_torchrec.serving.user_state import UserHistory

FACTS = "hllm.json"
"""File within the archive: names of the inputs, and the numbers of ids and limits that they must respect."""
INPUTS = ("users", "items", "actions", "timestamps", "lengths", "times", "candidates", "numeric")


class ExportedTower(nn.Module):
    """Logits of candidates from the events of users, equal to those of `BatchScorer` up to rounding.

    Raises:
        ValueError: the model has early fusion, or a part that the program does not support.
    """

    encoder: SoftmaxEncoder
    head: PredictionHead
    merge_time: TimestampMLP | None
    numeric: nn.Linear | None
    user_token: Tensor

    def __init__(self, scorer: BatchScorer) -> None:
        super().__init__()
        check_exportable(scorer)
        hllm, spec, inputs = scorer.hllm, scorer.experiment.batch_spec, scorer.inputs
        assert isinstance(hllm.user, SoftmaxEncoder) and isinstance(hllm.head, PredictionHead)
        self.encoder, self.head = hllm.user, hllm.head
        self.merge_time, self.numeric = hllm.features.merge_time, hllm.features.numeric
        self.time_names = list(hllm.features.time_features)
        self.longest = scorer.experiment.config.data.max_history + 1
        self.by_second, self.delay = spec.visibility == "second", spec.feedback_delay
        self.width, self.gated, self.reads_actions = hllm.user.width, ACTION_GATE in inputs.tables, spec.action
        tables = {"items": inputs.items}
        self.reads_users = bool(spec.user_features)
        if self.reads_users:
            tables["users"] = inputs.user_features(np.arange(scorer.experiment.dataset.num_users))
        tables |= {name: inputs.tables[name].float() for name in self.time_names}
        tables |= {"action": inputs.tables["action"].float()} if spec.action else {}
        tables |= {"gate": inputs.tables[ACTION_GATE].float()} if self.gated else {}
        for name, table in tables.items():
            self.register_buffer(f"table_{name}", table.detach().clone())
        self.register_buffer("user_token", hllm.user_token.detach().clone())

    def forward(
        self,
        users: Tensor,
        items: Tensor,
        actions: Tensor,
        timestamps: Tensor,
        lengths: Tensor,
        times: Tensor,
        candidates: Tensor,
        numeric: Tensor,
    ) -> Tensor:
        """Logits [B, M].

        users, lengths, times: [B]; items, actions, timestamps: [B, T], oldest first, the first `lengths` of them real;
        candidates: [B, M]; all int64, times in seconds UTC. numeric: [B, F] float32.
        """
        self._check(timestamps, lengths, times)
        x_BTD = self._rows("items", items)
        if self.gated:
            x_BTD = x_BTD * (1 + self._rows("gate", actions))
        x_BTD = x_BTD + self._time(timestamps)
        query_BD = self.user_token.expand(users.shape[0], -1) + self._time(times)
        if self.reads_users:
            query_BD = query_BD + self._rows("users", users)
        if self.reads_actions:
            x_BTD = x_BTD + self._rows("action", actions)
            query_BD = query_BD + self._rows("action", torch.zeros_like(users))
        if self.numeric is not None:
            query_BD = query_BD + self.numeric(numeric)
        plan = PaddedPlan(lengths, items.shape[1], self.longest)
        x_SD = torch.cat([x_BTD, query_BD[:, None]], dim=1).flatten(0, 1)
        if self.encoder.positions is not None:
            x_SD = x_SD + self.encoder.positions(plan.position_ids[0])
        user_BD = self.encoder.run_layers(x_SD, plan).unflatten(0, (-1, plan.sequence))[:, -1]
        target_BMD = self._rows("items", candidates)
        user_BMD = user_BD[:, None].expand_as(target_BMD)
        logits: Tensor = self.head(user_BMD, target_BMD)
        return logits

    def _check(self, timestamps: Tensor, lengths: Tensor, times: Tensor) -> None:
        """Assert, also in the exported program, the rules that shapes and tables do not check.

        A broken rule would change the logits silently.
        """
        padded, longest = timestamps.shape[1], self.longest - 1
        is_length = (lengths >= 0) & (lengths <= padded) & (lengths <= longest)
        torch._assert_async(is_length.all(), f"lengths: each must be 0..{longest}, and at most the events' columns")
        times_B1 = times[:, None]
        is_time = (times >= 0) & (times < END_OF_TABLES)
        torch._assert_async(is_time.all(), "times: must be seconds UTC, 1970 to 2099")
        is_padding = torch.arange(padded, device=lengths.device) >= lengths[:, None]
        if self.by_second:
            is_seen = (timestamps >= 0) & (timestamps < times_B1 - self.delay)
            said = "timestamps: an event must be before the time of its request minus data.feedback_delay"
            torch._assert_async((is_seen | is_padding).all(), said)
        in_order = (timestamps == timestamps.cummax(dim=1).values) | is_padding
        torch._assert_async(in_order.all(), "timestamps: the oldest event must be the first one")

    def _rows(self, table: str, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.get_buffer(f"table_{table}"))

    def _time(self, seconds: Tensor) -> Tensor:
        if self.merge_time is None:
            return self.user_token.new_zeros(self.width)
        parts = calendar_fields(seconds.clamp(0, END_OF_TABLES - 1), len(self.time_names))
        rows = [self._rows(name, parts[..., column]) for column, name in enumerate(self.time_names)]
        merged: Tensor = self.merge_time(torch.cat(rows, dim=-1))
        return merged


def check_exportable(scorer: BatchScorer) -> None:
    """Raise ValueError for a model with parts that the exported program does not support."""
    spec, hllm, config = scorer.experiment.batch_spec, scorer.hllm, scorer.experiment.config
    if not hllm.fusion.query_is_user:
        raise ValueError(
            f"objective.fusion: {config.objective.fusion!r}: only with late fusion is a user's vector the same for all "
            "candidates: serve the run with `hllm serve`"
        )
    missing = {
        f"encoder {config.user.encoder}": not isinstance(hllm.user, SoftmaxEncoder),
        "interleaved actions": spec.interleaved,
        "a history of positive events alone": spec.history == "positive",
        "context": bool(spec.context),
        "evidence": scorer.experiment.evidence is not None,
        "a table of kind hash": bool(hllm.features.hash_tables),
        "several tasks, or their head": not isinstance(hllm.head, PredictionHead) or not hllm.has_one_logit,
        "a position bias": hllm.position_bias is not None,
    }
    for what, present in missing.items():
        if present:
            raise ValueError(f"{what}: an exported tower does not support this: serve the run with `hllm serve`")


def tower_inputs(scorer: BatchScorer, requests: Sequence[Request]) -> tuple[Tensor, ...]:
    """Inputs of the program for requests that all have the same number of candidates."""
    events, numbers = zip(*(scorer.window(request) for request in requests), strict=True)
    lengths = [len(one) for one in events]
    padded = np.zeros((3, len(events), max(lengths)), np.int64)
    for row, one in enumerate(events):
        padded[:, row, : len(one)] = one.item_ids, one.actions, one.timestamps
    numeric = [np.zeros((1, 0)) if one is None else one for one in numbers]
    users, times = [one.state.history.user_id for one in requests], [one.time for one in requests]
    given = (users, *padded, lengths, times, np.stack([one.items for one in requests]))
    return (
        *(torch.from_numpy(np.asarray(one, np.int64)) for one in given),
        torch.from_numpy(np.concatenate(numeric).astype(np.float32)),
    )


def export_tower(scorer: BatchScorer, path: Path, compiled: Path | None = None) -> float:
    """Write the program to `path`, and an AOTInductor package for this machine's kind of processor to `compiled`.

    Returns:
        The largest absolute difference between the logits of the written program and of the scorer, for synthetic
        requests; the compiled program is compared if there is one.

    Raises:
        ValueError: as `ExportedTower` and `check_outputs`.
    """
    check_outputs(path, compiled)
    tower, requests = ExportedTower(scorer).eval(), invented_requests(scorer)
    given = tower_inputs(scorer, requests)
    users, events, candidates = (torch.export.Dim(name, min=1, max=1 << 20) for name in ("users", "events", "items"))
    shapes: dict[str, Any] = {name: {0: users} for name in INPUTS}
    shapes |= {name: {0: users, 1: events} for name in ("items", "actions", "timestamps")}
    shapes["candidates"] = {0: users, 1: candidates}
    with torch.no_grad():
        program = torch.export.export(tower, given, dynamic_shapes=shapes)
        written = {FACTS: json.dumps(_facts(scorer), indent=1)}
        _replace(path, lambda file: torch.export.save(program, file, extra_files=written))
        if compiled is not None:
            _replace(compiled, lambda file: _compile(program, file))
            found = torch._inductor.aoti_load_package(str(compiled))(*given)
        else:
            found = torch.export.load(path).module()(*given)
    wanted = torch.from_numpy(np.stack(scorer.score_batch(requests)))
    return float((found - wanted).abs().max())


def check_outputs(*files: Path | None) -> None:
    """Create the folders of the files; raise ValueError for a file that exists or does not end in .pt2."""
    for file in filter(None, files):
        if file.exists() or file.suffix != ".pt2":
            raise ValueError(f"{file}: must be the name of a new file that ends in .pt2")
        file.parent.mkdir(parents=True, exist_ok=True)


def check_compiler() -> None:
    """Raise ValueError if AOTInductor finds no C++ compiler."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError("--compiled: there is no C++ compiler: install g++, or leave --compiled out") from None


def invented_requests(scorer: BatchScorer, candidates: int = 7) -> list[Request]:
    """Random requests of four users whose histories have 0, 1, 2 and the largest possible number of events."""
    dataset, longest = scorer.experiment.dataset, scorer.experiment.config.data.max_history
    random, requests = np.random.default_rng(0), []
    for length in (0, 1, 2, max(2, longest - 1)):
        times = 1_600_000_000 + np.sort(random.integers(0, 10**6, length))
        columns = (random.integers(0, dataset.num_items, length), times, random.integers(0, 2, length))
        actions = random.integers(0, dataset.num_actions, length)
        history = UserHistory(int(random.integers(0, dataset.num_users)), *columns, actions)
        asked = 1_600_000_000 + 10**6 + 1 + scorer.experiment.batch_spec.feedback_delay
        items = random.integers(0, dataset.num_items, candidates)
        requests.append(Request(scorer.read(history), items, asked))
    return requests


def _facts(scorer: BatchScorer) -> dict[str, Any]:
    experiment = scorer.experiment
    return {
        "model": scorer.mark,
        "inputs": INPUTS,
        "items": experiment.dataset.num_items,
        "users": experiment.dataset.num_users,
        "actions": experiment.dataset.manifest["actions"]["names"],
        "numeric": experiment.batch_spec.numeric_features,
        "max_history": experiment.config.data.max_history,
        "feedback_delay": experiment.batch_spec.feedback_delay,
    }


def _compile(program: torch.export.ExportedProgram, file: Path) -> None:
    # Otherwise AOTInductor's check of inputs (AOTI_RUNTIME_CHECK_INPUTS) refuses a single user, event or candidate.
    configs = {"aot_inductor.check_lowerbound": False}
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=configs)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write to a temporary name and rename, so that a reader finds either the complete file or no file."""
    scratch = path.with_name(f"unfinished-{path.name}")
    try:
        write(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
