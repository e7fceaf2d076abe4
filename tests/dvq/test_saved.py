"""A trained model as one uses it: what it takes and gives, and what is wrong in one sentence."""

import json
import os
import re
import resource
import shutil
import subprocess
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dvq
from dvq import DvqError, provenance, saved
from dvq.config import trial
from dvq.evaluate import evaluate
from dvq.latents import per_image
from dvq.model import Model
from dvq.provenance import commit
from dvq.saved import publish, save
from dvq.trial import Trial
from tests.sizes import taken

SIZE = {"data": "cifar10-sample", "features": 8, "num_latents": 2, "code_dim": 4}
IMAGES = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def model(estimator="gs-soft", **fields):
    torch.manual_seed(0)
    return Model(
        trial({"estimator": estimator, **taken(estimator, {**SIZE, "num_codes": 5}), **fields})
    ).eval()


@pytest.fixture
def folder(tmp_path):
    save(model(), tmp_path / "trial/model")
    return tmp_path / "trial/model"


def test_arrays_and_tensors_give_the_same() -> None:
    one = model()
    codes = one.encode(IMAGES, one.generator(0))
    assert codes.shape == (3, 8, 8, 2)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, one.encode(IMAGES.numpy(), one.generator(0)))
    assert torch.equal(one.decode(codes), one.reconstruct(IMAGES, one.generator(0)))
    assert torch.equal(one.decode(codes), one.decode(codes.numpy().astype(np.uint8)))
    turned = one.encode(IMAGES.flip(-1), one.generator(0))
    assert torch.equal(one.encode(IMAGES.numpy()[..., ::-1], one.generator(0)), turned)
    assert one.bits_per_dim(IMAGES).shape == (3,)
    assert one.sample(2).shape == (2, 32, 32, 3)


def test_draws_are_others_in_each_call_and_torchs_own_to_repeat() -> None:
    one = model()
    torch.manual_seed(3)
    first, second = one.encode(IMAGES), one.encode(IMAGES)
    assert not torch.equal(first, second), "calls in a loop must not share their noise"
    torch.manual_seed(3)
    assert torch.equal(one.encode(IMAGES), first)
    assert torch.equal(one.encode(IMAGES), second)


def test_the_posterior_is_what_codes_are_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model()
    found = one.log_posterior(IMAGES)
    assert found.shape == (3, 8, 8, 2, 5)
    q = found.exp()
    torch.testing.assert_close(q.sum(-1), torch.ones(3, 8, 8, 2))
    generator = one.generator(0)
    drawn = torch.stack([one.encode(IMAGES, generator) for _ in range(300)])
    often = torch.nn.functional.one_hot(drawn, 5).double().mean(0)
    error = (q * (1 - q) / 300).sqrt() + 1e-3
    assert ((often - q).abs() / error).square().mean() < 1.2
    with torch.no_grad():
        rate = (q * (found - one.latents.log_prior())).sum((1, 2, 3, 4))  # KL(q ‖ p)
        sample = one.latents.sample(one.encoder(IMAGES), generator)
    torch.testing.assert_close(rate, per_image(sample.rate, 3))
    monkeypatch.setattr(Trial, "images_at_once", 2)
    torch.testing.assert_close(one.log_posterior(IMAGES.numpy()), found)
    with pytest.raises(DvqError, match="vq-ema model has no probabilities of codes"):
        model("vq-ema").log_posterior(IMAGES)
    with pytest.raises(DvqError, match="gaussian model has no codes"):
        model("gaussian").log_posterior(IMAGES)


def test_an_image_is_the_mean_of_its_distribution_rounded_and_a_sample_is_the_priors() -> None:
    one = model()
    with torch.no_grad():
        one.latents.prior_logits[:, 3] = 50.0
        drawn = one.latents.prior_sample(64, torch.Generator().manual_seed(0))
        assert torch.equal(drawn, one.latents.codebook[:, 3:4].expand(-1, 64, -1))
        one.decoder.head.weight.zero_()
        one.decoder.head.bias.fill_(-1e9).view(3, 256)[:, 1:3] = torch.tensor([1.0, 3.0]).log()  # mean 1.75
    assert one.sample(1).unique().tolist() == [2]


@pytest.mark.parametrize("estimator", ["gs-soft", "vq-ema", "gaussian"])
def test_bits_per_dim_of_images_are_those_of_evaluation(estimator) -> None:
    one = model(estimator)
    found = evaluate(one, IMAGES.numpy())["bits_per_dim"]
    assert one.bits_per_dim(IMAGES, one.generator(0)).mean().item() == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("estimator", ["vq-ema", "fsq"])
def test_many_images_are_taken_in_pieces(estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    one = model(estimator)
    whole = (
        one.encode(IMAGES),
        one.decode(one.encode(IMAGES)),
        one.reconstruct(IMAGES),
        one.bits_per_dim(IMAGES),
    )
    monkeypatch.setattr(Trial, "images_at_once", 2)
    taken, decode = [], one.decoder.forward
    monkeypatch.setattr(one.decoder, "forward", lambda x: taken.append(x.shape[1] // 64) or decode(x))
    pieces = (
        one.encode(IMAGES),
        one.decode(one.encode(IMAGES)),
        one.reconstruct(IMAGES),
        one.bits_per_dim(IMAGES),
    )
    assert taken == [2, 1, 2, 1]
    for right, found in zip(whole, pieces, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1)
    assert torch.equal(whole[0], pieces[0])


@pytest.mark.parametrize("method", ["encode", "reconstruct", "bits_per_dim"])
@pytest.mark.parametrize(
    ("images", "told"),
    [
        (IMAGES / 255, r"float32 \(3, 32, 32, 3\): give uint8 .*round"),
        (IMAGES.numpy() / 255, r'float64 .*round\(\).astype\("uint8"\)'),
        (IMAGES.float(), r"float32 .*x.byte\(\), if its values go from 0 to 255"),
        (IMAGES.long(), "int64"),
        (IMAGES.permute(0, 3, 1, 2), "channels first: x.permute"),
        (IMAGES.numpy()[0].transpose(2, 0, 1), r"channels first: x.transpose\(1, 2, 0\)\[None\]"),
        (IMAGES[0], r"one image: x\[None\]"),
        (IMAGES[:0], r"\(0, 32, 32, 3\): give [^;]*$"),
        (torch.zeros(1, 64, 64, 3, dtype=torch.uint8), r"\(1, 64, 64, 3\)"),
        ("cat.png", "are a str: give a tensor or a numpy array"),
    ],
)
def test_other_images_are_refused(method, images, told) -> None:
    with pytest.raises(DvqError, match=f"^images are.*{told}|^images {told}"):
        getattr(model(), method)(images)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda codes: codes + 5, "this model's go from 0 to 4"),
        (lambda codes: codes - 9, "this model's go from 0 to 4"),
        (lambda codes: codes.float(), "give integers"),
        (lambda codes: codes[..., :1], r"give \(B, 8, 8, 2\)"),
        (lambda codes: codes[:, :4], r"give \(B, 8, 8, 2\)"),
    ],
)
def test_other_codes_are_refused(change, told) -> None:
    one = model()
    with pytest.raises(DvqError, match=told):
        one.decode(change(one.encode(IMAGES)))


@pytest.mark.parametrize("estimator", ["gs-soft", "fsq"])
def test_vectors_are_those_of_the_codes_and_are_decoded_as_the_codes_are(estimator) -> None:
    one = model(estimator)
    codes = one.encode(IMAGES)
    vectors = one.vectors(codes.numpy())
    assert vectors.shape == (3, 8, 8, 2, one.trial.code_dim)
    assert torch.equal(vectors[2, 1, 5, 1], one.latents.codebook[1, codes[2, 1, 5, 1]])
    assert torch.equal(one.decode_vectors(vectors), one.decode(codes))
    assert torch.equal(one.decode_vectors(vectors.double().numpy()), one.decode(codes))
    for other in (codes, vectors[..., :1], vectors.flatten(1, 2), vectors.long()):
        with pytest.raises(
            DvqError, match=r"give floating-point numbers \(B, 8, 8, 2, \d\), as vectors\(codes\)"
        ):
            one.decode_vectors(other)


def test_vectors_of_continuous_latent_variables_are_decoded() -> None:
    one = model("gaussian")
    z = one.latents.sample(one.encoder(IMAGES), one.generator(0)).vectors  # (K, N, D)
    vectors = z.transpose(0, 1).unflatten(0, (3, 8, 8)).detach()
    assert torch.equal(one.decode_vectors(vectors), one.reconstruct(IMAGES, one.generator(0)))


def test_a_continuous_model_has_no_codes() -> None:
    for call in (lambda one: one.encode(IMAGES), lambda one: one.decode(IMAGES[:, :8, :8, :2])):
        with pytest.raises(DvqError, match="gaussian model has no codes"):
            call(model("gaussian"))


@pytest.mark.parametrize("n", [0, -1, 2.5])
def test_a_number_of_samples_is_whole_and_positive(n) -> None:
    with pytest.raises(DvqError, match="whole number of at least 1"):
        model().sample(n)


def _flip(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)
        file.seek(-100, 2)
        file.write(bytes([byte[0] ^ 1]))


def _other_size(folder, **sizes):
    fields = json.loads((folder / "trial.json").read_text())
    (folder / "trial.json").write_text(json.dumps({**fields, **(sizes or {"num_codes": 6})}))


def _other_type(folder, kind):
    weights = {name: tensor.to(kind) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"sha256": "0"})


DAMAGE = {
    "a flipped bit": (_flip, "SHA-256"),
    "cut short": (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "damaged"),
    "no JSON": (lambda folder: (folder / "trial.json").write_text('{"a":'), "damaged"),
    "a list": (lambda folder: (folder / "trial.json").write_text("[1]"), "holds no trial"),
    "nested without end": (lambda folder: (folder / "trial.json").write_text("[" * 100_000), "damaged"),
    "another size": (_other_size, "another network"),
    "no size at all": (
        lambda folder: _other_size(folder, num_latents=2**31 - 1, code_dim=2**31 - 1),
        "cannot be made",
    ),
    "bfloat16": (lambda folder: _other_type(folder, torch.bfloat16), "another network"),
    "float8": (lambda folder: _other_type(folder, torch.float8_e5m2), "another network"),
    "float64": (lambda folder: _other_type(folder, torch.float64), "another network"),
    "another estimator": (
        lambda folder: _other_size(folder, estimator="mine"),
        "unknown estimator 'mine'; load the model with the code that trained it, its estimator in dvq.estimators",
    ),
    "another field": (
        lambda folder: _other_size(folder, decay=1),
        r"trial\.json: .* has no 'decay'; load the model with the code that trained it",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_refused(folder, damage) -> None:
    one = dvq.load(folder)
    assert torch.equal(one.encode(IMAGES, one.generator(0)), model().encode(IMAGES, one.generator(0)))
    act, told = DAMAGE[damage]
    act(folder)
    with pytest.raises(DvqError, match=told) as caught:
        dvq.load(folder)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_encoder_says_so_and_its_file_is_whole(tmp_path) -> None:
    made = model()
    made.encoder = torch.nn.Linear(3, 4)
    save(made, tmp_path)
    with pytest.raises(DvqError, match=r"another network .* encoder or decoder was replaced") as caught:
        dvq.load(tmp_path)
    assert "damaged" not in str(caught.value)
    made.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_a_trials_folder_is_told_from_its_model(folder) -> None:
    shutil.copy(folder / "trial.json", folder.parent)
    with pytest.raises(DvqError, match=f"model.safetensors is missing; give {folder}$"):
        dvq.load(folder.parent)
    with pytest.raises(DvqError, match=r"no model here: trial\.json is missing"):
        dvq.load(folder / "trial.json")


def test_a_model_is_on_the_disk_whole_before_it_has_its_name(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut leaves a trial that counts as trained, and whose model is damaged."""
    synced = {}

    def sync(descriptor):
        file = os.fstat(descriptor)
        synced[file.st_ino] = (file.st_size, (tmp_path / "model").exists())

    monkeypatch.setattr(os, "fsync", sync)
    publish(model(), {"steps": 1}, tmp_path)
    files = [path.stat() for path in (tmp_path / "model").iterdir()]
    assert [synced[file.st_ino] for file in files] == [(file.st_size, False) for file in files]
    assert len(files) == 3
    assert synced[tmp_path.stat().st_ino][1]


def test_without_git_the_version_of_the_code_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() == "unknown"


def test_another_repository_around_the_code_is_not_its_version(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment that dvq is installed in often lies in a repository of its user's."""
    code = tmp_path / "environment" / "provenance.py"
    code.parent.mkdir()
    code.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "mine"], check=True)
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert commit() == "unknown"
    subprocess.run([*git, "add", "."], check=True)
    told = [commit()]
    code.write_text("1")
    told.append(commit())
    (tmp_path / "components").mkdir()
    for name in ("new.py", "../components/new.py", "notes.txt"):
        (code.parent / name).touch()
        told.append(commit())
    (code.parent / ".#new.py").symlink_to("me@host.1")  # Emacs' lock
    told.append(commit())
    assert all(re.fullmatch(r"[0-9a-f]{12}-dirty-[0-9a-f]{8}", one) for one in told)
    assert len(set(told)) == 4, "by the changes, and by the modules that git does not know"
    assert told[-1] == told[-2] == told[-3], "and by nothing else"


def test_a_bug_in_an_estimator_is_no_damage(folder, monkeypatch) -> None:
    monkeypatch.setattr("dvq.saved.Model", lambda _: len(None))
    with pytest.raises(TypeError):
        dvq.load(folder)


def test_a_model_that_finds_no_room_is_not_there(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # write() fails as it does on a full disk
    try:
        with pytest.raises(DvqError, match=r"the model cannot be written to .*; when there is room"):
            publish(model(), {}, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())


def test_an_address_whose_package_does_not_load_is_one_sentence(monkeypatch):
    """As where a module of one's own has the package's name."""
    found = EntryPoint("models", "no_such_package.tracking:download", "dvq.load")
    monkeypatch.setattr(saved, "entry_points", lambda **_: [found])
    with pytest.raises(DvqError, match=r"models:/m-1: .*no_such_package\.tracking:download, does not load"):
        dvq.load("models:/m-1")
