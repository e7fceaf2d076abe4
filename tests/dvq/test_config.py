"""Trials and sweeps from text: what is right comes through, what is wrong is one sentence."""

import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, model_validator

import dvq
from dvq import DvqError, config
from dvq.config import overrides, point, trial
from dvq.estimators.gs_soft import GSSoft
from dvq.fingerprints import FINGERPRINTS
from dvq.sweep import Sweep, load_sweep
from dvq.trial import Discrete

GS = {"estimator": "gs-soft"}
ALIASES = "".join(
    f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}' if n else 'x'])}]\n" for n in range(9)
).encode()
"""ten to the ninth words"""


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "no estimator is named"),
        ({"estimator": "gs-sof"}, "unknown estimator 'gs-sof'; did you mean 'gs-soft'?"),
        ({**GS, "num_code": 3}, "gs-soft has no 'num_code'; did you mean 'num_codes'?"),
        (
            {**GS, "commitment": 1.0},
            "gs-soft has no 'commitment', which is a field of vq-ema, vq-loss; leave it out, or name it with",
        ),
        (
            {"estimator": "gaussian", "num_codes": 8},
            "gaussian has no 'num_codes', which is a field of gs-soft",
        ),
        ({**GS, "steps": True}, "steps = True: it takes a number or a word, not yes or no"),
        ({**GS, "num_codes": 1}, "num_codes = 1: input should be greater than or equal to 2"),
        ({**GS, "steps": -5}, "steps = -5"),
        ({**GS, "steps": 10**400}, "000: input should be less than 2147483648"),
        (
            {**GS, "num_codes": 10**21},
            "num_codes = 1000000000000000000000: input should be less than 2147483648",
        ),
        ({**GS, "kl_warmup": 2**31}, "kl_warmup = 2147483648: input should be less than 2147483648"),
        (
            {"estimator": "fsq", "levels": [1000] * 4},
            "the levels 1000, 1000, 1000, 1000 make 2147483648 codes",
        ),
        ({**GS, "steps": "1e3"}, "give a whole number, 1000; YAML takes 1e3 for a word"),
        ({**GS, "lr": 0.1}, "did you mean 'learning_rate'?"),
        ({**GS, "K": 2}, "did you mean 'num_latents'?"),
        ({"estimator": "vq-ema", "tau": 1}, "has no 'tau', temperature, which is a field of gs-soft"),
        ({**GS, "steps": "1.5e0"}, "steps = '1.5e0': give a whole number"),
        ({"estimator": "VQ-VAE"}, "did you mean 'vq-ema'?"),
        ({**GS, "probe_draws": 1}, "probe_draws = 1: one draw has no variance"),
        ({**GS, "learning_rate": "fast"}, "learning_rate = 'fast'"),
        ({**GS, "learning_rate": float("nan")}, "learning_rate = nan"),
        ({**GS, "data": "mnist"}, "data = 'mnist'"),
        (
            {**GS, "normalization": "none", "normalization_until": 5},
            "normalization: none has no statistics to fix; leave normalization_until out",
        ),
        (
            {"estimator": ["fsq", "vimco"]},
            "= ['fsq', 'vimco']: give one value; a list of values goes under 'grid'",
        ),
        ({**GS, "num_codes": [32, 64]}, "num_codes = [32, 64]: give one value; a list of values goes under"),
        ({**GS, "learning_rate": [1, 2]}, "learning_rate = [1, 2]: give one value; a list of values goes"),
        ({**GS, "prior": ["uniform"]}, "prior = ['uniform']: give one value; a list of values goes under"),
        ({**GS, "decay_after": [1]}, "decay_after = [1]: give one value; a list of values goes under"),
        ({"estimator": "fsq", "levels": []}, "levels = []: give at least one"),
        ({**GS, "normalization_until": 0}, "normalization_until = 0: input should be greater than"),
        (
            {**GS, "data": "dots@4x4x1-0123456789abcdef", "batch_size": 1},
            "a batch of one position has no variance to normalize by; raise batch_size",
        ),
    ],
)
def test_a_wrong_trial_is_one_sentence(values: dict[str, Any], says: str) -> None:
    with pytest.raises(DvqError) as caught:
        trial(values)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ({}, "no estimator is named"),
        ({"grid": {"estimator": ["gs-soft", "gs-soft"]}}, "stands in it twice; remove one"),
        ({"grid": {"estimator": ["gs-soft"], "log_every": [5, 6]}}, "seed=0' (log_every changes no number)"),
        (
            {
                "base": {"estimator": "gs-soft"},
                "include": [{"num_codes": 8}, {"num_codes": 8, "temperature": 0.5}],
            },
            "stands in it twice, once as 'num_codes=8 seed=0'; remove one",
        ),
        ({"base": {"grid": {"estimator": ["gs-soft"]}}}, "'grid' stands beside 'base' and 'grid', not in"),
        ({"base": {**GS, "seeds": [0, 1]}}, "'seeds' stands beside 'base' and 'grid', not in them"),
        ({"base": GS, "grid": {"seeds": [0, 1]}}, "'seeds' stands beside 'base' and 'grid', not in them"),
        ({"include": [{**GS, "description": "x"}]}, "'description' stands beside 'base' and 'grid', not in"),
        ({"base": {**GS, "name": "x"}}, "gs-soft has no 'name'"),
        ({"grid": {"estimator": ["gs-soft"], "seed": [1]}}, "name the seeds in 'seeds'"),
        ({"base": {"seed": 1}, "grid": {"estimator": ["gs-soft"]}}, "name the seeds in 'seeds'"),
        ({"grid": {"estimator": ["gs-soft"], "ema_decay": [0.9]}}, "gs-soft has no 'ema_decay'"),
        ({"grid": {"estimator": ["gs-soft"]}, "champion": "best"}, "split: tune"),
    ],
)
def test_a_wrong_sweep_is_one_sentence(sweep: dict[str, Any], says: str) -> None:
    with pytest.raises(DvqError, match="sweep 's'") as caught:
        Sweep(name="s", **sweep).trials()
    assert says in str(caught.value)


def test_a_sweep_of_a_base_alone_is_one_trial(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("base: {estimator: gs-soft}\ngrid:\n", encoding="utf-8")
    assert list(load_sweep(tmp_path / "one.yaml").trials()) == ["gs-soft-c512-k8-s0"]


def test_a_number_is_as_it_is_written(tmp_path: Path) -> None:
    """Not octal, as YAML has it."""
    text = "base: {estimator: gs-soft, steps: 0100, learning_rate: 00.5, features: 0x10, batch_size: 0}\n"
    text += "seeds: [-1, 0]"
    (tmp_path / "one.yaml").write_text(text)
    sweep = load_sweep(tmp_path / "one.yaml")
    assert (sweep.base["features"], sweep.base["batch_size"]) == (16, 0)
    one = trial({**sweep.base, "batch_size": 1})
    assert (one.steps, one.learning_rate) == (100, 0.5)
    assert sweep.seeds == [-1, 0]


def test_a_sweep_may_merge_and_set_anew(tmp_path: Path) -> None:
    text = "base: &b {estimator: gs-soft, steps: 5}\ninclude:\n- {<<: *b, steps: 7}\n"
    (tmp_path / "one.yaml").write_text(text)
    assert [one.steps for one in load_sweep(tmp_path / "one.yaml").trials().values()] == [7]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("binary.yaml", b"\xbb\xff", "no text in UTF-8"),
        ("My Sweep.yaml", b"grid: {estimator: [gs-soft]}", "call it my-sweep.yaml"),
        ("empty.yaml", b"", "expected 'base:' and 'grid:'"),
        ("broken.yaml", b"base:\n  data: x\n steps: 3\n", "line 3: not valid YAML"),
        ("near.yaml", b"grids: {}", "did you mean 'grid'?"),
        ("named.yaml", b"name: x", "leave 'name' out"),
        ("top.yaml", b"data: cifar10", "unknown key 'data'; put 'data' under 'base'"),
        ("top.yaml", b"estimator: [fsq, vimco]", "unknown key 'estimator'; put 'estimator' under 'grid'"),
        ("top.yaml", b"lr: 0.1", "unknown key 'lr'; put 'learning_rate' under 'base'"),
        ("top.yaml", b"seed: 1", "unknown key 'seed'; did you mean 'seeds'?"),
        (
            "told.yaml",
            b"grid: {description: x}",
            "'description' stands beside 'base' and 'grid', not in them",
        ),
        ("dots.yaml", b"champion: ..", "champion = '..': give letters or digits"),
        (
            "a" * 101 + ".yaml",
            b"",
            "call it " + 100 * "a" + ".yaml: small letters, digits and hyphens, 100 at",
        ),
        ("\u00fcn\u00ef-Gr\u00f6\u00dfe.yaml", b"", "call it uni-grosse.yaml"),
        ("UP.YAML", b"", "call it up.yaml"),
        ("null.yaml", b"\0\0", "not valid YAML: unacceptable character #x0000: special characters are not"),
        ("sixty.yaml", b"seeds: [1:30]", "seeds.0 = '1:30': give a whole number"),
        ("sixty.yaml", b"seeds: [1:30.5]", "seeds.0 = '1:30.5': give a whole number"),
        ("octal.yaml", b"seeds: [010]", "seeds.0 = '010': give a whole number"),
        (
            "twice.yaml",
            b"grid:\n  seed: [1]\n  seed: [2]",
            "line 3: not valid YAML: 'seed' stands there twice",
        ),
        ("deep.yaml", b"include:\n- {a: 1, a: 2}", "line 2: not valid YAML: 'a' stands there twice"),
        ("scalar.yaml", b"grid: {estimator: gs-soft}", "needs a list of at least one value, [gs-soft]"),
        ("colon.yaml", b"base:\n  data:cifar10", "with a space after the colon"),
        ("seed.yaml", b"seeds: 3", "seeds = 3: give a list, as in [0, 1, 2]"),
        ("true.yaml", b"seeds: [true]", "seeds.0 = True: give a whole number"),
        ("one.yaml", b"include: {estimator: gs-soft}", "give a list of trials, - {estimator: gs-soft"),
        ("none.yaml", b"seeds: []", "seeds = []: give at least one"),
        ("month.yaml", b"base: {steps: 2024-13-45}", "not valid YAML: month must be in 1..12"),
        ("digits.yaml", b"base: {steps: %s}" % (b"1" * 5000), "not valid YAML: Exceeds the limit"),
        ("hex.yaml", b"base: {steps: 0x%s}" % (b"f" * 5000), "not valid YAML: Exceeds the limit"),
        ("nested.yaml", b"{a: " * 3000, "nested too deep"),
        ("round.yaml", b"base: {num_codes: &a [*a]}", "not valid YAML: Circular reference"),
        ("much.yaml", ALIASES, "it holds more than 4 MB"),
        ("half.yaml", b'description: "\\uD800"', "surrogates not allowed"),
        ("date.yaml", b"base: {2024-01-01: 1}", "not valid YAML: keys must be str"),
        ("missing.yaml", None, "No such file"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DvqError) as caught:
        load_sweep(tmp_path / name)
    assert says in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sweep_is_its_grid_and_what_it_includes_for_every_seed() -> None:
    sweep = Sweep(
        name="s",
        base={"data": "cifar10-sample"},
        grid={"estimator": ["gs-soft", "vq-ema"], "num_codes": [4, 8]},
        include=[{"estimator": "gs-soft", "num_codes": 4, "temperature": 0.1, "log_every": 50}],
        seeds=[0, 7],
    )
    trials = sweep.trials()
    assert len(trials) == 2 * (2 * 2 + 1)
    assert trials["vq-ema-c8-k8-s7"].seed == 7
    # by what decides numbers, as log_every does not
    assert trials["gs-soft-c4-k8-s0-temperature-0.1"].model_dump()["temperature"] == 0.1
    assert len({one.key() for one in trials.values()}) == 10


def test_a_field_that_changes_nothing_in_any_trial_is_told_with_what_it_needs() -> None:
    plain = {"estimator": "gs-soft", "annealing_after": 5, "annealing_steps": 5, "decay_half_life": 5}
    assert Sweep(name="s", base=plain).idle() == [
        ("decay_half_life", "decay_after"),
        ("annealing_after", "final_temperature"),
        ("annealing_steps", "final_temperature"),
    ]
    some = Sweep(name="s", base=plain, grid={"final_temperature": [None, 0.1], "decay_after": [3]})
    assert some.idle() == []


@pytest.mark.parametrize(
    "at",
    [
        {"estimator": "gs-soft", "num_codes": 512},
        {"temperature": 1e-05, "final_temperature": None, "learning_rate": 0.5},
        {"levels": [8, 6, 5], "words": ["a b", "it's"], "named": {"x": "y z"}, "on": True},
        {"a": "8", "b": "yes", "c": "null", "d": "", "e": "NaN", "f": "8, 6, 5", "g": 'a "b" c=d'},
    ],
)
def test_a_point_travels_as_text(at: dict[str, Any]) -> None:
    assert point(overrides(at)) == at


def test_a_point_as_people_write_it() -> None:
    assert overrides({"estimator": "gs-soft", "seed": 0}) == "estimator=gs-soft seed=0"
    assert point("estimator=gs-soft temperature=.5 seed=0") == {
        "estimator": "gs-soft",
        "temperature": ".5",
        "seed": 0,
    }
    with pytest.raises(DvqError, match="No closing quotation"):
        point("estimator='gs-soft seed=0")


def test_the_key_hangs_on_what_decides_the_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trial({**GS, "num_codes": 64})
    key = one.key()
    assert trial({**GS, "num_codes": 64, "num_latents": 8}).key() == one.key()  # a default, named
    for neutral in ({"log_every": 3}, {"evaluate_every": 3}, {"probe_draws": 4}, {"checkpoint_every": 5}):
        assert trial({**GS, "num_codes": 64, **neutral}).key() == one.key()
    for other in (
        {"seed": 1},
        {"temperature": 0.1},
        {"split": "tune"},
        {"data": "cifar10-sample"},
        {"steps": 5},
    ):
        assert trial({**GS, "num_codes": 64, **other}).key() != one.key()
    assert trial({"estimator": "gs-hard", "num_codes": 64}).key() != one.key()
    longer = trial({**GS, "num_codes": 64, "steps": 200_000})
    assert longer.family() == one.family()
    monkeypatch.setattr(dvq, "NUMERICS", dvq.NUMERICS + 1)
    assert trial({**GS, "num_codes": 64}).key() != key
    monkeypatch.undo()
    monkeypatch.setitem(FINGERPRINTS, "cifar10", "other")
    assert trial({**GS, "num_codes": 64}).key() != key


@pytest.mark.parametrize(
    "path", sorted((Path(dvq.__file__).parents[1] / "pipeline/sweeps").glob("*.yaml")), ids=str
)
def test_every_sweep_of_the_project_is_right(path: Path) -> None:
    assert load_sweep(path).trials()


class Nameless(GSSoft):
    """An estimator that was begun as a copy of another."""


class Yes(GSSoft):
    estimator: Literal["yes"] = "yes"  # type: ignore[assignment]
    halve: bool = False
    twice: bool | None = None

    @model_validator(mode="after")
    def _not_both(self) -> "Yes":
        if self.halve and self.twice:
            raise ValueError("halve and twice are both set; set one")
        return self


def test_an_estimator_without_a_name_of_its_own_takes_no_others_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "ESTIMATORS", [GSSoft, Nameless])
    with pytest.raises(
        DvqError, match=r"Nameless has no name of its own, and 'gs-soft' is GSSoft's; give it one"
    ):
        trial({"estimator": "gs-soft"})


def test_a_field_of_an_estimator_can_be_a_yes_or_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "ESTIMATORS", [GSSoft, Yes])
    assert trial({"estimator": "yes", "halve": True}).changed() == {"halve": True}
    assert trial({"estimator": "yes", "twice": True}).changed() == {"twice": True}


def test_what_fields_are_not_together_is_told_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "ESTIMATORS", [GSSoft, Yes])
    with pytest.raises(DvqError, match=r"^here: halve and twice are both set; set one$"):
        trial({"estimator": "yes", "halve": True, "twice": True}, where="here")


class Lossless(Discrete):
    estimator: Literal["lossless"] = "lossless"


with warnings.catch_warnings(action="ignore"):  # pydantic's, who takes it for meant

    class Shadowing(GSSoft):
        estimator: Literal["shadowing"] = "shadowing"  # type: ignore[assignment]
        positions: int = 3  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (
            Shadowing,
            "Shadowing has a field 'positions', and Trial something else of this name; give the field an",
        ),
        (Lossless, "Lossless has no latents and loss; the methods' docstrings are in dvq.trial"),
        (BaseModel, "BaseModel is no Trial; derive it from a class of dvq.trial"),
    ],
)
def test_what_is_no_estimator_yet_is_one_sentence(
    cls: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "ESTIMATORS", [GSSoft, cls])
    with pytest.raises(DvqError, match=says):
        trial(GS)


def test_an_estimator_that_is_written_and_not_named_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "estimators").mkdir()
    (tmp_path / "estimators" / "my_own.py").touch()
    monkeypatch.setattr(config, "__file__", str(tmp_path / "config.py"))
    with pytest.raises(DvqError, match=r"unknown estimator 'my-own'; my_own.py is there: name its class in"):
        trial({"estimator": "my-own"})
