"""Reconstructions and samples: whose they are, and that a figure shows each where its label says."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from dvq import pictures, style
from dvq.config import trial
from dvq.model import Model
from dvq.pictures import Pictures
from tests.dvq.test_figures import sweep, words
from tests.sizes import taken

SMALL = {"data": "cifar10-sample", "features": 4, "num_latents": 2}


@pytest.mark.parametrize("estimator", ["gs-soft", "vq-ema", "fsq", "gaussian"])
def test_the_pictures_of_a_model_are_what_it_says_itself(estimator, tmp_path):
    torch.manual_seed(0)
    model = Model(trial({**taken(estimator, {**SMALL, "num_codes": 4}), "estimator": estimator})).eval()
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    pictures.take(model, images).save(tmp_path / "pictures.npz")
    found = Pictures.load(tmp_path / "pictures.npz")
    np.testing.assert_array_equal(found.images, images[:16])
    np.testing.assert_array_equal(
        found.reconstructions, model.reconstruct(images[:16], model.generator(0)).numpy()
    )
    np.testing.assert_array_equal(found.samples, model.sample(16, model.generator(0)).numpy())


def plain(value):
    return np.full((16, 32, 32, 3), value, np.uint8)


def rows(figure):
    """The labels, and the values that their images have."""
    shown = [(axes.get_ylabel(), np.unique(axes.images[0].get_array()).tolist()) for axes in figure.axes]
    return {label: [value for value in values if value != 255] for label, values in shown}


def test_a_trial_has_its_images_reconstructions_and_samples():
    figure = pictures.of_trial(Pictures(plain(1), plain(2), plain(3)), "a trial")
    assert rows(figure) == {"images": [1], "reconstructions": [2], "samples": [3]}
    assert "a trial" in words(figure)


def test_a_long_name_is_a_title_of_several_lines():
    name = "gs-soft-c512-k16-s0" + "-annealing-after-61200" * 6
    figure = pictures.of_trial(Pictures(plain(1), plain(2), plain(3)), name)
    title = figure._suptitle
    assert title.get_text().replace("\n", "") == name
    figure.draw_without_rendering()
    assert title.get_window_extent().x1 < figure.bbox.x1


def test_a_sweep_has_a_row_a_trial_of_the_first_seed():
    results = sweep(sizes=(16,), seeds=(0, 1))
    made = {one["name"]: Pictures(plain(1), plain(10 + n), plain(20 + n)) for n, one in enumerate(results)}
    results[0]["evaluation"]["samples"] = []  # of an autoregressive prior
    assert rows(pictures.of_sweep(results, made)) == {
        "images": [1],
        "GS-Soft, C = 16, K = 4\nreconstructions": [10],
        "VQ-VAE, EMA, C = 16, K = 4\nreconstructions": [12],
        "GS-Soft, C = 16, K = 4\nsamples, AR prior": [20],
        "VQ-VAE, EMA, C = 16, K = 4\nsamples": [22],
    }


def test_trials_without_pictures_are_left_out():
    """They were finished by an earlier version."""
    results = sweep(sizes=(16,), seeds=(0,))
    found = rows(pictures.of_sweep(results, {results[1]["name"]: Pictures(plain(1), plain(2), plain(3))}))
    assert [label.partition("\n")[0] for label in found] == ["images", *2 * ["VQ-VAE, EMA, C = 16, K = 4"]]


def test_a_mosaic_holds_each_image_above_its_reconstruction(tmp_path):
    rng = np.random.default_rng(0)
    images, reconstructed = rng.integers(0, 256, (2, 5, 32, 28, 3), dtype=np.uint8)
    mosaic = pictures.mosaic(images, reconstructed)
    assert mosaic.shape == (3 * (2 * 33 - 1), 3 * (5 * 29 - 1), 3)
    small = mosaic[1::3, 1::3]
    np.testing.assert_array_equal(mosaic, small.repeat(3, 0).repeat(3, 1))
    np.testing.assert_array_equal(small[:32, 29:57], images[1])
    np.testing.assert_array_equal(small[33:, 4 * 29 :], reconstructed[4])
    assert (small[32] == 255).all()
    assert (small[:, 28] == 255).all()
    style.save_png(mosaic, tmp_path / "images" / "mosaic.png")
    read = imread(tmp_path / "images" / "mosaic.png")[..., :3]
    np.testing.assert_array_equal(np.round(read * 255).astype(np.uint8), mosaic)


def test_the_pictures_say_how_many_settings_they_leave_out():
    results = sweep(sizes=(16, 32, 64, 128), seeds=(0,))
    made = {one["name"]: Pictures(plain(1), plain(2), plain(3)) for one in results}
    figure = pictures.of_sweep(results, made)
    assert len(figure.axes) == 1 + 2 * 6
    assert "Reconstructions, and samples of the prior: 6 of 8 settings" in words(figure)
