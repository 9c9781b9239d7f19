"""Going back to a checkpoint from before a spike, in the running job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from training import checkpoint
from training.checkpoint_folders import discard_newer
from training.checkpoint_state import publish_pending_parameters
from training.diverged import DivergedError
from training.skipped_data import merged
from training.spikes import Rollback, Spike, plan_rollback, recent_rollbacks

if TYPE_CHECKING:
    from training.trainer import Trainer


def tell_spike(trainer: Trainer, spike: Spike) -> None:
    """Note one step above the usual range."""
    state, needed = trainer.state, trainer.config.faults.spike_steps
    trainer.telemetry.say(
        f"step {state.step} SPIKE: {spike.measure} {spike.value:.4g} is above {spike.limit:.4g} "
        f"({state.spikes_in_a_row} in a row, {needed} make the run go back)"
    )
    if trainer.telemetry.active:
        trainer.events.record("spike", state.step, **vars(spike), in_a_row=state.spikes_in_a_row)


def roll_back_if_needed(trainer: Trainer) -> bool:
    """Go back if the last steps call for it; all ranks decide alike.

    Returns:
        Whether the run stands at another step now.

    Raises:
        DivergedError: it went back too often.
    """
    state, config = trainer.state, trainer.config.faults
    wanted = plan_rollback(state, config)
    if wanted is None:
        return False
    if recent_rollbacks(state, config) >= config.spike_max_rollbacks:
        raise DivergedError(
            f"the {config.spike_measure} rose out of its range at step {state.step} again, after "
            f"faults.spike_max_rollbacks={config.spike_max_rollbacks} rollbacks in the last "
            f"{config.spike_max_rollbacks_in} steps. Lower optimizer.learning_rate, look at the data of the steps in "
            "events.jsonl, or start from an older checkpoint"
        )
    trainer.phases.enter("checkpoint", state.step)
    # What is being written is newer than the spike; it must not be published behind our back.
    trainer.saver.drain()
    folder = Path(trainer.config.run.output_dir) / "checkpoints"
    found = checkpoint.agree_on_newest(folder, trainer.config.checkpoint, up_to_step=wanted.to_step)
    if found is None:
        _stay(trainer, wanted)
        return False
    _go_back(trainer, found, wanted)
    return True


def _go_back(trainer: Trainer, found: Path, wanted: Rollback) -> None:
    state = trainer.state
    from_step, skipped, rollbacks = state.step, state.skipped_data, state.rollbacks
    # With overlapped gathers the last update is still on its way; it must not arrive on top of the older weights.
    publish_pending_parameters(trainer.model)
    loaded = checkpoint.load_checkpoint(found, trainer.model, trainer.optimizer, trainer.ema)
    # In place: others hold the state too.
    vars(state).update(vars(loaded))
    state.skipped_data = [list(window) for window in merged([*skipped, wanted.skipped])]
    state.rollbacks = [*rollbacks, from_step]
    if dist.get_rank() == 0:
        # A life that starts now must not find them. It would find the older one, and go through the spike and back
        # again, as nothing depends on chance.
        discard_newer(found.parent, state.step)
    dist.barrier()
    first, end = wanted.skipped
    trainer.telemetry.say(
        f"ROLLBACK from step {from_step} to {found}: data steps {first} to {end - 1} are left out from now on "
        f"(rollback {len(state.rollbacks)} of the run)"
    )
    if trainer.telemetry.active:
        trainer.events.record(
            "rollback",
            state.step,
            checkpoint=found,
            from_step=from_step,
            skipped=wanted.skipped,
            rollbacks=len(state.rollbacks),
        )


def _stay(trainer: Trainer, wanted: Rollback) -> None:
    trainer.state.spikes_in_a_row = 0
    reason = f"no checkpoint of step {wanted.to_step} or before"
    trainer.telemetry.say(f"step {trainer.state.step}: no rollback, there is {reason}; training goes on")
    if trainer.telemetry.active:
        trainer.events.record("rollback_impossible", trainer.state.step, reason=reason)
