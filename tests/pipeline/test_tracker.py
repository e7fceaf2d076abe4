"""What is asked of MLflow before any work: its address, and whether its server answers and is trusted."""

import datetime
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dvq import DvqError
from pipeline import tracker


def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:50a0")
    assert "does not answer" in tracker.check()
    for address in ("http://[::1", "http://a..b", "http://localhost/ä"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with pytest.raises(DvqError, match="MLFLOW_TRACKING_URI is no address"):
            tracker.check()


@pytest.mark.parametrize("folder", ["50%20x", "what?"])
def test_a_path_that_mlflow_reads_otherwise_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:////home/me/{folder}/mlflow.db")
    with pytest.raises(DvqError, match="move the project"):
        tracker.check()


def test_a_tracking_server_that_is_down_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert tracker.check() == "MLflow at http://127.0.0.1:1 does not answer"


def test_a_password_goes_to_no_host_that_the_server_sends_us_on_to(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.append(self.headers["Authorization"])
            self.send_response(200 if self.path == "/elsewhere" else 302)
            self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("no_proxy", "*")
        assert tracker.check() == ""
        server.shutdown()
    assert told == ["Basic bWU6", None]


def test_a_server_is_trusted_as_mlflows_client_trusts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    own, others = certificate(tmp_path / "own.pem"), certificate(tmp_path / "others.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://localhost:{server.server_address[1]}")
        assert "a certificate that is not trusted; MLFLOW_TRACKING_SERVER_CERT_PATH" in tracker.check()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(others))
        assert "a certificate that is not trusted" in tracker.check()
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(own))
        assert tracker.check() == ""
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "none.pem"))
        with pytest.raises(
            DvqError, match=r"none\.pem, which MLFLOW_TRACKING_SERVER_CERT_PATH, .* cannot be read"
        ):
            tracker.check()
        server.shutdown()


def certificate(path: Path) -> Path:
    """Localhost's, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    begun = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(begun).not_valid_after(begun + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    text = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    path.write_bytes(text + key.private_bytes(serialization.Encoding.PEM, *form))
    return path
