"""Objects in a real S3: multipart, resumed downloads, conditions, checksums, errors of one sentence."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components import bucket as objects
from components import s3
from components.bucket import Bucket, DamagedError
from components.s3 import ChangedError
from dvq import DvqError
from tests.services.conftest import SeaweedFS
from tests.services.proxy import Exchange, Proxy, answer, answer_up_to, calling, cut, flip, s3_error, slow

MIB = 1 << 20


@pytest.fixture
def bucket(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    assert os.environ["AWS_ENDPOINT_URL"] == proxy.address
    monkeypatch.setattr(s3, "PATIENCE", 30.0)
    monkeypatch.setattr(objects, "PART", 5 * MIB)
    return Bucket(f"s3://dvq/{tmp_path.name}")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Four parts."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(16 * MIB))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_server_killed_in_a_multipart_upload_is_waited_for(
    bucket: Bucket, proxy: Proxy, seaweed: SeaweedFS, large: Path, tmp_path: Path
) -> None:
    bucket.patience = 120.0  # more than a request that hangs
    proxy.at(r"PUT .*partNumber=4", cut(seaweed.restart))
    assert bucket.upload(large, "large") == (digest(large), 16 * MIB)
    sent = [line.partition("partNumber=")[2] for line in proxy.requests if "partNumber" in line]
    assert set(sent) == {"1", "2", "3", "4"}
    bucket.download("large", tmp_path / "back", 16 * MIB, digest(large))
    assert digest(tmp_path / "back") == digest(large)


def test_an_upload_that_failed_goes_on_with_the_parts_that_are_missing(
    bucket: Bucket, proxy: Proxy, large: Path
) -> None:
    bucket.patience = 0.0
    proxy.at(r"PUT .*partNumber=3", s3_error(503, "SlowDown"))
    with pytest.raises(DvqError, match="503 SlowDown"):
        bucket.upload(large, "large")
    assert bucket.list("") == {}
    proxy.clear()
    bucket.upload(large, "large")
    assert [line[-1] for line in proxy.requests if "partNumber" in line] == ["3"]


def test_parts_of_another_file_are_not_mixed_in(
    bucket: Bucket, proxy: Proxy, large: Path, tmp_path: Path
) -> None:
    """An upload that failed is not gone on with, and one that runs keeps to its file, when the file is replaced."""

    def rewrite() -> None:
        other = large.with_name("other")
        other.write_bytes(os.urandom(16 * MIB))
        other.replace(large)

    bucket.patience = 0.0
    proxy.at(r"PUT .*partNumber=3", s3_error(503, "SlowDown"))
    with pytest.raises(DvqError, match="503 SlowDown"):
        bucket.upload(large, "large")
    bucket.patience = 30.0
    rewrite()
    proxy.at(r"POST .*\?uploads", calling(rewrite))
    sha256, size = bucket.upload(large, "large")
    bucket.download("large", tmp_path / "back", size, sha256)
    assert sha256 != digest(large)


def test_what_cannot_be_deleted_is_named(bucket: Bucket, proxy: Proxy) -> None:
    bucket.put("one", b"1")
    error = "<Error><Key>x/one</Key><Code>AccessDenied</Code></Error>"
    proxy.at(r"POST .*\?delete", answer(200, f"<DeleteResult>{error}</DeleteResult>"))
    with pytest.raises(DvqError, match="x/one cannot be deleted \\(AccessDenied\\)"):
        bucket.delete(["one"])


def test_a_completed_upload_whose_answer_was_lost_is_there(bucket: Bucket, proxy: Proxy, large: Path) -> None:
    bucket.upload(large, "large")
    bucket.client.delete_object(Bucket=bucket.name, Key=f"{bucket.prefix}large")
    proxy.at(r"POST .*uploadId=", answer_up_to(0))
    assert bucket.upload(large, "large") == (digest(large), 16 * MIB)
    assert bucket.size("large")[0] == 16 * MIB


def test_a_download_goes_on_where_the_connection_broke(
    bucket: Bucket, proxy: Proxy, large: Path, tmp_path: Path
) -> None:
    bucket.upload(large, "large")
    proxy.clear()
    proxy.at("GET .*/large", answer_up_to(6 * MIB), times=2)
    received: list[int] = []
    size, etag = bucket.size("large")
    bucket.download(
        "large", tmp_path / "back", size, etag=etag, progress=lambda done, _: received.append(done)
    )
    assert digest(tmp_path / "back") == digest(large)
    assert received == sorted(received)
    assert len([line for line in proxy.requests if line.startswith("GET")]) == 3


def test_an_object_that_is_replaced_during_its_download_is_refused(
    bucket: Bucket, proxy: Proxy, large: Path, tmp_path: Path
) -> None:
    bucket.upload(large, "large")
    size, etag = bucket.size("large")
    other = Bucket(str(bucket))
    proxy.at("GET .*/large", answer_up_to(6 * MIB))
    proxy.at("GET .*/large", calling(lambda: other.put("large", b"another")))
    with pytest.raises(DvqError, match="was replaced while it was fetched"):
        bucket.download("large", tmp_path / "back", size, etag=etag)
    assert not (tmp_path / "back").exists()


def test_a_flipped_byte_is_named_and_refused(
    bucket: Bucket, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sha256, size = bucket.upload(large, "large")
    content = bytearray(large.read_bytes())
    content[7 * MIB] ^= 1
    large.write_bytes(content)
    bucket.upload(large, "large")
    with pytest.raises(
        DamagedError, match=f"/large is damaged: its SHA-256 is {digest(large)} instead of {sha256}"
    ):
        bucket.download("large", tmp_path / "back", size, sha256)
    assert "fetching it again" in capsys.readouterr().out
    assert not (tmp_path / "back").exists()


def test_a_byte_that_flips_on_the_way_is_sent_again(
    bucket: Bucket, proxy: Proxy, large: Path, tmp_path: Path
) -> None:
    """The server compares SHA-256, which is given apart from the signature: over HTTPS that covers no body."""
    given: list[bytes] = []

    def fault(exchange: Exchange) -> None:
        given.append(exchange.head.lower())
        flip(exchange)

    proxy.at("PUT .*/small", fault)
    proxy.at("PUT .*partNumber=2", fault)
    bucket.put("small", b"small")
    sha256, size = bucket.upload(large, "large")
    assert bucket.get("small")[0] == b"small"
    bucket.download("large", tmp_path / "back", size, sha256)
    assert sha256 == digest(large)
    assert len(given) == 2
    assert all(b"x-amz-checksum-sha256: " in head for head in given)


def test_of_many_writers_with_a_condition_one_wins(bucket: Bucket) -> None:
    def write(number: int, etag: str) -> bool:
        try:
            bucket.put("manifest", f"{etag} {number}".encode(), etag)
        except ChangedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            etag = bucket.get("manifest")[1] if bucket.list("manifest") else ""
            assert sum(pool.map(write, range(8), [etag] * 8)) == 1


def test_a_slow_server_is_waited_for(bucket: Bucket, proxy: Proxy) -> None:
    proxy.at("PUT .*/slow", slow(rate=MIB))
    bucket.put("slow", b"x" * MIB)
    assert len(bucket.get("slow")[0]) == MIB


@pytest.mark.parametrize(
    "fault", [(503, "SlowDown"), (500, "InternalError"), (403, "AccessDenied"), (507, "x")]
)
def test_an_error_in_the_middle_passes(
    bucket: Bucket, proxy: Proxy, fault: tuple[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.put("one", b"1")
    proxy.at("PUT .*/two", s3_error(*fault), times=2)
    bucket.put("two", b"2")
    assert bucket.get("two")[0] == b"2"
    assert capsys.readouterr().out.count("trying again for 30 s") == 1


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ((403, "RequestTimeTooSkewed"), "this machine's clock is wrong"),
        ((507, "XMinioStorageFull"), "is out of space"),
        ((403, "QuotaExceeded"), "is out of space"),
        ((400, "InvalidRequest"), "answers with an error for bucket 'dvq'"),
    ],
)
def test_what_does_not_pass_is_one_sentence(
    bucket: Bucket, proxy: Proxy, fault: tuple[int, str], says: str
) -> None:
    bucket.patience = 0.5
    proxy.at("PUT", s3_error(*fault), times=99)
    with pytest.raises(DvqError, match=says) as raised:
        bucket.put("one", b"1")
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("ignored", ["", f'"{"0" * 32}"'], ids=["If-None-Match", "If-Match"])
def test_a_server_that_ignores_conditions_is_refused(
    bucket: Bucket, ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.check_conditions()
    heeding = bucket.put

    def put(key: str, content: bytes, etag: str | None = None) -> str:
        return heeding(key, content, None if etag == ignored else etag)

    monkeypatch.setattr(bucket, "put", put)
    with pytest.raises(DvqError, match="ignores If-None-Match and If-Match"):
        bucket.check_conditions()
    assert not bucket.list("")


CANARY = "canary0secret0key"


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize(
    ("environment", "url", "says"),
    [
        ({"AWS_SECRET_ACCESS_KEY": CANARY}, "s3://dvq", "refuses the credentials for bucket 'dvq'"),
        ({"AWS_ACCESS_KEY_ID": CANARY}, "s3://dvq", "refuses the credentials for bucket 'dvq'"),
        ({}, "s3://not-there", "has no bucket 'not-there'"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "s3://dvq", "there are no credentials"),
        ({"AWS_ENDPOINT_URL": f"http://me:{CANARY}@127.0.0.1:9"}, "s3://dvq", "127.0.0.1:9 does not answer"),
        ({"AWS_ENDPOINT_URL": "nowhere"}, "s3://dvq", "AWS_\\* settings cannot be used"),
        ({"AWS_PROFILE": "nobody"}, "s3://dvq", "AWS_\\* settings cannot be used"),
        ({}, f"s3://me:{CANARY}@dvq/x", "give s3://bucket/prefix"),
    ],
)
def test_what_is_set_wrong_is_one_sentence_without_credentials(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    url: str,
    says: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(DvqError, match=says) as raised:
        Bucket(url).check()
    told = str(raised.value) + "".join(capsys.readouterr())
    assert "\n" not in told
    assert CANARY not in told
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", CANARY) not in told
