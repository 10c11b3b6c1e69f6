"""transformers.Trainer for palettized models: optimizer, schedule, data order, checkpoints that are whole."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from edkm_export.disk_space import disk_full, stopped_by_disk
from edkm_export.errors import EdkmExportError, InputError, PaletteError, TrainingError
from edkm_export.limits import is_out_of_memory, words_of
from edkm_export.training import run_checkpoints
from edkm_export.training.callbacks import Finite, Refresh
from edkm_export.training.distributed.processes import ALONE, Processes
from edkm_export.training.distributed.shard_files import Background, load_moments, stage
from edkm_export.training.distributed.shard_files import load_weights as load_shared_weights
from edkm_export.training.distributed.sharding import Sharding
from edkm_export.training.graphs import GraphedStep, can_record
from edkm_export.training.learner import Learner
from edkm_export.training.optimizer import build_optimizer, rate_at
from edkm_export.training.palettized.batch import ClusterBatch
from edkm_export.training.palettized.surgery import attach, clusters_of
from edkm_export.training.progress import Progress
from edkm_export.training.run_weights import load_weights, read_state_dict, read_weights, save_weights
from edkm_export.training.train_config import TrainConfig
from edkm_export.training.windows import PackedWindows

__all__ = ["PaletteTrainer"]

_KEPT = 2  # checkpoints
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack windows to [batch, context]."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


class PaletteTrainer(Trainer):  # type: ignore[misc]
    """Trains a `Learner`; see `run.Run` for the whole."""

    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        learner: Learner,
        data: PackedWindows,
        config: TrainConfig,
        arguments: TrainingArguments,
        progress: Progress,
        *,
        processes: Processes = ALONE,
        sharding: Sharding | None = None,
        sizes: Mapping[str, float] | None = None,
    ) -> None:
        self.processes, self.sharding, self._sizes = processes, sharding, sizes
        if sharding is not None and not hasattr(
            Trainer, "_clip_grad_norm"
        ):  # it would clip each share by itself
            raise InputError("several processes need a newer transformers: pip install -U transformers")
        self.background = None if sharding is None else Background(processes)
        self.config, self.progress, self.learner = config, progress, learner
        self.folder = Path(arguments.output_dir)
        super().__init__(
            model=learner,
            args=arguments,
            train_dataset=data,
            data_collator=collate,
        )
        self.remove_callback(PrinterCallback)
        self.clusters = ClusterBatch(list(clusters_of(learner).values()))
        self.clusters.defer()
        self.graph: GraphedStep | None = None
        if config.record_steps and self.sharding is None and can_record(learner):
            self.graph = GraphedStep(learner, divide=config.accumulate, bf16=config.bf16)
        self.add_callback(Refresh(self.clusters))
        self.finite = Finite(arguments.device, processes)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, to be divided by the micro-batches

    def save_to(self, folder: Path) -> None:
        """Where checkpoints go from now on."""
        self.folder, self.args.output_dir = folder, str(folder)

    def create_optimizer(self, model: Any = None) -> Any:
        """Adam with our groups, attached to the clusters."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.learner.model, self.config, self._sizes)
            attach(self.learner, self.optimizer)
            if self.sharding is not None:
                self.sharding.optimizer = self.optimizer
        return self.optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """Let accelerate prepare autocast, but neither move nor wrap a learner that is sharded."""
        super().create_accelerator_and_postprocess()
        if self.sharding is not None:
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, **_: prepare(
                model, device_placement=False, evaluation_mode=True
            )

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        if self.sharding is None:  # shares are where they have to be, and indices would lose their padding
            super()._move_model_to_device(model, device)

    def training_step(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch; after the last one of a step, what is left to do for gradients of LUTs and shares."""
        loss: Tensor
        if self.graph is not None and self.graph.takes(inputs):
            loss = self.graph(inputs["input_ids"])
            self.finite.see(loss)
        else:
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self.clusters.gradients()
            if self.sharding is not None:
                self.sharding.finish_gradients(self.clusters)
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.sharding is None:
            return super()._clip_grad_norm(model)
        return self.sharding.clip_gradients(self.config.clip)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.sharding is None or grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.sharding.clip_gradients(0.0)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Rates follow the share of the run that is done, in steps or in time."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda _step: rate_at(self.config, self.progress.share)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """`PackedWindows` shuffles by itself."""
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The learner's loss."""
        loss = model(**inputs)
        if self.processes.are_many and "counts" in inputs:
            # The mean over all processes' tokens, which is no mean of means when not all tokens count.
            own = inputs["counts"][:, 1:].sum().to(loss.dtype)
            loss = loss * (own * self.processes.count / self.processes.total(own.clone()).clamp_min(1))
        self.finite.see(loss)
        if loss.device.type == "cpu":
            self.check()
        return (loss, {}) if return_outputs else loss

    def check(self) -> None:
        """Stop if a loss was not finite.

        Raises:
            TrainingError: it was not.
        """
        if self.finite.broken():
            raise self.failure(
                "the loss is not finite; lower --weight-rate and --lut-rate, or raise --warmup"
            )

    def failure(self, reason: str) -> TrainingError:
        """What to raise: the step, the reason, and the last checkpoint that is whole."""
        last = run_checkpoints.last_complete(self.folder)
        found = (
            f"the last good checkpoint is {last}; go on from it with --resume"
            if last
            else "there is no checkpoint yet"
        )
        return TrainingError(
            f"step {self.state.global_step + 1}: {reason.removesuffix('.')}. {found[0].upper()}{found[1:]}."
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Check the loss before it is logged."""
        self.check()
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """In every process: all of them take part in gathering. Older transformers ask the first one only."""
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights, LUTs and indices, whole; frozen master weights come from the original again."""
        self.clusters.refresh()
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.background is None:  # else it writes them
            save_weights(self.learner.model, folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save, flush, mark as whole, and only then remove older ones. It takes no time of the run."""
        with self.progress.paused():
            self._save_whole(model, trial)

    def _save_whole(self, model: Any, trial: Any) -> None:
        self.check()
        path = self.folder / f"checkpoint-{self.state.global_step}"
        with self._explaining_writes():
            if self.background is not None:
                self.background.wait()  # the one before is written
            super()._save_checkpoint(model, trial)
            self.processes.wait()  # each writes the state of its random numbers
            complete = partial(_complete, path, self.progress.elapsed)
            if self.background is None:
                complete()
            else:
                state = stage(self.learner.model, self._adam, self.background.mesh)
                self.background.write(state, path / run_checkpoints.SHARDS, complete)

    @contextlib.contextmanager
    def _explaining_writes(self) -> Iterator[None]:
        """Say that a checkpoint could not be written, and which one is the last good one."""
        path = self.folder / f"checkpoint-{self.state.global_step}"
        try:
            yield
        except (OSError, RuntimeError) as error:
            if stopped_by_disk(error, path):
                raise self.failure(f"the checkpoint could not be written: {disk_full(path)}") from error
            if isinstance(error, OSError) and error.errno not in _FULL:
                raise
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
            raise self.failure(
                f"the checkpoint could not be written to {path}, is the disk full? ({reason})"
            ) from error

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer itself, without what accelerate puts around it."""
        found: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return found

    @property
    def _cpus(self) -> Any:
        """The mesh of the processes' CPUs; None for one process."""
        return None if self.background is None else self.background.mesh

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharding is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.processes.is_first:
            groups = [
                {key: value for key, value in group.items() if key != "params"}
                for group in self._adam.param_groups
            ]
            torch.save({"param_groups": groups}, Path(output_dir) / run_checkpoints.OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / run_checkpoints.SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _fitting(checkpoint, "optimizer or scheduler"):
            if checkpoint is None:
                return
            folder = Path(checkpoint)
            if run_checkpoints.in_shares(folder):
                groups = read_state_dict(folder / run_checkpoints.OPTIMIZER)["param_groups"]
                for group, found in zip(self._adam.param_groups, groups, strict=True):
                    group.update(found)
                load_moments(self.learner.model, self._adam, folder / run_checkpoints.SHARDS, self._cpus)
            elif self.sharding is None:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            else:
                self.sharding.load_optimizer(read_state_dict(folder / run_checkpoints.OPTIMIZER))
            self.lr_scheduler.load_state_dict(read_state_dict(folder / run_checkpoints.SCHEDULER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _fitting(checkpoint, "state of the random numbers"):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights, LUTs and indices."""
        folder = Path(resume_from_checkpoint)
        if run_checkpoints.in_shares(folder):
            load_shared_weights(self.learner.model, folder / run_checkpoints.SHARDS, self._cpus)
        elif self.sharding is None:
            load_weights(self.learner.model, folder)
        else:
            self.sharding.load_weights(read_weights(folder), folder)

    def run(self, resume: Path | None) -> None:
        """Train to the end.

        Raises:
            TrainingError: what is said in `faults`.
        """
        if resume is not None:
            mark = run_checkpoints.read_mark(resume)
            self.progress.step, self.progress.elapsed = mark.step, mark.elapsed
            with _fitting(str(resume), run_checkpoints.TRAINER):
                state = TrainerState.load_from_json(str(resume / run_checkpoints.TRAINER))
                if type(state.global_step) is not int or state.global_step != mark.step:
                    raise ValueError(f"it is of step {state.global_step!r}")
        try:
            self.train(resume_from_checkpoint=None if resume is None else str(resume))
            self.check()
            if self.background is not None:
                with self._explaining_writes():
                    self.background.wait()
        except PaletteError as error:
            raise self.failure(f"a weight is no longer finite ({error})") from error
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise self.failure(
                f"{error.filename or self.folder}: {error.strerror}; free some space"
            ) from error
        except torch.OutOfMemoryError as error:
            raise self.failure(_OUT_OF_MEMORY) from error
        except MemoryError as error:
            raise self.failure(_OUT_OF_MEMORY) from error
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise self.failure(_OUT_OF_MEMORY) from error
            raise


def _complete(path: Path, elapsed: float) -> None:
    run_checkpoints.complete(path, elapsed=elapsed)
    run_checkpoints.retire(path.parent, _KEPT)


@contextlib.contextmanager
def _fitting(checkpoint: str | None, what: str) -> Iterator[None]:
    """Explain a part of a checkpoint that is whole, but of something else; what that raises has no common base."""
    try:
        yield
    except (EdkmExportError, MemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise TrainingError(
            f"{checkpoint}: its {what} does not fit the run ({' '.join(words_of(error).split())[:120]}); remove that "
            "folder to go on from the checkpoint before."
        ) from error


_OUT_OF_MEMORY = (
    "out of memory; use a smaller --batch-size with --accumulate to make up for it, a smaller --context, "
    "or --gradient-checkpointing"
)
