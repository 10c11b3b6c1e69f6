from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("coremltools")

import coremltools as ct
from coremltools.converters.mil import Builder as mb

from tests.helpers.mil_build import save, save_program

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")

    def body(x, y):
        return [mb.add(x=x, y=y, name="sum"), mb.reduce_argmax(x=x, axis=1, name="best")]

    save_program(folder / "two.mlpackage", {"x": X, "y": X}, body)
    np.save(folder / "x.npy", X)
    np.save(folder / "y.npy", X.astype(np.float64) * 2)
    np.save(folder / "long.npy", np.zeros((2, 4), np.float32))
    np.save(folder / "objects.npy", np.array([{}], object), allow_pickle=True)
    return folder


def test_outputs_by_name(edkm, package, tmp_path):
    out = tmp_path / "out.npz"
    args = [
        "run",
        package / "two.mlpackage",
        "--input",
        f"x={package}/x.npy",
        "--input",
        f"y={package}/y.npy",
    ]
    result = edkm(*args, "-o", out)
    assert result.status == 0, result.err
    assert "sum: float32 [2, 3]" in result.out and "best: int32 [2]" in result.out and str(out) in result.out
    found = np.load(out)
    np.testing.assert_array_equal(found["sum"], X * 3)
    np.testing.assert_array_equal(found["best"], [2, 2])
    again = edkm(*args, "-o", out)
    assert again.status == 2 and "--overwrite" in again.message
    assert edkm(*args, "-o", out, "--overwrite", "--precision", "float16").status == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "input 'x' of function main is missing; its inputs are x, y"),
        (["x"], "--input 'x': expected NAME=FILE"),
        (["z=x.npy"], "no input 'z'; its inputs are x (float32 [2, 3]), y (float32 [2, 3])"),
        (["x=none.npy"], "none.npy: no such file"),
        (["x=objects.npy"], "objects.npy: not an array that can be used"),
        (["x=long.npy", "y=y.npy"], "input 'x' has shape [2, 4], expected float32 [2, 3]"),
        (["x=two.mlpackage/Manifest.json"], "input 'x' is no image; give it as .npy"),
    ],
)
def test_mistakes(edkm, package, tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(package)
    out = tmp_path / "out.npz"
    result = edkm("run", "two.mlpackage", *(part for one in given for part in ("--input", one)), "-o", out)
    assert result.status == 2 and message in result.message
    assert not out.exists()


def test_other_mistakes(edkm, package, tmp_path):
    result = edkm("run", package / "two.mlpackage", "-o", tmp_path / "out.npy")
    assert result.status == 2 and "outputs are written as .npz" in result.message
    result = edkm("run", package / "two.mlpackage", "--function", "other", "-o", tmp_path / "out.npz")
    assert result.status == 2 and "no function 'other'; it has main" in result.message


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Means of the three colours of an image; the largest is the class."""
    folder = tmp_path_factory.mktemp("classifier")

    @mb.program(input_specs=[mb.TensorSpec((1, 3, 4, 5))], opset_version=ct.target.iOS16)
    def program(photo):
        return mb.reduce_mean(x=photo, axes=[2, 3], keep_dims=False, name="means")

    model = ct.convert(
        program,
        inputs=[ct.ImageType("photo", (1, 3, 4, 5), color_layout=ct.colorlayout.BGR)],
        classifier_config=ct.ClassifierConfig(["blue", "green", "red"]),
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    save(model, folder / "classifier.mlpackage")
    return folder


def test_an_image_and_a_label(edkm, classifier, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((4, 5, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = 200, 30  # red, some blue
    image.fromarray(pixels).save(tmp_path / "photo.png")
    out = tmp_path / "out.npz"
    args = ["run", classifier / "classifier.mlpackage", "-o", out, "--input"]
    result = edkm(*args, f"photo={tmp_path}/photo.png")
    assert result.status == 0, result.err
    assert "classLabel: red" in result.out and "red 200" in result.out
    found = np.load(out)
    assert found["classLabel"] == "red"
    probabilities = dict(zip(found["classLabel_probs.labels"], found["classLabel_probs"], strict=True))
    assert probabilities == {"blue": 30.0, "green": 0.0, "red": 200.0}
    image.fromarray(pixels[:2]).save(tmp_path / "small.png")
    result = edkm(*args, f"photo={tmp_path}/small.png", "--overwrite")
    assert result.status == 2 and "5 x 2 pixels, but input 'photo' takes 5 x 4" in result.message
    (tmp_path / "text.png").write_text("no image")
    result = edkm(*args, f"photo={tmp_path}/text.png", "--overwrite")
    assert result.status == 2 and "not an image that can be read" in result.message


def test_random_numbers_are_declared(edkm, tmp_path):
    def body(x):
        return mb.add(x=x, y=mb.random_normal(shape=np.array([2, 3], np.int32)), name="noisy")

    save_program(tmp_path / "noisy.mlpackage", {"x": X}, body)
    np.save(tmp_path / "x.npy", X)
    args = ["run", tmp_path / "noisy.mlpackage", "--input", f"x={tmp_path}/x.npy", "--overwrite"]
    found = {}
    for seed in (1, 2, 1):
        result = edkm(*args, "-o", tmp_path / "out.npz", "--seed", seed)
        assert f"draws random numbers, here with seed {seed}" in result.out
        noisy = np.load(tmp_path / "out.npz")["noisy"]
        np.testing.assert_array_equal(found.setdefault(seed, noisy), noisy)
    assert not np.array_equal(found[1], found[2])
