"""Shares of a batch and of rows, without any other process."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from edkm_export.errors import InputError
from edkm_export.training import trainer_arguments
from edkm_export.training.distributed.processes import ALONE, Processes
from edkm_export.training.distributed.rows import Rows
from edkm_export.training.train_config import TrainConfig


@pytest.mark.parametrize(
    ("batch", "count", "advice"), [(3, 2, "use 2 or 4"), (1, 8, "use 8"), (20, 8, "use 16 or 24")]
)
def test_a_batch_that_cannot_be_divided_is_refused(batch: int, count: int, advice: str) -> None:
    with pytest.raises(
        InputError, match=f"--batch-size {batch} cannot be divided among {count} processes; {advice}"
    ):
        Processes(0, count, "cpu").share(batch)


def test_one_process_needs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with Processes.join("cpu") as alone:
        assert not alone.are_many and alone.is_first and alone.share(3) == 3
        assert alone.first(lambda: 5) == 5 and alone.number(2.5) == 2.5
        values = torch.ones(3)
        assert alone.total(values) is values and bool((values == 1).all())


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="process 1 of this machine finds 1 CUDA devices"):
        Processes.join("cuda")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("rows", "groups"), [(48, 3), (48, 1), (48, 48), (64, 4), (40, 5)])
def test_pieces_cover_the_rows_and_add_up_to_groups(rows: int, groups: int, count: int) -> None:
    weight = torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = torch.arange(groups)
    total = torch.zeros(groups, dtype=torch.float64)
    next_row = 0
    for rank in range(count):
        mine = Rows("layer", rows, groups, Processes(rank, count, "cpu"), torch.device("cpu"))
        assert mine.start == next_row and mine.stop - mine.start <= mine.share
        next_row = mine.stop
        own = weight[mine.start : mine.stop]
        pieces = mine.view(own)
        assert pieces.shape == (mine.pieces, own.numel() // mine.pieces)
        # Every row of a piece lies in the piece's group.
        each_row = mine.of_pieces(table).repeat_interleave(len(own) // mine.pieces)
        assert torch.equal(each_row, torch.arange(mine.start, mine.stop) // (rows // groups))
        total += mine.of_groups(pieces.sum(1))
        assert mine.are_split or len(set(mine.group_of.tolist())) == mine.pieces
    assert next_row == rows
    torch.testing.assert_close(total, weight.view(groups, -1).sum(1))


def test_too_many_processes_for_a_weight_are_refused() -> None:
    with pytest.raises(InputError, match="layer: its 5 rows cannot be shared among 4 processes"):
        Rows("layer", 5, 1, Processes(3, 4, "cpu"), torch.device("cpu"))
    assert Rows("layer", 5, 1, ALONE, torch.device("cpu")).pieces == 1


def test_one_process_trains_on_one_device(monkeypatch, tmp_path):
    """Where it sees two, transformers' arguments ask the Trainer for copies of the model on both."""

    def with_two_devices(*args, **kwargs):
        made = TrainingArguments(*args, **kwargs)
        assert made.n_gpu < 2  # read once; from then on it is what is set here
        made._n_gpu = 2
        return made

    monkeypatch.setattr(trainer_arguments, "TrainingArguments", with_two_devices)
    assert trainer_arguments.training_arguments(TrainConfig(), tmp_path, steps=1, device="cpu").n_gpu == 1
