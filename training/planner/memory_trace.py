"""Bytes that tensors hold while a program runs: what torch's allocator gave out, by section, with the peak of each."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "memory section: "


@dataclass(frozen=True)
class Section:
    """Part of a program between two marks; bytes beside what was there before the trace began."""

    name: str
    """As it was marked."""
    start: int
    """Held when it began."""
    peak: int
    """Most held at one moment."""


class MemoryTrace(Protocol):
    """Traces the thread that enters it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def mark(self, name: str) -> None:
        """A section begins, and the one before it ends."""

    @property
    def sections(self) -> list[Section]:
        """In order, once the trace has ended."""


def trace_memory(device: torch.device) -> MemoryTrace:
    """A trace of tensors on `device`."""
    return CudaTrace() if device.type == "cuda" else HostTrace()


class HostTrace:
    """On the CPU: every allocation that torch's profiler reports, also of autograd and inside of kernels.

    Other threads count too, such as gloo's, which give up messages: by their effect at this thread's next allocation.
    """

    def __init__(self) -> None:
        _count_all_threads()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        self._sections: list[Section] = []

    def __enter__(self) -> Self:
        """Begin."""
        self._profile.__enter__()
        self.mark("start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, and add up."""
        self._profile.__exit__(kind, error, trace)
        if error is None:
            recorded = self._profile.profiler
            assert recorded is not None
            assert recorded.kineto_results is not None
            tree = recorded.kineto_results.experimental_event_tree()
            self._sections = list(_sections(_changes(tree)))

    @staticmethod
    def mark(name: str) -> None:
        """A section begins, and the one before it ends."""
        with record_function(_MARK + name):
            # An allocation, so that the section starts with what is held now.
            torch.empty(1)

    @property
    def sections(self) -> list[Section]:
        """In order, once the trace has ended."""
        return self._sections


class CudaTrace:
    """On the current CUDA device, by the statistics of torch's caching allocator."""

    def __init__(self) -> None:
        self._sections: list[Section] = []
        self._open: tuple[str, int] | None = None
        self._before = 0

    def __enter__(self) -> Self:
        """Begin."""
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._close()

    def mark(self, name: str) -> None:
        """A section begins, and the one before it ends."""
        self._close()
        torch.cuda.reset_peak_memory_stats()
        self._open = name, torch.cuda.memory_allocated() - self._before

    @property
    def sections(self) -> list[Section]:
        """In order, once the trace has ended."""
        return self._sections

    def _close(self) -> None:
        if self._open is not None:
            self._sections.append(Section(*self._open, torch.cuda.max_memory_allocated() - self._before))
        self._open = None


_Change = str | tuple[int, int]
"""A mark, or bytes held (before, after) an allocation or its end."""


def _count_all_threads() -> None:
    """Let torch's CPU allocator keep count in threads that the profiler does not follow.

    It stays on: an address that is given back while nobody counts would be taken for held.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True


def _changes(tree: Iterable[Any]) -> list[_Change]:
    """All of a profile, in order of time."""
    found: list[tuple[int, int, _Change]] = []
    for event in _events(tree):
        if event.tag == _EventType.Allocation:
            after = event.extra_fields.total_allocated
            change: _Change = (after - event.extra_fields.alloc_size, after)
        elif event.name.startswith(_MARK):
            change = event.name.removeprefix(_MARK)
        else:
            continue
        found.append((event.start_time_ns, len(found), change))
    return [change for _, _, change in sorted(found, key=lambda item: item[:2])]


def _events(tree: Iterable[Any]) -> Iterator[Any]:
    for event in tree:
        yield event
        yield from _events(event.children)


def _sections(changes: Iterable[_Change]) -> Iterator[Section]:
    name: str | None = None
    start = peak = 0
    first: int | None = None
    for change in changes:
        if isinstance(change, str):
            if first is not None and name is not None:
                yield Section(name, start - first, peak - first)
            name, start = change, -1
            continue
        before, after = change
        first = before if first is None else first
        if start < 0:
            start = peak = before
        peak = max(peak, before, after)
    if first is not None and name is not None:
        yield Section(name, start - first, peak - first)
