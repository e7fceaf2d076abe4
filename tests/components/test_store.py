"""A folder store among several processes."""

import contextlib
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ConnectTimeoutError, ProxyConnectionError, SSLError
from botocore.stub import Stubber

from components import datasets, reports
from components.bucket import Bucket
from components.folder import begin, read_json, write_json
from components.manifest import Manifest, Piece, parse
from components.store import Store
from dvq import DvqError, checkpoint, disk
from dvq.config import trial
from dvq.sweep import Sweep

HOLD = """
import subprocess, sys
from components.store import Store
with Store(sys.argv[1]).working("a-1") as work:
    if sys.argv[2] == "child":
        child = subprocess.Popen([sys.executable, "-c", "print('held', flush=True); input()"], pass_fds=[work.lock])
        child.poll() or sys.exit()
    print("held", flush=True)
    input()
"""
"""Works on a trial until a line comes; or leaves it to a child that does."""
WAIT = """
import sys
from components.store import Store
with Store(sys.argv[1]).working("a-1"):
    print("mine", flush=True)
"""


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline()


@pytest.mark.parametrize("who", ["itself", "child"])
def test_a_trial_is_worked_on_by_one_process_at_a_time(who: str, tmp_path: Path) -> None:
    """Also when only the child is left of the process that began."""
    store, holder = Store(tmp_path), start(HOLD, str(tmp_path), who)
    assert line(holder) == "held\n"
    if who == "child":
        assert holder.wait(30) == 0
    with pytest.raises(DvqError, match="trial a-1 is being computed by another process; stop that first"):
        store.remove("a-1")
    with store.working("b-1") as work:
        assert work.folder == tmp_path / "trials" / "b-1"
    waiter = start(WAIT, str(tmp_path))
    assert line(waiter) == "trial a-1: another process on this machine is at work on it; waiting for it\n"
    holder.communicate("\n", timeout=30)
    assert line(waiter) == "mine\n"
    waiter.communicate(timeout=30)
    store.remove("a-1")


def test_until_new_json_is_on_the_disk_whole_the_old_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "results.json", []
    write_json(path, {"number": 1})

    def sync(descriptor: int) -> None:
        file = os.fstat(descriptor)
        synced.append((file.st_ino, file.st_size, read_json(path)))

    monkeypatch.setattr(os, "fsync", sync)
    write_json(path, {"number": 2})
    assert synced == [(path.stat().st_ino, path.stat().st_size, {"number": 1})]
    assert read_json(path) == {"number": 2}


def test_what_cannot_be_removed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else FRESH=1 would say that it was, and compute nothing."""
    store = Store(tmp_path)
    (store.trial("a-1") / "events").mkdir(parents=True)
    refused = PermissionError(errno.EACCES, "Permission denied", str(store.trial("a-1") / "events"))

    def rmtree(*_: Any) -> None:
        raise refused

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(DvqError, match=r"a-1/events cannot be removed \(Permission denied\)"):
            store.remove("a-1")
    store.remove("a-1")
    store.remove("a-1")
    assert not store.trial("a-1").exists()


def test_a_trial_is_there_whole_or_not_at_all_whenever_its_removal_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is left of a finished one passes for it, and no FRESH=1 sees that there is something to remove."""
    parts = ("results.json", "trial.json", "model/model.safetensors", "events/000000.jsonl")
    for at in range(50):
        store, left = Store(tmp_path), at

        def removing(*given: Any, real: Any, **named: Any) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            real(*given, **named)

        for part in parts:
            (store.trial("a-1") / part).parent.mkdir(parents=True, exist_ok=True)
            (store.trial("a-1") / part).write_text("{}")
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            for name in ("unlink", "rmdir", "rename"):
                patched.setattr(os, name, functools.partial(removing, real=getattr(os, name)))
            store.remove("a-1")
            break
        assert [store.has("a-1", part) for part in parts] in ([True] * 4, [False] * 4)
    store.remove("a-1")
    assert at > len(parts)
    assert [path.name for path in (tmp_path / "trials").iterdir()] == [".a-1.lock"]


def test_a_trial_goes_on_from_the_furthest_checkpoint_that_is_not_beyond_its_end(tmp_path: Path) -> None:
    store, base = Store(tmp_path), {"estimator": "gs-soft", "data": "cifar10-sample"}
    shortest, short, long = (trial({**base, "steps": steps}) for steps in (4, 6, 9))
    for one, steps in ((shortest, (2, 4)), (long, (6, 9))):
        begin(store.trial(one.key()), one, "name")
        for step in steps:
            checkpoint.write(store.trial(one.key()), step, {}, {"events": {}})
    begin(store.trial(short.key()), short, "name", store.shorter_trial(short))
    assert store.steps(short.key()) == [6]


def test_why_a_shorter_trial_cannot_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trial({"estimator": "gs-soft", "data": "cifar10-sample", "steps": 9})
    (tmp_path / "shorter" / "events").mkdir(parents=True)
    for why, says in (
        ("[Errno 28] No space left on device", r"cannot be copied, to go on from it \(\[Errno 28\] No space"),
        ("[Errno 2] No such file or directory: 'x'", "changed while it was copied, for it is in training"),
    ):

        def copytree(*_: Any, why: str = why, **__: Any) -> None:
            raise shutil.Error([("from", "to", why)])

        monkeypatch.setattr(shutil, "copytree", copytree)
        with pytest.raises(DvqError, match=says):
            begin(tmp_path / "longer", one, "name", tmp_path / "shorter")


@pytest.mark.parametrize(
    "told",
    [
        {"state": {"name": "finished", "evil": 1}},
        {"state": ["finished"]},
        {"state": "finished"},
        {"files": {"checkpoints/abc/checkpoint.json": []}},
        {"files": {"events/\ud800": []}},
        {"files": {"events/\0": []}},
    ],
)
def test_a_manifest_that_no_trial_has_is_damaged(told: dict[str, Any]) -> None:
    with pytest.raises(DvqError, match=r"m is damaged \(.*\); remove it to have all of it made anew"):
        parse(Manifest(**told).content(), "m")


def test_a_manifest_without_its_hash_is_damaged() -> None:
    fields = json.loads(Manifest().content())
    del fields["sha256"]
    with pytest.raises(DvqError, match="m is damaged"):
        parse(json.dumps(fields).encode(), "m")


def test_a_manifest_nested_without_end_is_damaged() -> None:
    with pytest.raises(DvqError, match="m is damaged"):
        parse(b'{"state":' * 100_000, "m")


def test_credentials_with_a_line_break_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a Secret made of a file has them; boto3 takes them for a server that does not answer."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden\n")
    with pytest.raises(DvqError, match=r"the AWS_\* credentials hold a line break") as told:
        Bucket("s3://bucket/prefix").client  # noqa: B018
    assert "hidden" not in str(told.value)


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (501, "NotImplemented", "lacks something that a store needs .*; take an S3 that has it"),
        (400, "ExpiredToken", "refuses the credentials .*; check AWS_ACCESS_KEY_ID"),
        (500, "500", r"answers with an error .*; is AWS_ENDPOINT_URL right\?"),
    ],
    ids=["no conditions", "expired", "a web page"],
)
def test_an_s3_that_cannot_is_told_with_what_to_do(
    status: int, code: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "key")
    bucket = Bucket("s3://bucket")
    bucket.patience = 300.0 * (status != 500)  # only this one may pass
    with Stubber(bucket.client) as stub:
        stub.add_client_error("put_object", code, http_status_code=status)
        with pytest.raises(DvqError, match=says):
            bucket.check_conditions()


@pytest.mark.parametrize("status", [301, 307, 308])
def test_a_server_that_redirects_is_told(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that has moved from http to https; botocore follows some redirections until Python's stack ends."""

    class Moved(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Location", f"https://s3.example.org{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_HEAD(self) -> None:
            self.do_GET()

    with HTTPServer(("127.0.0.1", 0), Moved) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            monkeypatch.setenv(f"AWS_{name}", "key")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(DvqError, match="is AWS_ENDPOINT_URL right"):
            Bucket("s3://bucket").check()
        server.shutdown()


@pytest.mark.parametrize(
    "error",
    [
        ConnectTimeoutError(endpoint_url="https://s3.example.org"),
        ProxyConnectionError(proxy_url="http://proxy.example.org"),
        SSLError(endpoint_url="https://s3.example.org", error="unexpected EOF"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_server_out_of_reach_does_not_lack_credentials(error: Exception) -> None:
    """And is asked again, as one that refuses connections."""
    bucket, errors = Bucket("s3://bucket"), [error]

    def attempt() -> str:
        if errors:
            raise errors[0]
        return "found"

    bucket.patience = 0
    with pytest.raises(DvqError, match=rf"does not answer \({type(error).__name__}\)"):
        bucket.retry(attempt)
    assert bucket.is_transient(errors.pop())


@pytest.mark.parametrize(
    "told",
    [
        "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate (_ssl.c:1006)",
        "[X509: NO_CERTIFICATE_OR_CRL_FOUND] no certificate or crl found (_ssl.c:4154)",
        "[Errno 2] No such file or directory",
    ],
)
def test_a_certificate_that_is_not_trusted_is_told_at_once(told: str) -> None:
    """Also where AWS_CA_BUNDLE is at fault; one that was trusted before may be renewed by and by."""
    bucket, error = Bucket("s3://bucket"), SSLError(endpoint_url="https://s3.example.org", error=told)

    def attempt() -> None:
        raise error

    with pytest.raises(DvqError, match="certificate that is not trusted; AWS_CA_BUNDLE names"):
        bucket.retry(attempt)
    bucket._worked = True
    assert bucket.is_transient(error)


def test_a_login_that_is_over_is_no_server_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(
        "[profile lab]\nsso_start_url = https://lab.example.org\nsso_region = eu-west-1\n"
        "sso_account_id = 123456789012\nsso_role_name = me\n"
    )
    for name, value in {"CONFIG_FILE": str(tmp_path / "config"), "PROFILE": "lab"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    with pytest.raises(DvqError, match=r"no credentials to use \(SSOTokenLoadError\); .* or log in anew"):
        Bucket("s3://bucket").check()


def test_data_in_s3_is_an_object() -> None:
    with pytest.raises(DvqError, match="DATA = 's3://abc': it names a bucket alone; give s3://bucket/key"):
        datasets.check("s3://abc")


@pytest.mark.parametrize("path", ["events/../../x", "/etc/x", "..", "a//b", "./a", ""])
def test_a_manifest_whose_paths_lead_elsewhere_is_refused(path: str) -> None:
    """Whoever can write to the bucket would write anywhere on the machines that read it."""
    piece = Piece("o/results.json", "0" * 64, 1)
    assert parse(Manifest(files={"events/p.jsonl": [piece]}).content(), "m").objects() == {"o/results.json"}
    for files in ({path: [piece]}, {"results.json": [piece._replace(object=path)]}):
        with pytest.raises(DvqError, match="leads out of its folder"):
            parse(Manifest(files=files).content(), "m")


def test_a_report_that_has_no_room_is_one_sentence(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which names the folder, as a full disk does not."""
    sweep = Sweep(name="s", base={"data": "cifar10-sample"}, grid={"estimator": ["gs-soft"]})

    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reports, "write", write)
    with pytest.raises(
        DvqError, match=rf"cannot be written to {store.report('s')}: No space left.*; make room"
    ):
        reports.report(sweep.model_dump_json())


def test_reports_of_one_sweep_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each removes the figures that are there before it draws its own, and a replay what is noted of it."""
    forgotten: list[Any] = []
    monkeypatch.setattr(reports.tracking, "unmark_sent", lambda *told: forgotten.append(told))
    sweep, store = (
        Sweep(name="s", base={"data": "cifar10-sample"}, grid={"estimator": ["gs-soft"]}),
        Store(tmp_path),
    )
    with ThreadPoolExecutor(1) as pool:
        with disk.locked(tmp_path / "reports" / ".s.lock"):
            other = pool.submit(reports.write, sweep, store, anew=True)
            with pytest.raises(TimeoutError):
                other.result(timeout=1)
            assert not store.report("s").exists()
            assert not forgotten
        assert other.result()[0].exists()
    assert forgotten == [(store.report("s"), "s")]
