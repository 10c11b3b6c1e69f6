"""What happens around the steps: time, refits, the log, evaluation, and a watch on the loss."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from edkm_export.activity import Activity
from edkm_export.training.distributed.processes import ALONE, Processes
from edkm_export.training.palettized.batch import ClusterBatch
from edkm_export.training.palettized.clusters import Clusters
from edkm_export.training.progress import Progress

__all__ = [
    "Clock",
    "Evaluate",
    "Finite",
    "FirstStep",
    "Log",
    "Refit",
    "Refresh",
    "Show",
    "dead_centroids",
    "moved_share",
    "tensorboard",
]


def moved_share(clusters: list[Clusters], processes: Processes = ALONE) -> float:
    """Share of the indices that changed since the last call."""
    moved = processes.number(sum(int(each.moved) for each in clusters))
    for each in clusters:
        each.moved.zero_()
    return moved / max(1, sum(each.weight.numel() for each in clusters))


def dead_centroids(clusters: list[Clusters]) -> int:
    """LUT entries that no weight uses."""
    return sum(int((each.use_counts() == 0).sum()) for each in clusters)


class Clock(TrainerCallback):  # type: ignore[misc]
    """Counts steps and seconds, and ends the run when its time is up. What `Progress.paused` surrounds does not count.

    All processes go by the slowest: their rates and their last step have to be the same.
    """

    def __init__(
        self, progress: Progress, advance: Callable[[float], None] | None, processes: Processes = ALONE
    ) -> None:
        self.progress, self._advance, self._shown = progress, advance, progress.share
        self._processes = processes

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        taken = self.progress.lap()
        if self.progress.seconds is not None:
            taken = self._processes.number(taken, largest=True)
        self.progress.elapsed += taken
        self.progress.step = state.global_step
        share = self.progress.share
        if self._advance is not None:
            self._advance(share - self._shown)
            self._shown = share
        if share >= 1:
            control.should_training_stop = True
            # transformers does so at the last step only; the state that model.pt is made from is always kept.
            control.should_save = args.save_strategy == SaveStrategy.STEPS

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        with self.progress.paused():
            self.progress.elapsed += self.progress.lap()


class FirstStep(TrainerCallback):  # type: ignore[misc]
    """Does something once a step has been made."""

    def __init__(self, task: Callable[[], None]) -> None:
        self._task: Callable[[], None] | None = task

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self._task is not None:
            self._task()
            self._task = None


def tensorboard() -> list[TrainerCallback]:
    """Curves for TensorBoard, where it is installed.

    Its files are opened at the first log and not before: until its first step a run lies where it will not stay.
    """
    if find_spec("tensorboard") is None:
        return []
    from transformers.integrations import TensorBoardCallback

    class FromTheFirstLog(TensorBoardCallback):  # type: ignore[misc]
        begun = False

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            pass

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.begun:
                self.begun = True
                super().on_train_begin(args, state, control, **kwargs)
            super().on_log(args, state, control, **kwargs)

    return [FromTheFirstLog()]


class Refresh(TrainerCallback):  # type: ignore[misc]
    """Clusters once an optimizer step; whatever runs until the next one sees the same indices."""

    def __init__(self, clusters: ClusterBatch) -> None:
        self.clusters = clusters

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.clusters.refresh()


class Refit(TrainerCallback):  # type: ignore[misc]
    """Moves centroids to the mean of their weights every so many steps."""

    def __init__(self, clusters: list[Clusters], every: int) -> None:
        self.clusters, self.every = clusters, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self.every and state.global_step % self.every == 0:
            for each in self.clusters:
                if each.lut.requires_grad:
                    each.refit()


class Log(TrainerCallback):  # type: ignore[misc]
    """Logs loss, KL, rates, moved indices and dead centroids; `log` is called with each record."""

    def __init__(
        self,
        log: Callable[[dict[str, Any]], None],
        clusters: list[Clusters],
        progress: Progress,
        *,
        distilling: bool,
        step_tokens: int,
        processes: Processes = ALONE,
    ) -> None:
        self._log, self.clusters, self.progress, self.processes = log, clusters, progress, processes
        self.distilling, self.step_tokens = distilling, step_tokens

    def on_log(  # noqa: D102
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        record: dict[str, Any] = {
            "step": state.global_step,
            "tokens": state.global_step * self.step_tokens,
            "seconds": round(self.progress.elapsed, 3),
            "loss": logs["loss"],
            "rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "moved": moved_share(self.clusters, self.processes),
            "dead": dead_centroids(self.clusters),
        }
        if self.distilling:
            record["kl"] = logs["loss"]
        self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Log a step."""
        self._log(record)


class Show(TrainerCallback):  # type: ignore[misc]
    """Shows steps, loss, rate, speed and the time that is left. To be added after the clock, which counts them.

    Args:
        shown: whose share and figures are kept up to date.
        progress: of the run.
        step_tokens: tokens of a step.
    """

    def __init__(self, shown: Activity, progress: Progress, step_tokens: int) -> None:
        self.shown, self.progress, self.step_tokens = shown, progress, step_tokens
        self._logged = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        step, seconds, share = self.progress.step, self.progress.elapsed, self.progress.share
        parts = [f"step {step:,}{self._logged}"]
        if seconds > 0 and share > 0:
            left = round(seconds / share * (1 - share))
            parts += [
                f"{step * self.step_tokens / seconds:,.0f} tokens/s",
                f"{left // 60} min {left % 60} s left" if left >= 60 else f"{left} s left",
            ]
        self.shown.done, self.shown.detail = share, ", ".join(parts)

    def on_log(  # noqa: D102
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            rate = logs.get("learning_rate")
            self._logged = f", loss {logs['loss']:.4g}" + ("" if rate is None else f", rate {rate:.2e}")


class Evaluate(TrainerCallback):  # type: ignore[misc]
    """Evaluates every so many steps."""

    def __init__(self, every: int, task: Callable[[int], None], progress: Progress) -> None:
        self.every, self.task, self.progress = every, task, progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self.every and state.global_step % self.every == 0:
            with self.progress.paused():
                self.task(state.global_step)


class Finite:
    """Remembers on the device whether a loss was not finite, so that no step waits for it."""

    def __init__(self, device: torch.device, processes: Processes = ALONE) -> None:
        self._processes = processes
        self._broken = torch.zeros((), dtype=torch.bool, device=device)

    def see(self, loss: torch.Tensor) -> None:
        """Look at a loss."""
        self._broken |= ~torch.isfinite(loss.detach())

    def broken(self) -> bool:
        """Whether one was not finite, in any process; waits for the device."""
        return self._processes.number(float(self._broken), largest=True) > 0
