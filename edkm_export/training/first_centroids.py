"""Where the centroids of many weights start: exact k-means, shared out over processes and threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from edkm_export.activity import activity
from edkm_export.errors import InputError
from edkm_export.palette import all_finite
from edkm_export.recipe import Rule
from edkm_export.training.distributed.processes import ALONE, Processes
from edkm_export.training.palettized.surgery import Importance, seed_centroids

__all__ = ["Seeding"]

_T = TypeVar("_T")
Found = dict[tuple[str, int], tuple[Tensor, Tensor]]
"""{(module name, bits): centroids float64 [groups, k] and squared error float64 [groups]}, on the CPU."""


class Seeding:
    """Clusters weights, each in one of the processes; all get the results.

    k-means is exact, and each weight is clustered by itself: results do not depend on who does it. Within a process,
    several weights are clustered at once, a thread each, since a weight with a single LUT is work for one thread.
    """

    def __init__(
        self, read: Callable[[str], Tensor], processes: Processes = ALONE, *, source: str = "model"
    ) -> None:
        """Nothing is read yet.

        Args:
            read: gives the weight of a module, float [out, in, ...]; called in threads, and for each weight in one
                process only.
            processes: that share the work.
            source: name of the model, for messages.
        """
        self._read, self._processes, self._source = read, processes, source

    def read(self, name: str) -> Tensor:
        """The weight of a module.

        Raises:
            InputError: it is not finite.
        """
        weight = self._read(name)
        if not all_finite(weight):
            raise InputError(f"{self._source}: {name}.weight holds NaN or infinity; the model is broken.")
        return weight

    def find(self, jobs: Sequence[tuple[str, Rule]], importance: Mapping[str, Importance]) -> Found:
        """Cluster weights; a collective.

        Args:
            jobs: module names and rules.
            importance: {module name: importance of its weights}; those without count all weights alike.

        Raises:
            InputError: a weight is not finite.
        """

        def seed(name: str, rule: Rule, threads: int) -> tuple[Tensor, Tensor]:
            return seed_centroids(self.read(name), rule, importance.get(name), threads=threads)

        return self.share_out(jobs, seed)

    def share_out(
        self, jobs: Sequence[tuple[str, Rule]], task: Callable[[str, Rule, int], _T]
    ) -> dict[tuple[str, int], _T]:
        """Call a function for each job, in one of the processes; all get what it returns. A collective.

        Args:
            jobs: module names and rules.
            task: takes a module name, a rule and the number of threads that it may use; called in threads.
        """
        count, rank = self._processes.count, self._processes.rank
        own = list(jobs[rank::count])  # like layers lie at equal distances, which spreads them evenly
        threads = self._threads()
        workers = max(1, min(threads, len(own)))
        found: dict[tuple[str, int], _T] = {}
        with activity("clustering", len(own), "weights") as shown:

            def one(job: tuple[str, Rule]) -> _T:
                return task(*job, max(1, threads // workers))

            pool = ThreadPoolExecutor(workers)
            try:
                results: Iterable[_T] = map(one, own) if workers == 1 else pool.map(one, own)
                for (name, rule), result in zip(own, results, strict=True):
                    found[name, rule.bits] = result
                    shown.advance()
            finally:
                pool.shutdown(cancel_futures=True)
        everywhere: dict[tuple[str, int], _T] = {}
        for part in self._processes.exchange(found):
            everywhere |= part
        return {(name, rule.bits): everywhere[name, rule.bits] for name, rule in jobs}

    def _threads(self) -> int:
        """As many as torch uses; of several processes each takes its part of the processors.

        torchrun tells each of its processes to use one thread unless the user says how many, which would leave most
        processors idle here.
        """
        if not self._processes.are_many:
            return torch.get_num_threads()
        here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", str(self._processes.count))))
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(torch.get_num_threads(), processors // here)
