"""Images of one's own: checked, named by their content, prepared like CIFAR-10."""

import contextlib
import os

import numpy as np
import pytest
import torch

import dvq
from dvq import DvqError, config, data, evaluate, own, pictures, train
from dvq.fingerprints import fingerprint


def images(number, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, 32, 32, 3), np.uint8)


@pytest.fixture
def birds(tmp_path):
    """A file of 60 training images, of kind 0 and then of kind 1, and 8 test images."""
    path = tmp_path / "birds.npz"
    labels = np.repeat([0, 1], 30)
    np.savez(path, train_images=images(60), train_labels=labels, test_images=images(8, 1))
    return path


def test_the_name_is_the_files_and_the_contents(birds, tmp_path):
    name = own.name(str(birds))
    assert name == f"birds@{fingerprint(own.read(str(birds)))[:16]}"
    again = tmp_path / "again" / "birds.npz"
    again.parent.mkdir()
    with np.load(birds) as file:
        arrays = dict(file)
    np.savez_compressed(again, **arrays)
    assert own.name(str(again)) == name
    arrays["test_images"][0, 0, 0, 0] ^= 1
    np.savez(again, **arrays)
    assert own.name(str(again)) != name


def test_what_is_prepared_are_the_files_images(birds, tmp_path):
    name = own.name(str(birds))
    data.prepare(name, str(birds), tmp_path / "prepared")
    found = data.load(tmp_path / "prepared")
    assert (found.info["name"], found.info["label"]) == (name, name)
    assert [found.info[half] for half in ("train", "tune", "test")] == [60, 6, 8]
    with np.load(birds) as file:
        ours = {image.tobytes(): label for image, label in zip(*found.training("test"), strict=True)}
        pairs = zip(file["train_images"], file["train_labels"], strict=True)
        assert ours == {image.tobytes(): label for image, label in pairs}
        np.testing.assert_array_equal(found.evaluation("test")[0], file["test_images"])
    assert found.evaluation("test")[1].tolist() == [0] * 8
    assert len(set(found.evaluation("tune")[1].tolist())) == 2  # both kinds are held out of a sorted file
    assert data.is_prepared(name, tmp_path / "prepared")
    assert not data.is_prepared("birds@0123456789abcdef", tmp_path / "prepared")


def test_a_trial_is_of_the_images_that_its_data_name(birds, tmp_path):
    name = own.name(str(birds))
    data.prepare(name, str(birds), tmp_path / "prepared")
    found = data.load(tmp_path / "prepared")
    point = {
        "estimator": "gs-soft",
        "data": name,
        "features": 4,
        "num_latents": 2,
        "num_codes": 4,
        "steps": 2,
    }
    trial = config.trial(point)
    train.train(trial, found, tmp_path / "trial")
    model = dvq.load(tmp_path / "trial" / "model")
    numbers = evaluate.evaluate(model, *found.evaluation("test")[:1], training=found.training("test")[0])
    assert numbers["images"] == 8
    assert np.isfinite(numbers["bits_per_dim"])
    other = config.trial(point | {"data": "birds@0123456789abcdef"})
    assert other.key() != trial.key()
    renamed = config.trial(point | {"data": name.replace("birds", "eagles")})
    assert renamed.key() == trial.key()  # the same images, whatever their file is called


@pytest.mark.parametrize(
    ("point", "shape"),
    [
        ({"estimator": "gs-soft", "probe_draws": 2, "bound_samples": 2}, (28, 28, 1)),
        ({"estimator": "vq-ema", "code_dim": 4, "codebook_init": "kmeans"}, (12, 20, 3)),
        ({"estimator": "vimco", "output_head": "transposed"}, (4, 8, 1)),
        ({"estimator": "gaussian"}, (64, 64, 3)),
    ],
)
def test_images_of_another_shape_are_trained_on_and_evaluated(point, shape, tmp_path):
    """And bits/dim are of these images' sub-pixels: a head of zeros costs 8, whatever the shape."""
    source, draw = tmp_path / "digits.npz", np.random.default_rng(0)
    train_images, test_images = (draw.integers(0, 256, (n, *shape), np.uint8) for n in (40, 5))
    np.savez(source, train_images=train_images, test_images=test_images)
    name = own.name(str(source))
    assert name.startswith("digits@" + "x".join(map(str, shape)) + "-")
    data.prepare(name, str(source), tmp_path / "prepared")
    found = data.load(tmp_path / "prepared")
    assert len(found.info["mean"]) == shape[-1]
    sizes = {"features": 4, "num_latents": 2, "steps": 2, "evaluate_every": 2, "batch_size": 8}
    codes = {} if point["estimator"] == "gaussian" else {"num_codes": 4}
    trial = config.trial({"data": name, **sizes, **codes, **point})
    assert trial.grid == (shape[0] // 4, shape[1] // 4)
    train.train(trial, found, tmp_path / "trial")
    model = dvq.load(tmp_path / "trial" / "model")
    judged = found.evaluation("test")[0]
    assert model.reconstruct(judged).shape == judged.shape
    pictures.of_trial(pictures.take(model, judged), "digits").savefig(tmp_path / "pictures.png")
    if codes:
        z = model.encode(judged)
        assert z.shape == (5, *trial.grid, 2)
        assert model.decode(z).shape == judged.shape
        if shape[-1] == 1:
            with pytest.raises(DvqError, match=r"; for gray images without channels: x\[..., None\]"):
                model.encode(judged[..., 0])
        with pytest.raises(DvqError, match=r"; for channels first: x\.transpose"):
            model.encode(judged.transpose(0, 3, 1, 2))
    with torch.no_grad():
        for parameter in (model.decoder.head or model.decoder.last).parameters():
            parameter.zero_()
    numbers = evaluate.evaluate(model, judged, training=found.training("test")[0])
    assert numbers["distortion"] == pytest.approx(8)
    assert len(numbers["ledger"]["channels"]) == shape[-1]
    assert model.bits_per_dim(judged).mean().item() == pytest.approx(numbers["bits_per_dim"], abs=1e-4)
    other = name.replace(f"@{shape[0]}x", f"@{shape[0] + 4}x")
    with pytest.raises(DvqError, match="the trial is of"):
        found.check(config.trial({**point, "data": other}))


def test_large_images_go_through_the_network_in_smaller_pieces():
    """Memory is that of 100 of CIFAR-10's."""
    sizes = {"64x64x3": 25, "28x28x1": 130, "128x128x3": 6}
    for shape, count in sizes.items():
        one = config.trial({"estimator": "gs-soft", "data": f"birds@{shape}-0123456789abcdef"})
        assert one.images_at_once == count
    assert config.trial({"estimator": "gs-soft"}).images_at_once == 100


@pytest.mark.parametrize(
    "wrong", ["birds", "Birds@0123456789abcdef", "birds@0123", "birds.npz", "birds@8x8-0123456789abcdef"]
)
def test_a_sweep_with_another_name_says_how_to_get_one(wrong):
    with pytest.raises(
        DvqError, match=r"known are cifar10, cifar10-sample; for images of your own, make data DATA="
    ):
        config.trial({"estimator": "gs-soft", "data": wrong})


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"train_images": images(20)}, "there is no test_images in it; give train_images and test_images"),
        ({"train_images": images(20), "test_imges": images(2)}, "'test_imges' is none of its arrays"),
        (
            {"train_images": images(20) / 255, "test_images": images(2)},
            r"train_images is float64 \(20, 32, 32, 3\).*; .* 1: \(train_images \* 255\)\.round\(\)\.astype\(\"uint8",
        ),
        (
            {"train_images": images(20) > 9, "test_images": images(2)},
            r"train_images is bool .*; for numbers from 0 to 1: \(train_images \* 255\)",
        ),
        ({"train_images": images(19), "test_images": images(2)}, "at least 20 of them"),
        ({"train_images": images(20), "test_images": images(1)}, "at least 2 of them"),
        (
            {"train_images": images(20), "test_images": images(2)[:, :28]},
            "train_images are of 32×32×3, test_images of 28×32×3; give one size",
        ),
        (
            {"train_images": images(20)[..., 0], "test_images": images(2)[..., 0]},
            r"train_images is uint8 \(20, 32, 32\).*; for gray images without channels: train_images\[..., None\]",
        ),
        (
            {"train_images": images(20)[:, :0], "test_images": images(2)[:, :0]},
            r"train_images is uint8 \(20, 0, 32, 3\), ",
        ),
        (
            {"train_images": images(20) // 128, "test_images": images(2)},
            r"train_images has no value above 1; .* train_images \* np\.uint8\(255\) if they are binary",
        ),
        (
            {"train_images": images(20)[:, :30], "test_images": images(2)[:, :30]},
            "images of 30×32: the network halves height and width twice; make them multiples of 4, 128 at most",
        ),
        (
            {"train_images": images(20).transpose(0, 3, 1, 2), "test_images": images(2)},
            r"\(20, 3, 32, 32\), channels first; .* last, train_images\.transpose\(0, 2, 3, 1\)",
        ),
        (
            {"train_images": images(20)[..., :2], "test_images": images(2)[..., :2]},
            r"make them 1 \(gray\) or 3",
        ),
        (
            {"train_images": images(20), "test_images": images(2), "test_labels": np.zeros(3, int)},
            r"test_labels is int64 \(3,\); give 2 integers",
        ),
        (
            {"train_images": images(20), "test_images": images(2), "train_labels": np.full(20, 256)},
            "give 20 integers from 0 to 255, or no labels",
        ),
        (
            {"train_images": images(20), "test_images": images(2), "train_labels": np.full(20, -1)},
            "give 20 integers from 0 to 255, or no labels",
        ),
        (
            {"train_images": np.array([images(1), None], object)},
            "this is no whole file that numpy.savez writes",
        ),
    ],
)
def test_a_wrong_file_is_one_sentence(arrays, sentence, tmp_path):
    np.savez(tmp_path / "birds.npz", **arrays)
    with pytest.raises(DvqError, match=sentence):
        own.name(str(tmp_path / "birds.npz"))


def test_no_file_of_images_is_one_sentence(birds, tmp_path):
    (tmp_path / "text.npz").write_text("birds")
    np.save(tmp_path / "plain.npy", images(2))
    (tmp_path / "half.npz").write_bytes(birds.read_bytes()[:9000])
    for name in ("text.npz", "plain.npy", "half.npz"):
        with pytest.raises(DvqError, match=r"this is no whole file that numpy.savez writes; give one with"):
            own.name(str(tmp_path / name))
    with pytest.raises(DvqError, match=r"nowhere.npz: cannot be read \(No such file or directory\)"):
        own.name(str(tmp_path / "nowhere.npz"))
    with pytest.raises(DvqError, match="images of your own come from a file; fetch it"):
        own.name("s3://bucket/birds.npz")
    with pytest.raises(DvqError, match="give the path alone, without file://"):
        own.name(f"file://{birds}")
    with pytest.raises(DvqError, match=r"name the file of your images, DATA=file.npz"):
        own.name("")
    with pytest.raises(DvqError, match=r"call it my-birds.npz"):
        own.name(str(birds.rename(tmp_path / "My birds.npz")))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "birds.npz")
    writer = os.open(tmp_path / "birds.npz", os.O_RDWR)  # so that a reader gets something, and this test ends
    os.write(writer, b"birds" * 20)
    with pytest.raises(DvqError, match=r"birds.npz: cannot be read \(it is a pipe; give a file\)"):
        own.name(str(tmp_path / "birds.npz"))
    os.close(writer)


def test_images_beyond_the_memory_are_one_sentence(birds, monkeypatch):
    def load(_):
        raise MemoryError

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(DvqError, match=r"birds.npz: its arrays do not fit into memory; give fewer images"):
        own.name(str(birds))


def test_a_damaged_file_is_one_sentence(birds, tmp_path):
    """Wherever the damage is: zip, zlib and numpy each say it in another way, if at all."""
    with np.load(birds) as file:
        np.savez_compressed(tmp_path / "packed.npz", **file)
    for path in (birds, tmp_path / "packed.npz"):
        whole, where = bytearray(path.read_bytes()), np.random.default_rng(0)
        name = own.name(str(path))
        for place in [5, 31, 60, 90, 120, *where.integers(0, len(whole), 15)]:
            whole[place] ^= 255
            path.write_bytes(whole)
            with contextlib.suppress(DvqError):
                assert own.name(str(path)) == name  # a field that nobody reads, as the time of writing
            whole[place] ^= 255


@pytest.mark.parametrize("wrong", ["cifar-10", "birds", "birds@../../x", "birds@0123456789abcdeF"])
def test_images_that_nothing_is_called_are_refused(wrong, birds, tmp_path):
    data.prepare("cifar10-sample", "", tmp_path / "sample")
    with pytest.raises(DvqError, match=f"images '{wrong}': known are cifar10, cifar10-sample"):
        data.prepare(wrong, str(birds), tmp_path / "sample")
    with pytest.raises(DvqError, match="known are cifar10"):
        data.prepare(wrong, str(birds), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_images_than_those_named_are_refused(birds, tmp_path):
    name = "birds@0123456789abcdef"
    with pytest.raises(DvqError, match=f"these are not the images {name}, but {own.name(str(birds))}"):
        data.check_source(name, str(birds))
    with pytest.raises(DvqError, match=f"the store has no images {name}; give the file"):
        data.check_source(name, "")
    with pytest.raises(
        DvqError, match=f"the images are {own.name(str(birds))}; give the file that make data"
    ):
        data.prepare(name, str(birds), tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()
    data.check_source(own.name(str(birds)), str(birds))


def test_the_order_of_the_training_images_stays_what_it_is(birds):
    """Else the fingerprint of a file would be another with another numpy."""
    given, found = images(60), own.read(str(birds))["train_images"]
    order = [next(n for n, image in enumerate(given) if np.array_equal(image, one)) for one in found[:8]]
    assert order == [26, 35, 59, 28, 11, 2, 34, 58]


def test_images_of_both_halves_are_counted():
    """Each test image, however often it is a training image."""
    train_images = images(20)[[*range(20), 4, 4]]
    assert own.shared(train_images, np.concatenate([images(2, 1), train_images[[3, 3, 4]]])) == 3
