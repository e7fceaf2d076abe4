"""What a store of a thousand trials costs to look at."""

import time
from pathlib import Path

import pytest

from components.folder import State, write_json
from components.manifest import Manifest, Piece
from components.remote import RemoteStore
from dvq.config import trial
from dvq.events import Events, read
from pipeline.explain import ledger
from tests.services.proxy import Proxy, calling

TRIALS = 1000
Machines = tuple[RemoteStore, RemoteStore]


@pytest.fixture
def machines(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:  # noqa: ARG001
    """The same store as two machines see it, each with a cache of its own."""
    stores = []
    for name in ("a", "b"):
        monkeypatch.setenv("DVQ_CACHE", str(tmp_path / name))
        stores.append(RemoteStore(f"s3://dvq/{tmp_path.name}"))
    return stores[0], stores[1]


@pytest.mark.usefixtures("proxy")
def test_a_thousand_trials_are_a_few_requests(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look reads each manifest once; later ones, of other processes too, only those that changed."""
    monkeypatch.setenv("DVQ_CACHE", str(tmp_path))
    store = RemoteStore(f"s3://dvq/{tmp_path.name}")
    keys = [trial({"estimator": "gs-soft", "seed": seed}).key() for seed in range(TRIALS)]
    files = {
        f"images/{number}.png": [Piece(f"o-1/images/{number}.png", 64 * "0", 99)] for number in range(40)
    }

    def manifest(name: str, step: int = 0) -> bytes:
        return Manifest("o", 1, state=State(name, step=step), files=files).content()

    store.bucket.map(lambda key: store.bucket.put(f"trials/{key}.json", manifest("finished")), keys)
    store.bucket.map(lambda key: store.bucket.put(f"trials/{key}/o-1/images/0.png", b"x"), keys)
    seconds = []
    for expected in (TRIALS, 0, 1):
        if expected == 1:
            store.bucket.put(f"trials/{keys[7]}.json", manifest("interrupted", 9))
        proxy.clear()
        began = time.perf_counter()
        looking = RemoteStore(store.place)
        looking.look(keys)
        seconds.append(time.perf_counter() - began)
        lists = [line for line in proxy.requests if "list-type" in line]
        gets = [line for line in proxy.requests if line.startswith("GET ") and line not in lists]
        assert len(lists) <= 2 * TRIALS // 1000 + 1
        assert len(gets) == expected
    print(f"{TRIALS} trials: {seconds[0]:.2f} s at first, {seconds[1]:.2f} s later")
    assert sum(looking.state(key).name == "finished" for key in keys) == TRIALS - 1
    assert looking.state(keys[7]) == State("interrupted", step=9)


def test_a_trial_that_is_removed_while_it_is_followed(machines: Machines) -> None:
    here, there = machines
    key = trial({"estimator": "gs-soft"}).key()
    for name in ("a", "b"):
        with here.working(key) as work:
            Events(work.folder).failure(name)
        there.follow([key])
        assert there.state(key) == State("failed", name)
        assert [event["reason"] for event in read(there.trial(key))] == [name]
        here.remove(key)
        there.follow([key])
        assert there.state(key) == State("new")


@pytest.mark.usefixtures("proxy")
def test_a_damaged_cache_is_no_damaged_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVQ_CACHE", str(tmp_path))
    store = RemoteStore(f"s3://dvq/{tmp_path.name}")
    key = trial({"estimator": "gs-soft"}).key()
    with store.working(key) as work:
        Events(work.folder).failure("a reason")
    store.look([key])
    cached = store.root / "manifests" / f"{key}.json"
    whole = cached.read_bytes()
    for content in (whole.replace(b"a reason", b"b reason"), whole[:-20], b""):
        cached.write_bytes(content)
        again = RemoteStore(store.place)
        again.look([key])
        assert again.state(key) == State("failed", "a reason")
        assert cached.read_bytes() == whole


def test_a_reader_is_never_too_slow_for_a_trial_that_goes_on(proxy: Proxy, machines: Machines) -> None:
    """Its files are replaced three times while they are fetched."""
    here, there = machines
    key = trial({"estimator": "gs-soft"}).key()
    mirror, numbers = here._mirror(key), iter(range(9))
    mirror.claim()

    def push() -> None:
        write_json(here.trial(key) / "results.json", {"number": next(numbers)})
        mirror.push()

    push()
    for _ in range(3):
        proxy.at("GET .*/results.json", calling(push))
    there.look([key], "results.json")
    assert there.results(key) == {"number": 3}


@pytest.mark.usefixtures("proxy")
def test_a_look_at_others_forgets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forecast looks at trials that are like those of the sweep, and then the sweep's are asked for."""
    monkeypatch.setenv("DVQ_CACHE", str(tmp_path))
    store = RemoteStore(f"s3://dvq/{tmp_path.name}")
    first, second = (trial({"estimator": "gs-soft", "seed": seed}).key() for seed in (1, 2))
    for key in (first, second):
        store.bucket.put(f"trials/{key}.json", Manifest("o", 1, state=State("interrupted")).content())
    store.look([first])
    store.follow([second])
    assert [store.state(key).name for key in (first, second)] == ["interrupted", "interrupted"]


def test_parts_of_what_was_looked_at_are_fetched_without_another_look(
    proxy: Proxy, machines: Machines
) -> None:
    here, there = machines
    key = trial({"estimator": "gs-soft"}).key()
    with here.working(key) as work:
        Events(work.folder).failure("a reason")
        write_json(work.folder / "events.json", {})
    there.look([key])
    proxy.clear()
    there.fetch([key], "events", "results.json")
    assert [event["reason"] for event in read(there.trial(key))] == ["a reason"]
    assert not (there.trial(key) / "events.json").exists()
    assert not [line for line in proxy.requests if "list-type" in line]


def test_explain_brings_the_model_that_it_tells_of(machines: Machines) -> None:
    here, there = machines
    one = trial({"estimator": "gs-soft"})
    numbers = {"bits_per_dim": 7.0, "bits_per_dim_se": 0.02, "rate": 0.5, "distortion": 6.5, "images": 500}
    evaluation = {"split": "test", **numbers, "ledger": {"latents": [0.5], "channels": [2.0, 2.0, 2.5]}}
    with here.working(one.key()) as work:
        (work.folder / "model").mkdir(parents=True)
        (work.folder / "model" / "trial.json").write_text("{}")
        write_json(work.folder / "results.json", {"evaluation": evaluation, "data": {"label": "a sample"}})
    model = there.trial(one.key()) / "model"
    assert ledger("a", {"a": one}, there, "s").splitlines()[-1] == f'its model: dvq.load("{model}")'
    assert (model / "trial.json").exists()
