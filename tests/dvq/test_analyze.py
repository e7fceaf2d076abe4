"""Codebooks whose principal components are known in closed form."""

import numpy as np
import pytest

from dvq import DvqError
from dvq.analyze import Analysis, analyze, components

K, C, D = 3, 40, 7


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def rank(rng, r):
    """Codebooks (K, C, D) in an r-dimensional affine subspace each, away from the origin."""
    return rng.normal(size=(K, C, r)) @ rng.normal(size=(K, r, D)) + 5 * rng.normal(size=(K, 1, D))


@pytest.mark.parametrize("r", [1, 2, 5])
def test_a_codebook_of_rank_r_is_explained_by_r_components(rng, r):
    explained = analyze(rank(rng, r)).explained
    assert explained.shape == (K, D + 1)
    assert (explained[:, 0] == 0).all()
    assert explained[:, r:] == pytest.approx(1)
    assert (explained[:, r - 1] < 1 - 1e-4).all()
    assert (np.diff(explained) >= 0).all()


def test_known_variances(rng):
    directions = np.linalg.qr(rng.normal(size=(D, D)))[0]
    ends = np.concatenate([np.diag([3.0, 2, 1, 0, 0, 0, 0]), -np.diag([3.0, 2, 1, 0, 0, 0, 0])])  # (14, D)
    found = analyze((ends @ directions + 4)[None])
    assert found.explained[0, :4] == pytest.approx([0, 9 / 14, 13 / 14, 1])
    assert found.projections[0] ** 2 == pytest.approx(ends[:, :3] ** 2)  # up to sign
    assert found.projections[0, 0] * found.projections[0, 7] == pytest.approx([-9, 0, 0])
    norms = np.linalg.norm(ends @ directions + 4, axis=1)
    assert found.norms[0] == pytest.approx(norms)
    assert found.summary()["norm_mean"] == pytest.approx(norms.mean())
    assert components(found.explained).tolist() == [3]
    assert found.summary()["explained_by_3_mean"] == pytest.approx(1)
    assert components(found.explained, 0.9).tolist() == [2]
    assert components(np.array([[0, 0.5, 0.75, 1]]), 0.75).tolist() == [2]


def test_weighting_by_usage_is_the_analysis_of_the_used_codes_repeated(rng):
    codes, usage = rng.normal(size=(1, C, D)), rng.integers(0, 4, (1, C))
    repeated = analyze(np.repeat(codes, usage[0], axis=1))
    found = analyze(codes, usage)
    assert (usage == 0).any()
    assert found.explained_weighted == pytest.approx(repeated.explained)
    assert found.explained != pytest.approx(repeated.explained, abs=1e-3)
    assert analyze(codes).explained_weighted == pytest.approx(found.explained)


def test_dead_codes_change_the_components_of_all_codes_only(rng):
    codes, usage = rank(rng, 2), np.ones((K, C), int)
    codes[:, : C // 2] = rng.normal(size=(K, C // 2, D)) * 9
    usage[:, : C // 2] = 0
    summary = analyze(codes, usage).summary()
    assert min(summary["components_95"]) > 4
    assert max(summary["components_95_weighted"]) <= 2
    assert summary["components_95_mean"] == np.mean(summary["components_95"])
    assert summary["explained_by_3_weighted_mean"] == pytest.approx(1)
    assert summary["explained_by_3_mean"] < 0.9


def test_the_sign_is_decided_by_the_largest_entry(rng):
    direction = np.array([0.1, -0.9, 0.2, 0, 0, 0, 0])
    codes = (rng.normal(size=(C, 1)) * direction)[None]
    along = codes[0] @ -direction  # the entry of largest magnitude made positive
    for sign in (1, -1):
        projection = analyze(sign * codes).projections[0, :, 0]
        assert np.corrcoef(projection, sign * along)[0, 1] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(2, 5, 2), (2, 2, 6), (1, 3, 1)])
def test_fewer_dimensions_or_codes_than_three_components(rng, shape: tuple[int, int, int]):
    found = analyze(rng.normal(size=shape))
    assert found.projections.shape == (*shape[:2], 3)
    spanned = min(shape[2], shape[1] - 1)
    assert found.projections[..., spanned:] == pytest.approx(0)
    assert (np.abs(found.projections[..., :spanned]).max(axis=1) > 0.01).all()
    assert found.explained[:, -1] == pytest.approx(1)
    assert found.summary()["explained_by_3_mean"] == pytest.approx(1)


def test_no_variance_needs_no_component(rng):
    constant = np.repeat(rng.normal(size=(1, 1, D)).astype(np.float32), C, axis=1)
    found = analyze(constant)
    assert (found.explained == 1).all()
    assert found.summary()["components_95"] == [0]
    one_used = analyze(rng.normal(size=(1, C, D)), np.eye(1, C, dtype=int))
    assert (one_used.explained_weighted == 1).all()
    assert one_used.summary()["components_95_weighted"] == [0]
    assert one_used.summary()["components_95"][0] > 3


def test_a_small_variance_far_from_the_origin_is_no_rounding(rng):
    assert analyze(rank(rng, 2) * 1e-3 + 1).explained[:, 0] == pytest.approx(0)


def test_what_cannot_be_analyzed():
    codes = np.zeros((1, 4, 2))
    with pytest.raises(DvqError, match="NaN"):
        analyze(codes + np.nan)
    with pytest.raises(ValueError, match=r"\(K, C, D\)"):
        analyze(codes[0])
    for usage in ([[1, 2]], [[0, 0, 0, 0]], [[1, 1, 1, -1]]):
        with pytest.raises(ValueError, match="usage"):
            analyze(codes, usage)


def test_save_and_load(rng, tmp_path):
    saved = analyze(rank(rng, 2), rng.integers(1, 9, (K, C)))
    saved.save(tmp_path / "analysis.npz")
    loaded = Analysis.load(tmp_path / "analysis.npz")
    for name, array in vars(saved).items():
        np.testing.assert_array_equal(getattr(loaded, name), array)
    assert loaded.summary() == saved.summary()


@pytest.mark.parametrize("damage", ["empty", "cut", "objects", "others"])
def test_a_damaged_file_is_told_in_a_sentence(damage, tmp_path):
    path = tmp_path / "analysis.npz"
    analyze(np.random.default_rng(0).normal(size=(2, 4, 3))).save(path)
    whole = path.read_bytes()
    if damage in ("empty", "cut"):
        path.write_bytes(whole[: len(whole) // 2 if damage == "cut" else 0])
    else:
        np.savez(path, **{"codes": np.array([{}]) if damage == "objects" else np.zeros(1)})
    with pytest.raises(DvqError, match=r"analysis\.npz is damaged \(.*\); remove its folder"):
        Analysis.load(path)
