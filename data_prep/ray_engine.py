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

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import ray

        items = ray.get(self._items)
        outcomes = [pickle.dumps(self._outcome(items[int(number)])) for number in batch["id"]]
        return {"outcome": np.array(outcomes, dtype=object)}

    def _outcome(self, item: Any) -> tuple[bool, Any]:
        try:
            return True, self._function(item)
        except Exception as error:
            return False, error


def ray_map(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield `function(item)` in order, computed by at most `workers` Ray tasks at a time.

    Raises:
        UserError: Ray is not installed or cannot be reached.
    """
    if not len(items):
        return
    ray = _started_ray(workers)
    # In the object store once, not in every task's closure.
    task = _Task(function, ray.put(items))
    blocks = max(min(len(items), 4 * workers), -(-len(items) // _BLOCK_ITEMS))
    numbers = ray.data.range(len(items), override_num_blocks=blocks)
    with warnings.catch_warnings():
        # `max_retries` goes with Ray 2.64, and has no successor yet; setup.py asks for an older one.
        warnings.filterwarnings("ignore", message=".*ray_remote_args")
        outcomes = numbers.map_batches(
            task.__call__,
            batch_size=None,
            batch_format="numpy",
            compute=ray.data.TaskPoolStrategy(workers),
            max_retries=_RETRIES,
        )
    for pickled in _rows(ray, outcomes):
        good, value = pickle.loads(pickled)
        if not good:
            raise value
        yield value


def _rows(ray: Any, outcomes: Any) -> Iterator[bytes]:
    try:
        for batch in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from batch["outcome"].to_pylist()
    except ray.exceptions.RayError as error:
        # A task's own exceptions are values: this is a node lost too often, or a worker short of memory.
        raise UserError(f"--engine ray: {str(error).rstrip('.')}; the same command goes on where it was") from None


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
