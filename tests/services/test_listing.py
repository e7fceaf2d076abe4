"""What a store of a thousand trials costs to look at."""

import time
from dataclasses import asdict
from pathlib import Path

import pytest

from components.manifest import Manifest, Piece
from components.remote import RemoteStore
from components.store import State
from dvq.config import trial
from tests.services.proxy import Proxy

TRIALS = 1000


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
        return Manifest("o", 1, state=asdict(State(name, step=step)), files=files).content()

    store.bucket.each(lambda key: store.bucket.put(f"trials/{key}.json", manifest("finished")), keys)
    store.bucket.each(lambda key: store.bucket.put(f"trials/{key}/o-1/images/0.png", b"x"), keys)
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
