"""How near the palettized model's embeddings stay to the original's, by bits.

    python -m benchmarks.embeddings FOLDER --calibration fixtures/calibration.txt

FOLDER is one of sentence-transformers. For each number of bits the model is palettized with the default recipe,
exported to ONNX with `--runtime exact`, and verified against the folder on the built-in texts: mean and least cosine,
rank agreement, queries with the same nearest document, and the size of the weights on disk.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

import edkm_export


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--calibration", type=click.Path(exists=True, path_type=Path))
@click.option("--bits", multiple=True, type=int, default=(8, 6, 4, 3, 2), show_default=True)
def main(folder: Path, calibration: Path | None, bits: tuple[int, ...]) -> None:
    print("| bits | mean cosine | least | rank agreement | same nearest | MB | export |")
    print("|---|---|---|---|---|---|---|")
    for each in bits:
        with tempfile.TemporaryDirectory() as place:
            checkpoint = edkm_export.palettize(folder, calibration=calibration, bits=each)
            exported = edkm_export.export(checkpoint, Path(place) / "out", format="onnx")
            report = exported.verify(original=folder)
            found = report.nearness
            assert found is not None
            size = (exported.weights_size_bytes or 0) / 1e6
            print(
                f"| {each} | {found['cosine_mean']:.4f} | {found['cosine_min']:.4f} | {found['rank_agreement']:.1%} | "
                f"{found['same_nearest']:.1%} | {size:.1f} | {report.faithful_export.value} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
