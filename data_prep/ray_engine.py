"""`--engine ray`: the same work on Ray Data, on one machine or on the cluster that RAY_ADDRESS names.

Ray spreads the calls; what is written, and in which order, stays with the stage, so the result is the local engine's.
An exception inside a map would end the whole job, or lose its block of rows, so it travels back as a value.
"""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from megatron_video.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Of a block, when its process or node dies; Ray Data's own is to try for ever.
_RETRIES = 3
# Items a block at most: what a lost node makes Ray do again.
_BLOCK_ITEMS = 64


class _Task:
    """Maps numbers of items to pickled outcomes: (True, result) or (False, exception)."""

    def __init__(self, function: Callable[[Any], Any], items: Any) -> None:
        self._function = function
        self._items = items

    def block(self, rows: dict[str, np.ndarray], start: int) -> dict[str, np.ndarray]:
        """A block of Ray Data; its row n is item `start` + n."""
        outcomes = self.outcomes([start + int(number) for number in rows["id"]])
        return {"outcome": np.array(outcomes, dtype=object)}

    def outcomes(self, numbers: Sequence[int]) -> list[bytes]:
        """What became of these items."""
        import ray

        items = ray.get(self._items)
        return [pickle.dumps(self._outcome(items[number])) for number in numbers]

    def _outcome(self, item: Any) -> tuple[bool, Any]:
        try:
            return True, self._function(item)
        except Exception as error:
            return False, error


def ray_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    lost: Callable[[Item], Result] | None = None,
) -> Iterator[Result]:
    """Yield `function(item)` in order, computed by at most `workers` Ray tasks at a time.

    Where the processes of a block keep dying, the items ahead are done one by one, and one that kills its process again
    gives `lost(item)`.

    Raises:
        UserError: Ray is not installed, cannot be reached, or loses its processes and there is no `lost`.
    """
    if not len(items):
        return
    ray = _started_ray(workers)
    # In the object store once, not in every task's closure.
    task = _Task(function, ray.put(items))
    done = 0
    while done < len(items):
        try:
            for pickled in _outcomes(ray, task, range(done, len(items)), workers):
                yield _result(pickled)
                done += 1
        except ray.exceptions.RayError as error:
            # A task's own exceptions are values: this is a node lost too often, or a process that died.
            if lost is None:
                raise _broken(error) from None
            for number in range(done, min(done + _BLOCK_ITEMS, len(items))):
                yield _alone(ray, task, number, items[number], lost)
                done += 1


def _outcomes(ray: Any, task: _Task, numbers: range, workers: int) -> Iterator[bytes]:
    blocks = max(min(len(numbers), 4 * workers), -(-len(numbers) // _BLOCK_ITEMS))
    rows = ray.data.range(len(numbers), override_num_blocks=blocks)
    with warnings.catch_warnings():
        # `max_retries` goes with Ray 2.64, and has no successor yet; setup.py asks for an older one.
        warnings.filterwarnings("ignore", message=".*ray_remote_args")
        done = rows.map_batches(
            task.block,
            batch_size=None,
            batch_format="numpy",
            compute=ray.data.TaskPoolStrategy(min(workers, blocks)),
            fn_args=[numbers.start],
            max_retries=_RETRIES,
        )
    for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch["outcome"].to_pylist()


def _alone(ray: Any, task: _Task, number: int, item: Item, lost: Callable[[Item], Result]) -> Result:
    try:
        (pickled,) = ray.get(ray.remote(max_retries=1)(_Task.outcomes).remote(task, [number]))
        return _result(pickled)
    except ray.exceptions.WorkerCrashedError:
        return lost(item)
    except ray.exceptions.RayError as error:
        raise _broken(error) from None


def _result(pickled: bytes) -> Any:
    good, value = pickle.loads(pickled)
    if not good:
        raise value
    return value


def _broken(error: Exception) -> UserError:
    return UserError(f"--engine ray: {str(error).rstrip('.')}; the same command goes on where it was")


def _started_ray(workers: int) -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError('--engine ray needs Ray: pip install "megatron-video[data]"') from None
    if not ray.is_initialized():
        cluster = os.environ.get("RAY_ADDRESS")
        try:
            # Of a cluster all CPUs may be used; here as many as asked for.
            ray.init(
                cluster,
                num_cpus=None if cluster else workers,
                include_dashboard=None if cluster else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except ConnectionError as error:
            raise UserError(f"--engine ray: no Ray cluster at RAY_ADDRESS={cluster}: {error}") from None
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    # The stage has a progress line of its own.
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray
