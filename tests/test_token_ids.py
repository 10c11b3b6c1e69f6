from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from edkm_export.array_input import as_tensor
from edkm_export.errors import InputError
from edkm_export.token_ids import as_ids

IDS = [5, 0, 7]
FORMS = {
    "list": IDS,
    "tuple": tuple(IDS),
    "nested list": [IDS],
    "numpy scalars": [np.int64(5), np.uint8(0), np.int16(7)],
    "int32 array": np.array(IDS, np.int32),
    "big endian array": np.array(IDS, ">i4"),
    "uint64 array": np.array(IDS, np.uint64),
    "batch of one": np.array([IDS]),
    "strided array": np.array([5, 1, 0, 1, 7, 1])[::2],
    "int64 tensor": torch.tensor(IDS),
    "uint8 tensor": torch.tensor(IDS, dtype=torch.uint8),
    "tensor of one text": torch.tensor([IDS]),
    "scalar tensors": [torch.tensor(token) for token in IDS],
    "tokenizer": BatchEncoding({"input_ids": [IDS], "attention_mask": [[1, 1, 1]]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_text(form):
    found = as_ids(FORMS[form])
    assert found.dtype == torch.int64 and found.tolist() == IDS


def test_range():
    assert as_ids(range(4)).tolist() == [0, 1, 2, 3]


WRONG = {
    "text": ("once", "is text, expected token ids"),
    "empty list": ([], "there are no ids"),
    "empty array": (np.zeros(0), "there are no ids"),
    "empty tensor": (torch.zeros(1, 0, dtype=torch.int64), "there are no ids"),
    "float": ([1, 2.5], "item 1 is 2.5, expected an integer"),
    "bool": ([True], "item 0 is True"),
    "float array": (np.ones(3), "ids are float64 [3], expected integers"),
    "bool array": (np.ones(3, bool), "ids are bool [3]"),
    "float tensor": (torch.ones(3), "ids are torch.float32 [3]"),
    "several texts": ([[1, 2], [3]], "2 lists of ids; give one text at a time"),
    "several rows": (torch.zeros(2, 3, dtype=torch.int64), "shape [2, 3]"),
    "None": (None, "ids are NoneType"),
    "number": (3, "ids are int"),
    "huge": ([1 << 80], "is no token"),
    "other mapping": ({"ids": [1]}, "without 'input_ids'; it has ids"),
}


@pytest.mark.parametrize("form", WRONG)
def test_refused(form):
    ids, message = WRONG[form]
    with pytest.raises(InputError) as caught:
        as_ids(ids, "prompt")
    assert str(caught.value).startswith("prompt: ") and message in str(caught.value)


def test_arrays():
    assert as_tensor([[1, 2]], "x").dtype == torch.int64
    assert as_tensor(np.arange(3, dtype=">f4"), "x").tolist() == [0, 1, 2]
    assert as_tensor(torch.ones(2, requires_grad=True), "x").requires_grad is False
    for wrong in ("one", None, [[1], [1, 2]], object()):
        with pytest.raises(InputError, match="^x is"):
            as_tensor(wrong, "x")
