"""Files of reference statistics: our own, published ones, and files of something else."""

import contextlib
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation import FeatureStatistics, frechet_distance
from difftrain.evaluation.distances.moments import Moments
from difftrain.evaluation.features.raw import Pixels
from difftrain.evaluation.reference import read_statistics, read_statistics_file, save_statistics
from difftrain.evaluation.sources.resizing import Resizing


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(*batches: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def test_a_saved_file_gives_the_same_statistics(tmp_path):
    saved = statistics_of(normal(30, 4))
    protocol = {"features": {"name": "pixels"}, "resize": None}
    save_statistics(tmp_path / "folder" / "reference.npz", {"features": saved}, protocol)

    read = read_statistics_file(tmp_path / "folder" / "reference.npz")
    loaded = read.by_output["features"]

    assert loaded.count == 30
    assert read.protocol == protocol
    assert abs(frechet_distance(saved, loaded)) < 1e-12
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["reference.npz"]
    with np.load(tmp_path / "folder" / "reference.npz") as file:
        assert sorted(file.files) == ["mu", "num_samples", "protocol", "sigma"]
        np.testing.assert_array_equal(file["sigma"], saved.cov)


def test_a_published_file_without_a_count_is_read_and_says_what_is_assumed(tmp_path):
    features = normal(30, 4)
    np.savez(tmp_path / "fid.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))

    read = read_statistics_file(tmp_path / "fid.npz")
    loaded = read.by_output["features"]

    assert (loaded.count, loaded.count_is_known) == (0, False)
    assert read.protocol["num_samples"] is None
    assert "ddof 1" in read.protocol["assumed"]
    assert set(read.by_output) == {"features"}
    other = statistics_of(normal(9, 4, seed=1))
    assert (
        abs(frechet_distance(loaded, other) - frechet_distance(statistics_of(features), other))
        < 1e-12
    )


def test_spatial_statistics_are_read_beside_the_others_and_the_images_are_not(tmp_path):
    features, spatial = normal(30, 4), normal(30, 3, seed=1)
    arrays = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    arrays |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
    np.savez(
        tmp_path / "adm.npz", arr_0=np.array([{}], dtype=object), **arrays
    )  # unreadable without pickle, so reading it would raise

    read = read_statistics_file(tmp_path / "adm.npz")

    np.testing.assert_allclose(
        read.by_output["spatial"].cov, np.cov(spatial, rowvar=False), atol=1e-14
    )
    np.testing.assert_array_equal(read.by_output["spatial"].mean, spatial.mean(0))
    assert read.protocol["keys"] == "mu, sigma, mu_s, sigma_s"


def test_spatial_statistics_are_saved_as_they_are_published(tmp_path):
    saved = statistics_of(normal(30, 4))
    spatial = statistics_of(normal(30, 3))
    save_statistics(tmp_path / "both.npz", {"features": saved, "spatial": spatial}, {})

    loaded = read_statistics_file(tmp_path / "both.npz").by_output["spatial"]

    assert loaded.count == 30
    np.testing.assert_allclose(loaded.cov, spatial.cov, atol=1e-15)


def test_a_file_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    (tmp_path / "text.npz").write_text("not a zip file")

    with (tmp_path / "stylegan.pkl").open("wb") as file:
        pickle.dump({"mean": np.zeros(3)}, file)
    np.savez(tmp_path / "crooked.npz", mu=np.zeros(2), sigma=np.array([[1, 0.5], [0.4, 1]]))
    np.savez(tmp_path / "broken.npz", mu=np.zeros(1), sigma=np.full((1, 1), np.nan))
    np.savez(tmp_path / "half.npz", mu=np.zeros(1), sigma=np.ones((1, 1)), mu_s=np.zeros(1))
    np.savez(tmp_path / "flat.npz", mu=np.zeros(3), sigma=np.ones(3))

    with pytest.raises(InputError, match="sigma is missing; it has mu"):
        read_statistics_file(tmp_path / "other.npz")
    with pytest.raises(InputError, match=r"a pickle can run any code .* numpy\.savez"):
        read_statistics_file(tmp_path / "stylegan.pkl")
    with pytest.raises(InputError, match="sigma is not symmetric"):
        read_statistics_file(tmp_path / "crooked.npz")
    with pytest.raises(InputError, match="not finite"):
        read_statistics_file(tmp_path / "broken.npz")
    with pytest.raises(InputError, match="sigma_s is missing"):
        read_statistics_file(tmp_path / "half.npz")
    with pytest.raises(
        InputError, match=r"mu must be \[D\] and sigma \[D, D\], got \[3\] and \[3\]"
    ):
        read_statistics_file(tmp_path / "flat.npz")
    with pytest.raises(InputError, match=r"text\.npz: cannot be read"):
        read_statistics_file(tmp_path / "text.npz")


MU, SIGMA = np.zeros(2), np.eye(2)
ODD_ARRAYS = {
    "text as mean": ({"mu": np.array(["a", "b"])}, "mu holds the type <U1"),
    "objects as mean": ({"mu": np.array([{}, []], dtype=object)}, "cannot be read"),
    "flags as mean": ({"mu": np.array([True, False])}, "mu holds the type bool"),
    "no mean": ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu must be \[D\]"),
    "complex covariance": ({"sigma": SIGMA * (1 + 1j)}, "sigma holds complex numbers"),
    "negative variance": ({"sigma": np.diag([1.0, -0.5])}, "diagonal of sigma holds -0.5"),
    "indefinite": ({"sigma": np.array([[1.0, 2.0], [2.0, 1.0]])}, "negative in some directions"),
    "count of text": ({"num_samples": np.array("many"), "protocol": "{}"}, "one whole number"),
    "count of halves": ({"num_samples": np.array(2.5), "protocol": "{}"}, "one whole number"),
    "two counts": ({"num_samples": np.array([4, 5]), "protocol": "{}"}, "one whole number"),
    "negative count": ({"num_samples": -3, "protocol": "{}"}, "needs at least 2"),
    "protocol of text": ({"num_samples": 3, "protocol": "odd"}, "protocol is not the JSON object"),
    "protocol of a list": ({"num_samples": 3, "protocol": "[]"}, "protocol is not the JSON"),
    "odd features": ({"num_samples": 3, "protocol": '{"features": 3}'}, "protocol is not the"),
    "numbers as protocol": ({"num_samples": 3, "protocol": np.eye(2)}, "protocol is not the"),
}


@pytest.mark.parametrize("name", ODD_ARRAYS)
def test_odd_arrays_are_refused_with_their_name(tmp_path, name):
    arrays, message = ODD_ARRAYS[name]
    np.savez(tmp_path / "odd.npz", **{"mu": MU, "sigma": SIGMA, **arrays})

    with pytest.raises(InputError, match=rf"odd\.npz: .*{message}"):
        read_statistics_file(tmp_path / "odd.npz")


def test_damaged_files_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", mu=np.arange(500.0), sigma=np.eye(500))
    whole = (tmp_path / "whole.npz").read_bytes()
    bad = bytearray(whole)
    bad[200:260] = bytes(60)
    for content in (b"", whole[: len(whole) // 2], whole[:-30], bytes(bad), b"PK\3\4" + bytes(30)):
        (tmp_path / "damaged.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"damaged\.npz: cannot be read"):
            read_statistics_file(tmp_path / "damaged.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(InputError, match=r"array\.npz: cannot be read"):
        read_statistics_file(tmp_path / "array.npz")


def test_rounded_statistics_of_few_samples_are_read(tmp_path):
    """Of rank 9 in 50 dimensions, rounded to float32, as published files may be."""
    rows = np.random.default_rng(0).normal(size=(10, 50))
    cov = np.cov(rows, rowvar=False).astype(np.float32)
    assert np.linalg.eigvalsh(cov.astype(float)).min() < 0
    np.savez(tmp_path / "few.npz", mu=rows.mean(0), sigma=cov)

    assert read_statistics_file(tmp_path / "few.npz").by_output["features"].num_features == 50


STORED = {"side": 16, "filter": "bicubic", "crop": "center"}


@pytest.mark.parametrize(
    ("stored", "resizing", "side", "message"),
    [
        (STORED, Resizing(16, crop=True), 16, ""),
        (STORED, None, 16, ""),  # they have the size already
        (None, None, 30, ""),
        (STORED, None, 30, "resized by --resize 16 --crop. Write --resize 16 --crop"),
        (STORED, Resizing(16), 16, "resized by --resize 16 --crop. Write --resize 16 --crop"),
        (STORED, Resizing(32, crop=True), 32, "resized by --resize 16 --crop"),
        (None, Resizing(16), 16, "pictures as they are, and the samples would be resized"),
    ],
)
def test_statistics_of_pictures_that_were_resized_otherwise_are_refused(
    tmp_path, stored, resizing, side, message
):
    features = Pixels((1, 2, 2))
    moments = Moments.known(torch.zeros(4), torch.eye(4), 9)
    protocol = {"features": features.protocol()}
    if stored is not None:
        protocol["resized"] = stored
    save_statistics(tmp_path / "s.npz", {"features": moments}, protocol)

    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        read_statistics(tmp_path / "s.npz", features, resizing, (1, side, side))
