"""A folder mirrored in a real S3: whole or not at all, by one owner at a time, whatever happens in between."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from components import mirror as mirrors
from components.bucket import Bucket
from components.manifest import Manifest, Piece, list_files, parse
from components.mirror import Mirror, OvertakenError
from components.remote import RemoteStore
from components.s3 import MissingError
from dvq import DvqError
from dvq.events import Events
from tests.services.conftest import SeaweedFS
from tests.services.proxy import Proxy, answer_up_to, calling, cut, s3_error


@pytest.fixture
def bucket(proxy: Proxy, tmp_path: Path) -> Bucket:
    assert os.environ["AWS_ENDPOINT_URL"] == proxy.address
    made = Bucket(f"s3://dvq/{tmp_path.name}")
    made.patience = 30.0
    return made


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "POLL", 0.1)
    monkeypatch.setattr(mirrors, "SILENCE", 0.5)


def worker(bucket: Bucket, folder: Path) -> Mirror:
    """A worker with its cache in ``folder``; those with different ones are as on different machines."""
    return Mirror(bucket, "trials/x-1", folder)


def claimed(bucket: Bucket, folder: Path) -> Mirror:
    made = worker(bucket, folder)
    made.claim()
    made.fetch()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path: (folder / path).read_bytes() for path in list_files(folder)}


def visible(bucket: Bucket, scratch: Path) -> dict[str, bytes]:
    """What another machine sees."""
    shutil.rmtree(scratch, ignore_errors=True)
    reader = worker(bucket, scratch)
    reader.adopt(reader.read())
    reader.fetch()
    return contents(scratch)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def seemed_to_fail(bucket: Bucket, proxy: Proxy, folder: Path) -> Mirror:
    """A worker whose push of a = 1 was done, and the answer lost."""
    made = claimed(bucket, folder)
    write(folder, a="1")
    bucket.patience = 0.0
    proxy.at(r"PUT .*/x-1\.json", answer_up_to(0))
    with pytest.raises(DvqError, match="does not answer"):
        made.push()
    return made


def test_a_push_is_fetched_elsewhere_and_follows_the_folder(bucket: Bucket, tmp_path: Path) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, trial="1", checkpoints__1__state="a" * 100, images__1="png", half__written="x")
    (one.folder / "half" / "written").rename(one.folder / "half" / "written.partial")
    one.push()
    assert visible(bucket, tmp_path / "b") == {
        "trial": b"1",
        "checkpoints/1/state": b"a" * 100,
        "images/1": b"png",
    }
    shutil.rmtree(one.folder / "checkpoints" / "1")
    write(one.folder, trial="2", checkpoints__2__state="b")
    one.push(active=False)
    assert visible(bucket, tmp_path / "b") == contents(one.folder)
    stored = {key.split("/", 3)[3] for key in bucket.list("trials/x-1/")}
    assert stored == {
        "trial",
        "checkpoints/2/state",
        "images/1",
    }  # nothing of the first push is left that is not used


def test_unchanged_files_are_not_sent_again(bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, trial="1", model="2")
    one.push(active=False)
    again = claimed(bucket, tmp_path / "a")
    write(again.folder, results="3")
    proxy.clear()
    again.push(active=False)
    assert [line.rpartition("/")[2] for line in proxy.requests if line.startswith("PUT")] == [
        "results",
        "x-1.json",
    ]


def test_events_are_appended_in_pieces_that_stay_few(bucket: Bucket, tmp_path: Path) -> None:
    one = claimed(bucket, tmp_path / "a")
    diary = Events(one.folder)
    for step in range(40):
        diary.metrics(step, {"train/rate": step / 10})
        one.push()
    path = "events/000000.jsonl"
    pieces = one.manifest.files[path]
    assert len(pieces) <= 6
    assert all(a.size >= 2 * b.size for a, b in pairwise(pieces))
    assert visible(bucket, tmp_path / "b") == contents(one.folder)
    os.truncate(one.folder / path, pieces[0].size // 2)
    with (one.folder / path).open("a") as file:
        file.write('\n{"kind": "state"}\n{"half')
    one.push(active=False)
    assert visible(bucket, tmp_path / "b")[path] == (one.folder / path).read_bytes().removesuffix(b'{"half')


def test_a_worker_that_was_overtaken_publishes_nothing_and_says_so(bucket: Bucket, tmp_path: Path) -> None:
    frozen = claimed(bucket, tmp_path / "a")
    write(frozen.folder, checkpoint="of the first")
    frozen.push()
    other = claimed(bucket, tmp_path / "b")  # after the first's silence
    assert contents(other.folder) == {"checkpoint": b"of the first"}
    write(frozen.folder, results="of the first")
    for _ in range(2):
        with pytest.raises(
            OvertakenError, match=r"trials/x-1: overtaken by process \d+ on .* while process \d+ on"
        ):
            frozen.push()
    assert {key.removeprefix("trials/x-1/") for key in bucket.list("trials/x-1/")} == other.manifest.objects()
    write(other.folder, results="of the second")
    other.push(active=False)
    with pytest.raises(OvertakenError):
        frozen.push(active=False)
    assert visible(bucket, tmp_path / "c")["results"] == b"of the second"
    back = claimed(bucket, tmp_path / "a")  # the first's machine finds the second's work
    assert contents(back.folder) == {"checkpoint": b"of the first", "results": b"of the second"}
    unused = {key.removeprefix("trials/x-1/") for key in bucket.list("trials/x-1/")} - back.manifest.objects()
    assert unused == set()


def test_an_owner_at_work_is_waited_for(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = claimed(bucket, tmp_path / "a")
    steps = iter([lambda: one.push(), lambda: one.push(), lambda: one.push(active=False)])
    monkeypatch.setattr(mirrors, "time", SimpleNamespace(sleep=lambda _: next(steps)()))
    monkeypatch.setattr(mirrors, "SILENCE", 0.15)  # two looks without a sign of life
    claimed(bucket, tmp_path / "b")
    assert "is at work on it; waiting for it" in capsys.readouterr().out
    assert list(steps) == []


def test_to_have_looked_at_an_owners_work_is_not_to_own_it(bucket: Bucket, tmp_path: Path) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, a="1")
    one.push()
    reader = worker(bucket, tmp_path / "b")
    reader.adopt(reader.read())
    reader.fetch()
    with pytest.raises(
        DvqError, match=r"is at work on it; stop that first \(if it died, try again in \d+ s\)"
    ):
        worker(bucket, tmp_path / "b").check_idle()
    worker(bucket, tmp_path / "a").check_idle()  # no process of its own machine has the lock: it died
    began = time.monotonic()
    claimed(bucket, tmp_path / "b")
    assert time.monotonic() - began >= mirrors.SILENCE


def test_a_trial_is_removed_only_when_nobody_is_at_work_on_it(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, a="1")
    one.push()
    monkeypatch.setattr(mirrors, "SILENCE", 60.0)
    monkeypatch.setenv("DVQ_CACHE", str(tmp_path / "b"))
    store = RemoteStore(str(bucket))
    with pytest.raises(DvqError, match="is at work on it; stop that first"):
        store.remove("x-1")
    one.push(active=False)
    assert visible(bucket, tmp_path / "c") == {"a": b"1"}
    store.remove("x-1")
    assert bucket.list("trials/") == {}


def test_work_that_was_not_pushed_before_a_death_is_gone_on_with(bucket: Bucket, tmp_path: Path) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, checkpoint="1", old="x")
    one.push()
    write(one.folder, checkpoint="2", other="3")
    (one.folder / "old").unlink()
    again = claimed(bucket, tmp_path / "a")  # at once: it is this machine's own
    assert (again.folder / "checkpoint").read_text() == "2"
    again.push(active=False)
    assert visible(bucket, tmp_path / "b") == contents(again.folder)


@pytest.mark.parametrize("pattern", [r"PUT .*-000002/b$", r"PUT .*/x-1\.json"])
def test_a_worker_that_dies_in_a_push_leaves_the_push_before(
    bucket: Bucket, proxy: Proxy, tmp_path: Path, pattern: str
) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, a="1", b="1")
    one.push()
    bucket.patience = 0.0
    write(one.folder, a="2", b="2")
    proxy.at(pattern, s3_error(503, "SlowDown"))
    with pytest.raises(DvqError, match="503"):
        one.push()
    assert visible(bucket, tmp_path / "b") == {"a": b"1", "b": b"1"}
    again = claimed(bucket, tmp_path / "a")
    again.push(active=False)
    assert visible(bucket, tmp_path / "b") == {"a": b"2", "b": b"2"}


def test_a_lost_answer_is_no_defeat(bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
    one = claimed(bucket, tmp_path / "a")
    for number in range(3):
        write(one.folder, a=str(number))
        proxy.at(r"PUT .*/x-1\.json", answer_up_to(0))
        one.push()
    assert visible(bucket, tmp_path / "b") == {"a": b"2"}


def test_a_push_that_seemed_to_fail_is_no_defeat(bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
    one = seemed_to_fail(bucket, proxy, tmp_path / "a")
    assert visible(bucket, tmp_path / "b") == {"a": b"1"}
    write(one.folder, a="2")
    one.push(active=False)
    assert visible(bucket, tmp_path / "b") == {"a": b"2"}


def test_a_worker_that_dies_in_a_push_that_seemed_to_fail_leaves_what_came_after(
    bucket: Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    one = seemed_to_fail(bucket, proxy, tmp_path / "a")
    write(one.folder, a="2", b="2")
    assert contents(claimed(bucket, tmp_path / "a").folder) == {"a": b"2", "b": b"2"}


def test_answers_lost_one_after_the_other_are_no_defeat(bucket: Bucket, proxy: Proxy, tmp_path: Path) -> None:
    """Of a push that seemed to fail, and of the next, which finds it there."""
    one = seemed_to_fail(bucket, proxy, tmp_path / "a")
    bucket.patience = 30.0
    write(one.folder, a="2")
    proxy.at(r"PUT .*/x-1\.json", s3_error(412, "PreconditionFailed"))
    proxy.at(r"PUT .*/x-1\.json", answer_up_to(0))
    one.push(active=False)
    assert visible(bucket, tmp_path / "b") == {"a": b"2"}


@pytest.mark.parametrize("pattern", [r"GET .*list-type", r"GET .*uploads", r"POST .*\?delete"])
def test_who_stood_still_while_it_cleaned_up_removes_nothing_of_the_next(
    bucket: Bucket, proxy: Proxy, tmp_path: Path, pattern: str
) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, a="1")
    one.push(active=False)
    bucket.put("trials/x-1/of-a-dead-worker", b"")

    def overtake() -> None:
        other = claimed(bucket, tmp_path / "b")
        write(other.folder, b="2")
        other.push(active=False)

    proxy.at(pattern, calling(overtake))
    worker(bucket, tmp_path / "a").claim()
    assert visible(bucket, tmp_path / "c") == {"a": b"1", "b": b"2"}
    assert len(bucket.list("trials/x-1/")) == 2


def test_a_worker_that_dies_as_it_takes_over_leaves_what_was_not_pushed(
    bucket: Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    """Its claim was stored, its answer lost, and it was killed before it knew; and so was the next."""
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, a="1")
    one.push(active=False)
    write(one.folder, a="2", b="2")
    bucket.patience = 0.0
    for _ in range(2):
        proxy.at(r"PUT .*/x-1\.json", answer_up_to(0))
        with pytest.raises(DvqError, match="does not answer"):
            worker(bucket, tmp_path / "a").claim()
    bucket.patience = 30.0
    again = claimed(bucket, tmp_path / "a")
    assert contents(again.folder) == {"a": b"2", "b": b"2"}
    again.push(active=False)
    assert visible(bucket, tmp_path / "b") == {"a": b"2", "b": b"2"}


def test_a_reader_with_an_old_manifest_leaves_what_was_not_pushed(bucket: Bucket, tmp_path: Path) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, a="1")
    one.push(active=False)
    reader = worker(bucket, tmp_path / "a")
    seen = reader.read()
    again = claimed(bucket, tmp_path / "a")
    write(again.folder, b="2")  # and dies
    reader = worker(bucket, tmp_path / "a")
    reader.adopt(seen)
    reader.fetch()
    assert contents(reader.folder) == {"a": b"1", "b": b"2"}


def test_a_removed_trial_does_not_come_back_from_a_cache(bucket: Bucket, tmp_path: Path) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, a="1")
    one.push(active=False)
    worker(bucket, tmp_path / "b").remove()
    assert contents(claimed(bucket, tmp_path / "a").folder) == {}


def test_a_push_that_takes_longer_than_checkpoints_last_has_one(
    bucket: Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, checkpoints__1__state="1", checkpoints__2__state="2")
    one.push()

    def train() -> None:
        for old, new in (("2", "4"), ("3", "5")):
            write(one.folder, **{f"checkpoints__{new}__state": new})
            shutil.rmtree(one.folder / "checkpoints" / old)

    write(one.folder, trial="1", checkpoints__3__state="3")
    shutil.rmtree(one.folder / "checkpoints" / "1")
    proxy.at("PUT .*/trial", calling(train))
    one.push()
    assert visible(bucket, tmp_path / "b") == {
        "trial": b"1",
        "checkpoints/2/state": b"2",
        "checkpoints/3/state": b"3",
    }
    one.push()
    assert visible(bucket, tmp_path / "b") == contents(one.folder)


def test_events_that_grow_after_a_push_that_failed_are_whole(
    bucket: Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, events__0="a" * 100 + "\n", events__1="b\n")
    proxy.at("PUT .*/events/1", s3_error(400, "InvalidRequest"))
    with pytest.raises(DvqError, match="InvalidRequest"):
        one.push()
    write(one.folder, events__0="a" * 100 + "\nb\n")
    one.push()
    assert visible(bucket, tmp_path / "b") == contents(one.folder)


def test_an_object_that_is_gone_is_named(bucket: Bucket, tmp_path: Path) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, a="1", checkpoints__1__state="1")
    one.push(active=False)
    (found,) = (piece.object for piece in one.manifest.files["checkpoints/1/state"])
    bucket.delete([f"trials/x-1/{found}"])
    assert visible(bucket, tmp_path / "b") == {"a": b"1"}
    (found,) = (piece.object for piece in one.manifest.files["a"])
    bucket.delete([f"trials/x-1/{found}"])
    with pytest.raises(
        DvqError, match=f"{found} is not there any more; remove s3://.*json to have all of it"
    ):
        visible(bucket, tmp_path / "b")


def test_of_publishers_at_once_one_is_left_and_no_garbage(
    bucket: Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    def data(name: str) -> Mirror:
        write(tmp_path / name, images="1")
        return Mirror(bucket, "data/x", tmp_path / name)

    bucket.put("data/x/of-a-dead-worker", b"")
    proxy.at(r"PUT .*/data/x/.*/images", calling(data("a").publish_once))
    data("b").publish_once()
    found = Mirror(bucket, "data/x", tmp_path / "c")
    assert {key.removeprefix("data/x/") for key in bucket.list("data/x/")} == found.read().objects()
    found.fetch()
    assert contents(found.folder) == {"images": b"1"}


@pytest.mark.parametrize("pattern", [r"PUT .*-000001/results", r"PUT .*/x-1\.json", r"POST .*\?delete"])
def test_a_server_killed_while_publishing(
    bucket: Bucket,
    proxy: Proxy,
    seaweed: SeaweedFS,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
) -> None:
    before = claimed(bucket, tmp_path / "a")
    write(before.folder, trial="1")
    before.push(active=False)
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, trial="2", results="2")
    seen: list[dict[str, bytes]] = []
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.address)
    direct = Bucket(str(bucket))
    assert direct.client  # made with the address of now

    def kill() -> None:
        proxy.upstream = 9  # for the worker the server stays down until this has looked
        seaweed.restart()
        seen.append(visible(direct, tmp_path / "b"))
        proxy.upstream = seaweed.port

    proxy.at(pattern, cut(kill))
    one.push(active=False)
    assert seen[0] in ({"trial": b"1"}, {"trial": b"2", "results": b"2"})
    assert visible(bucket, tmp_path / "b") == {"trial": b"2", "results": b"2"}


def test_a_full_server_leaves_what_was_published_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = SeaweedFS(tmp_path / "seaweed", "dvq", "-master.volumeSizeLimitMB=1", "-volume.max=2")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    try:
        server.start()
        bucket = Bucket("s3://dvq")
        bucket.patience = 0.0
        one = claimed(bucket, tmp_path / "a")
        write(one.folder, trial="1")
        one.push()
        for number in range(6):
            (one.folder / str(number)).write_bytes(os.urandom(1 << 20))
        with pytest.raises(DvqError, match=r"InternalError.*, as some servers do that are out of space"):
            one.push()
        server.kill()
        server.options = ("-master.volumeSizeLimitMB=64", "-volume.max=20")
        server.start()
        bucket.patience = 30.0
        assert visible(bucket, tmp_path / "b") == {"trial": b"1"}
        one.push(active=False)
        assert visible(bucket, tmp_path / "b") == contents(one.folder)
    finally:
        server.kill()


def test_a_reader_whose_object_was_replaced_reads_the_new_one(
    bucket: Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, a="1")
    one.push()
    reader = worker(bucket, tmp_path / "b")
    reader.adopt(reader.read())
    write(one.folder, a="2")
    proxy.at("GET .*/a", calling(one.push))
    with pytest.raises(MissingError):
        reader.fetch()
    reader.adopt(reader.read())
    reader.fetch()
    assert contents(reader.folder) == {"a": b"2"}


def test_a_removed_trial_is_gone_everywhere(bucket: Bucket, tmp_path: Path) -> None:
    one = claimed(bucket, tmp_path / "a")
    write(one.folder, a="1")
    one.push()
    worker(bucket, tmp_path / "b").remove()
    with pytest.raises(OvertakenError, match="removed, as FRESH=1 does, while process"):
        one.push()
    worker(bucket, tmp_path / "b").remove()
    assert bucket.list("trials/") == {}
    assert contents(claimed(bucket, tmp_path / "a").folder) == {}


def test_a_damaged_manifest_is_one_sentence(bucket: Bucket, tmp_path: Path) -> None:
    for content, says in (
        (b"{", "is damaged"),
        (b"[]", "is damaged"),
        (Manifest(format=2).content(), "has format 2, and"),
    ):
        bucket.put("trials/x-1.json", content)
        with pytest.raises(DvqError, match=rf"trials/x-1.json {says}"):
            worker(bucket, tmp_path / "a").claim()


def test_a_flipped_bit_anywhere_in_a_manifest_is_seen() -> None:
    files = {"events/0": [Piece("o-1/events/0.0", "ab" * 32, 99)], "results.json": []}
    content = Manifest("o", 1, True, "here", {"name": "interrupted", "step": 12}, files).content()
    whole = parse(content, "x")
    assert whole.files == files
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            with suppress(DvqError):
                assert parse(bytes(flipped), "x") == whole  # white space


WRITER = """
import sys
from pathlib import Path
from components.bucket import Bucket
from components.mirror import Mirror
from dvq.events import Events
url, place, folder = sys.argv[1:]
one = Mirror(Bucket(url), place, Path(folder))
one.claim()
diary = Events(one.folder)
for step in range(20):
    diary.metrics(step, {"rate": step})
    one.push()
one.push(active=False)
"""


@pytest.mark.parametrize("together", [False, True])
def test_eight_writers_at_once_lose_nothing(bucket: Bucket, tmp_path: Path, together: bool) -> None:
    """Each at a trial of its own; and all at one, of whom one is served after the other."""
    url, environment = str(bucket), {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    places = ["trials/one" if together else f"trials/{number}" for number in range(8)]
    script = "import components.mirror as m; m.POLL = 0.2; m.SILENCE = 60\n" + WRITER
    if together:
        script = script.replace("one.claim()\n", "one.claim()\none.fetch()\n")
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script, url, place, str(tmp_path / str(number))], env=environment
        )
        for number, place in enumerate(places)
    ]
    assert [one.wait(120) for one in writers] == [0] * 8
    found = []
    for place in set(places):
        reader = Mirror(bucket, place, tmp_path / "reader" / place)
        reader.adopt(reader.read())
        reader.fetch()
        files = sorted((reader.folder / "events").iterdir())
        found += [[json.loads(line)["step"] for line in path.read_text().splitlines()] for path in files]
    assert found == [list(range(20))] * 8
