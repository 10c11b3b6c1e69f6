from __future__ import annotations

import pytest

from edkm_export.local_paths import without_folders


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/home/someone/models/llama", "llama"),
        ("/home/someone/my models/llama", "llama"),
        ("models/llama", "models/llama"),
        ("owner/name", "owner/name"),
        ("--calibration=/home/someone/a text.txt", "--calibration=a text.txt"),
        ("--calibration=text.txt", "--calibration=text.txt"),
        ("/home/someone/llama has changed; see '/data/b/c.txt'.", "llama has changed; see 'c.txt'."),
        ("cannot read /home/someone/llama, nor (/data/x/y)", "cannot read llama, nor (y)"),
        ("https://huggingface.co/owner/name", "https://huggingface.co/owner/name"),
        ("file:///home/x", "x"),
        ("210 of 211 tokens/s and 3/4/5", "210 of 211 tokens/s and 3/4/5"),
        ("/think", "/think"),
        ("", ""),
    ],
)
def test_text_without_folders(given, expected):
    assert without_folders(given) == expected


def test_path_with_spaces(tmp_path):
    (tmp_path / "my models").mkdir()
    assert without_folders(str(tmp_path / "my models")) == "my models"


def test_values_of_all_depths():
    given = {
        "command": ["edkm-export", "-o", "/a/b/model.pt"],
        "/a/b/x": {"seed": 3, "text": "/a/b/y"},
        "none": None,
    }
    assert without_folders(given) == {
        "command": ["edkm-export", "-o", "model.pt"],
        "x": {"seed": 3, "text": "y"},
        "none": None,
    }


def test_files_of_one_name_are_told_apart():
    given = {"/a/train.txt": "1", "/b/train.txt": "2", "/c/d/train.txt": "3"}
    assert without_folders(given) == {"train.txt": "1", "train.txt (2)": "2", "train.txt (3)": "3"}
