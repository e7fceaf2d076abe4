import contextlib
import hashlib
import http.server
import pickle
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from dvq import cifar10, data
from dvq.fingerprints import FINGERPRINTS

N = 20  # images in a batch of the stand-in for CIFAR-10


def batch_bytes(images, labels):
    """A batch as the official ones are pickled: reds, greens, blues; keys in bytes; numpy's old names."""
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)
    content = pickle.dumps({b"data": rows, b"labels": labels.tolist()}, protocol=3)
    return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A stand-in for the official files, 20 images a batch, whose hashes ``dvq`` takes for CIFAR-10's."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (6 * N, 32, 32, 3), dtype=np.uint8)
    images[0] = np.arange(3072).reshape(32, 32, 3) % 256  # every value from 0 to 255
    labels = generator.integers(0, 10, 6 * N, dtype=np.uint8)
    folder = tmp_path / "official" / cifar10.FOLDER
    folder.mkdir(parents=True)
    for index, name in enumerate(cifar10.BATCH_MD5):
        rows = slice(index * N, (index + 1) * N)
        (folder / name).write_bytes(batch_bytes(images[rows], labels[rows]))
    archive = tmp_path / "archive" / cifar10.ARCHIVE
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        for path in sorted(folder.iterdir(), reverse=True):  # nor are the official ones in their order there
            file.add(path, f"{folder.name}/{path.name}")
    arrays = {
        "train_images": images[: 5 * N],
        "train_labels": labels[: 5 * N],
        "test_images": images[5 * N :],
        "test_labels": labels[5 * N :],
    }
    table = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in cifar10.BATCH_MD5}
    monkeypatch.setattr(cifar10, "BATCH_MD5", table)
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar10, "ARCHIVE_SIZE", archive.stat().st_size)
    monkeypatch.setitem(FINGERPRINTS, "cifar10", data.fingerprint(arrays))
    return SimpleNamespace(folder=folder, archive=archive, arrays=arrays)


@pytest.fixture
def server(official, monkeypatch):
    """An HTTP server on this machine that sends the stand-in's archive, or what the path's name says."""
    content, requests, stop = official.archive.read_bytes(), [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if self.path == "/missing":
                return self.send_error(404)
            body = b"<html>Sign in</html>" if self.path == "/page" else content
            body *= 20 if self.path == "/goes-on" else 1
            self.send_response(200)
            if self.path not in ("/unsized", "/goes-on"):
                self.send_header("Content-Length", "abc" if self.path == "/odd" else str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # of who has enough
                self.wfile.write(body[: len(body) // 2] if self.path in ("/cut", "/stalls") else body)
                self.wfile.flush()
            if self.path == "/stalls":
                stop.wait(60)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield SimpleNamespace(address=f"http://127.0.0.1:{httpd.server_port}", requests=requests)
        stop.set()
        httpd.shutdown()
