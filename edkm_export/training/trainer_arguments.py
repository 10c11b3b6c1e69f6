"""Settings of a run in the words of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from edkm_export.training.distributed.processes import ALONE, Processes
from edkm_export.training.train_config import TrainConfig

__all__ = ["training_arguments"]


def training_arguments(
    config: TrainConfig,
    folder: Path,
    *,
    steps: int,
    device: str,
    processes: Processes = ALONE,
) -> TrainingArguments:
    """The part of the settings that transformers' Trainer handles.

    One process trains on one device: of several that it sees, the Trainer would copy the model to each in every step
    (`torch.nn.DataParallel`), which clusters do not survive.
    """
    made = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=processes.share(config.batch_size),
        gradient_accumulation_steps=config.accumulate,
        max_steps=steps,
        max_grad_norm=config.clip,
        bf16=config.bf16,
        seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,  # it waits for the device at each step, and hides what we report
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        report_to=[],  # see `callbacks.tensorboard`
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_pin_memory=device != "cpu",
        use_cpu=device == "cpu",
        label_names=[],
    )
    if made.n_gpu > 1:
        made._n_gpu = 1
    return made
