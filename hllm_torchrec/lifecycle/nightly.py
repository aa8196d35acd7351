"""`run_night`: runs the steps of a night in order, except those that are already done."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from hllm_torchrec.distributed.coordination import run_on_rank_zero
from hllm_torchrec.lifecycle.night_config import NightConfig, check_night
from hllm_torchrec.lifecycle.night_state import STEPS, NightState, hold_nights, unfinished_nights
from hllm_torchrec.lifecycle.steps import RUN_STEP, Night


def run_night(
    config: NightConfig,
    night: str | None,
    device: torch.device,
    steps: Sequence[str] = STEPS,
    report: Callable[[str], None] = print,
) -> NightState:
    """Run the steps of a night that are not done, and return its state. Collective.

    If the gate has rejected the night's model, the step `gate` is run again.

    Args:
        night: name of the night; None: the oldest night that was begun and is not finished, else today's date (UTC).
        steps: steps to run; a step whose predecessors are not done raises an error.

    Raises:
        ValueError: a step fails, or another process runs a night; completed steps stay recorded.
    """
    folder = Path(config.folder)
    with ExitStack() as stack:
        run_on_rank_zero(partial(_enter_lock, stack, folder))
        name = run_on_rank_zero(lambda: check_night(night or _next_night(folder)))
        is_idle = True
        for step in STEPS:
            state = run_on_rank_zero(lambda: NightState.read(folder, name))
            is_judged_again = step == "gate" and state.is_rejected  # the gate's settings may have changed
            if step not in steps or (step in state.done and not is_judged_again):
                continue
            # A single step that was requested raises an error itself.
            if state.is_rejected and not is_judged_again and len(steps) > 1:
                break
            facts = RUN_STEP[step](Night(config, state, device))
            run_on_rank_zero(partial(state.with_step, step, facts))
            report(f"{name}: {step}: {describe(facts)}")
            is_idle = False
        state = run_on_rank_zero(lambda: NightState.read(folder, name))
        if is_idle:
            report(f"{name}: no step was run; done before: {', '.join(state.done)}")
        return state


def _enter_lock(stack: ExitStack, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(hold_nights(folder))


def _next_night(folder: Path) -> str:
    begun = unfinished_nights(folder)
    return begun[0] if begun else datetime.now(UTC).date().isoformat()


def describe(facts: dict[str, object]) -> str:
    """The facts of a step as one line of text."""
    return str(facts["text"]) if "text" in facts else ", ".join(f"{name} {value}" for name, value in facts.items())
