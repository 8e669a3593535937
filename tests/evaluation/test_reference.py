"""Files of reference statistics: our own, published ones, and files of something else."""

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from difftrain.core.errors import InputError
from difftrain.evaluation import FeatureStatistics, frechet_distance
from difftrain.evaluation.reference import read_statistics_file, save_statistics


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(*batches: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def test_a_saved_file_gives_the_same_statistics(tmp_path):
    saved = statistics_of(normal(30, 4))
    protocol = {"features": "pixels", "resize": None}
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
