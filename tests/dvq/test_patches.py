"""What the codes stand for: means of patches, against sums over places one by one."""

import numpy as np
import pytest
import torch

from dvq import DvqError, patches, style
from dvq.config import trial
from dvq.model import Model
from dvq.patches import Patches
from tests.dvq.test_figures import result, sweep, words
from tests.sizes import taken

SMALL = {"features": 4, "num_latents": 2}


def made(estimator, data="cifar10-sample", codes=20):
    torch.manual_seed(0)
    return Model(
        trial({**taken(estimator, {**SMALL, "data": data, "num_codes": codes}), "estimator": estimator})
    )


@pytest.mark.parametrize("estimator", ["gs-soft", "vq-ema", "fsq"])
@pytest.mark.parametrize(
    ("data", "shape"), [("cifar10-sample", (32, 32, 3)), ("a@8x12x1-" + "0" * 16, (8, 12, 1))]
)
def test_a_code_has_the_mean_of_the_pixels_round_where_it_is(estimator, data, shape, tmp_path):
    model = made(estimator, data)
    images = np.random.default_rng(0).integers(0, 256, (9, *shape), dtype=np.uint8)
    patches.take(model, images).save(tmp_path / "patches.npz")
    found = Patches.load(tmp_path / "patches.npz")
    codes = model.encode(images, model.generator(0)).numpy()  # (N, H/4, W/4, K)
    rows, columns = np.indices(codes.shape[1:3]) * 4
    around = np.arange(-4, 8)
    for k in range(2):
        times = np.bincount(codes[..., k].ravel(), minlength=model.latents.codebook.shape[1])
        np.testing.assert_array_equal(found.codes[k], np.argsort(-times, kind="stable")[:16])
        np.testing.assert_allclose(found.share[k], times[found.codes[k]] / times.sum())
        cut = np.zeros((*codes.shape[:3], 12, 12, shape[2]))
        for n, i, j in np.ndindex(*codes.shape[:3]):
            y = (rows[i, j] + around).clip(0, shape[0] - 1)
            x = (columns[i, j] + around).clip(0, shape[1] - 1)
            cut[n, i, j] = images[n][np.ix_(y, x)]
        for at, code in enumerate(found.codes[k]):
            there = cut[codes[..., k] == code]
            mean = there.mean(0) - cut.mean((0, 1, 2)) if len(there) else np.zeros(cut.shape[3:])
            np.testing.assert_allclose(found.differences[k, at], mean, atol=1e-4)


def test_so_many_images_are_looked_at_as_have_so_many_places(monkeypatch):
    monkeypatch.setattr(patches, "PLACES", 130)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    images[3] = 0
    found, three, two = (patches.take(made("gs-soft"), some) for some in (images, images[:3], images[:2]))
    np.testing.assert_array_equal(found.differences, three.differences)
    assert not np.array_equal(
        found.differences, two.differences
    )  # of the last of these images a part is enough


def test_images_that_are_taken_in_pieces_give_the_same(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    model = made("vq-ema").eval()
    model.latents.place(model.encoder(torch.from_numpy(images)).detach()[:, :20])  # codes that are used
    whole = patches.take(model, images)
    assert (whole.share > 0).all()
    monkeypatch.setattr(type(model.trial), "images_at_once", 20)  # and of patches 4
    found = patches.take(model, images)
    np.testing.assert_array_equal(found.codes, whole.codes)
    np.testing.assert_allclose(found.differences, whole.differences, atol=1e-4)


def test_continuous_latent_variables_have_no_codes():
    with pytest.raises(DvqError, match="gaussian"):
        patches.take(made("gaussian"), np.zeros((1, 32, 32, 3), np.uint8))


def two(code):
    """Two codebooks, the second with one code that is used to speak of."""
    share = np.array([[0.75, 0.25], [1.0, 0.009]])
    differences = np.zeros((2, 2, 12, 12, 3), np.float32)
    differences[0] = np.array([-10, 30])[:, None, None, None]
    differences[1, 0] = code
    return Patches(np.array([[1, 0], [0, 1]]), share, differences)


def test_a_row_a_codebook_has_its_own_contrast_and_each_used_code_its_share():
    figure = patches.of_trial(two(0.5), "a trial")
    said = words(figure)
    assert {"a trial", "75.0%", "25.0%", "100.0%", "k = 1, ×4.2", "k = 2, ×127.0"} <= set(said)
    assert "0.9%" not in said
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert [shown[10, 5, 0], shown[10, 19, 0], shown[27, 5, 0]] == [85, 255, 191]
    assert (shown[27, 19] == 255).all(), "a code that is hardly ever used has no picture"


def test_a_sweep_shows_the_first_codebooks_of_each_setting_s_first_seed():
    results = [*sweep(sizes=(16,), seeds=(0, 1)), result("gaussian", None, 4, 0, 5.0)]
    found = {one["name"]: two(n + 1) for n, one in enumerate(results[:4])}
    figure = patches.of_sweep(results, found)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["GS-Soft, C = 16, K = 4", "VQ-VAE, EMA, C = 16, K = 4"]
    assert [axes.get_yticklabels()[1].get_text() for axes in figure.axes] == ["k = 2, ×127.0", "k = 2, ×42.3"]


def test_the_picture_can_be_written(tmp_path):
    style.save_png(patches.of_trial(two(1), "a trial"), tmp_path / "codes.png")
    assert (tmp_path / "codes.png").stat().st_size > 1000
