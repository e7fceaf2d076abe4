"""The client of KFP's API, against a server that answers as KFP's published API does."""

import datetime
import ipaddress
import threading
from collections.abc import Iterator
from pathlib import Path

import kfp_server_api as api
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from dvq import DvqError
from pipeline.connection import UnreachableError, one_line
from pipeline.kubeflow import Kubeflow
from pipeline.profile import Cluster
from tests.kubeflow_server import KubeflowServer


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KFP_HOST", "KFP_NAMESPACE", "KFP_TOKEN", "KFP_COOKIE", "KFP_CA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> KubeflowServer:
    return KubeflowServer()


@pytest.fixture
def address(server: KubeflowServer) -> Iterator[str]:
    with server.listening() as found:
        yield found


@pytest.fixture
def kubeflow(address: str) -> Kubeflow:
    return Kubeflow(Cluster(host=address))


def refused(address: str, **cluster: str) -> str:
    """The sentence with which connecting is refused."""
    with pytest.raises(DvqError) as caught:
        Kubeflow(Cluster(host=address, **cluster))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_version_for_each_text(kubeflow: Kubeflow, server: KubeflowServer) -> None:
    first = kubeflow.upload("one", "dvq-sweep")
    assert kubeflow.upload("one", "dvq-sweep") == first
    others = {kubeflow.upload(text, "dvq-sweep") for text in ("two", "three", "four")}
    assert kubeflow.upload("four", "dvq-sweep") in others  # on the second page
    assert len({first, *others}) == len(server.versions) == 4
    assert len({pipeline for pipeline, _ in {first, *others}}) == len(server.pipelines) == 1
    assert server.texts[first[1]] == "one"


def test_who_uploads_at_the_same_time_gets_the_same(address: str, server: KubeflowServer) -> None:
    found, many = [], 6
    start = threading.Barrier(many)

    def one() -> None:
        client = Kubeflow(Cluster(host=address))
        start.wait()
        found.append((client.upload("text", "dvq-sweep"), client.experiment("sweep")))

    threads = [threading.Thread(target=one) for _ in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == many
    assert len(set(found)) == len(server.versions) == len(server.experiments) == 1


def test_an_experiment_is_found_again_among_others(kubeflow: Kubeflow) -> None:
    made = [kubeflow.experiment(f"sweep-{number}") for number in range(5)]
    assert [kubeflow.experiment(f"sweep-{number}") for number in range(5)] == made


def test_what_is_made_and_not_shown_ends_in_a_sentence(kubeflow: Kubeflow, server: KubeflowServer) -> None:
    """Of what another may have made at the same time it is looked for again, but not for ever."""
    server.blind = True
    with pytest.raises(DvqError, match="took the experiment 'sweep' and does not show it"):
        kubeflow.experiment("sweep")
    with pytest.raises(
        DvqError, match=r"took the version .* of the pipeline 'dvq-sweep' and does not show it"
    ):
        kubeflow.upload("text", "dvq-sweep")


def test_a_run_from_its_start_to_its_end(address: str, server: KubeflowServer) -> None:
    kubeflow = Kubeflow(Cluster(host=address, service_account="account"))
    version, experiment = kubeflow.upload("text", "dvq-sweep"), kubeflow.experiment("sweep")
    assert kubeflow.going(experiment) is None
    run = kubeflow.start("sweep-1", experiment, version, {"sweep": "{}"})
    assert kubeflow.going(experiment) == run
    assert server.runs[run].runtime_config.parameters == {"sweep": "{}"}
    assert server.runs[run].service_account == "account"
    assert kubeflow.link(run) == f"{kubeflow.host}/#/runs/details/{run}"
    for state in (None, "RUNTIME_STATE_UNSPECIFIED", "RUNNING"):  # Argo has not looked at it; then it has
        server.runs[run].state = state
        assert kubeflow.look(run).going
        assert kubeflow.going(experiment) == run
    server.runs[run].state = "SUCCEEDED"
    assert not kubeflow.look(run).going
    assert kubeflow.going(experiment) is None
    kubeflow.cancel(run)
    assert server.runs[run].state == "CANCELING"


@pytest.mark.parametrize(
    ("told", "remedy"),
    [
        (
            'pods "x" is forbidden: exceeded quota: gpus, requested: 1, used: 8, limited: 8',
            "ask for more quota",
        ),
        ('Back-off pulling image "r/dvq:1": ErrImagePull', "make image PUSH=1"),
        ('Error: secret "dvq" not found', "kubectl apply -k k8s/runs"),
        ("OOMKilled (exit code 137)", "raise memory"),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest"', "k8s/README.md"),
    ],
)
def test_what_pods_met_is_told_with_its_remedy(
    kubeflow: Kubeflow, server: KubeflowServer, told: str, remedy: str
) -> None:
    version, experiment = kubeflow.upload("text", "dvq-sweep"), kubeflow.experiment("sweep")
    run = kubeflow.start("sweep-1", experiment, version, {})
    server.runs[run].state = "FAILED"
    tasks = [
        api.V2beta1PipelineTaskDetail(display_name="plan", state="SUCCEEDED"),
        api.V2beta1PipelineTaskDetail(
            state="FAILED", error=api.GoogleRpcStatus(code=2, message=f"{told}\n more")
        ),
        api.V2beta1PipelineTaskDetail(
            state="FAILED", error=api.GoogleRpcStatus(code=2, message=f"{told}\n more")
        ),
    ]
    server.runs[run].run_details = api.V2beta1RunDetails(task_details=tasks)
    (fault,) = kubeflow.look(run).faults
    assert fault.startswith(f"{told} more; ")
    assert remedy in fault


def test_what_the_api_refuses_is_one_sentence(kubeflow: Kubeflow, server: KubeflowServer) -> None:
    version, experiment = kubeflow.upload("text", "dvq-sweep"), kubeflow.experiment("sweep")
    server.faults = [(429, "RESOURCE_EXHAUSTED: exceeded quota: runs")]
    with pytest.raises(DvqError, match=r"exceeded quota: runs\); ask for more quota"):
        kubeflow.start("sweep-1", experiment, version, {})
    server.faults = [(500, "database is\n gone")]
    with pytest.raises(DvqError, match=r"answers with an error \(500: database is gone\)$"):
        kubeflow.experiment("sweep")
    with pytest.raises(DvqError, match="has no run 'x'; its id"):
        kubeflow.cancel("x")
    server.faults = [(503, "no healthy upstream")]
    with pytest.raises(UnreachableError):
        kubeflow.look("x")


def test_what_an_upload_is_refused_for_is_told(kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubeflow, "_pipeline", lambda _: "gone")
    with pytest.raises(DvqError, match=r"answers with an error \(400: Invalid input error\)$"):
        kubeflow.upload("text", "dvq-sweep")


def test_a_namespace_of_many_users(
    address: str, server: KubeflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.multi_user = True
    assert "name yours: KFP_NAMESPACE" in refused(address)
    mine = Kubeflow(Cluster(host=address, namespace="alice"))
    mine.upload("text", "dvq-sweep")
    mine.experiment("sweep")
    assert {one.namespace for one in [*server.experiments.values(), *server.pipelines.values()]} == {"alice"}
    monkeypatch.setenv("KFP_NAMESPACE", "nobody")
    with pytest.raises(DvqError, match="does not let you work in namespace 'nobody': does it exist"):
        Kubeflow(Cluster(host=address, namespace="alice")).experiment("other")


def test_a_plain_installation_has_no_namespaces(address: str) -> None:
    assert "unset KFP_NAMESPACE ('alice')" in refused(address, namespace="alice")


def test_who_asks(address: str, server: KubeflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "right"
    assert "refuses to answer without a token (401): set a valid KFP_TOKEN" in refused(address)
    monkeypatch.setenv("KFP_TOKEN", "wrong")
    told = refused(address)
    assert "refuses the token (401)" in told
    assert "wrong" not in told
    for damaged in ("wro\nng", "wro€ng"):
        monkeypatch.setenv("KFP_TOKEN", damaged)
        told = refused(address)
        assert "KFP_TOKEN holds a line break or another character that no header can" in told
        assert "wro" not in told
    monkeypatch.setenv("KFP_TOKEN", "right\n")  # as a file has it
    Kubeflow(Cluster(host=address))
    monkeypatch.delenv("KFP_TOKEN")
    server.token, server.cookie = "", "authservice_session=abc"
    monkeypatch.setenv("KFP_COOKIE", "authservice_session=other")
    assert "refuses the cookie" in refused(address)
    monkeypatch.setenv("KFP_COOKIE", "authservice_session=abc")
    Kubeflow(Cluster(host=address))
    server.page = b"<html>Log in to Your Account</html>"
    assert "answers with a page to log in: set KFP_TOKEN" in refused(address)


@pytest.mark.parametrize(
    ("page", "kind", "told"),
    [
        (
            b"<html>Log in to Your Account</html>",
            "text/html; charset=utf-8",
            "a page to log in: set KFP_TOKEN",
        ),
        (b"<html>\xff</html>", "text/html", "a page to log in: set KFP_TOKEN"),
        (b"null", "application/json", "what is no answer of KFP's API 2"),
        (b'"\xff"', "application/json", "what is no answer of KFP's API 2"),
        (b"{}", "application/json; charset=klingon", "what is no answer of KFP's API 2"),
        (b'{"run_details":' * 5000, "application/json", "what is no answer of KFP's API 2"),
        (b"[" * 100_000, "application/json", "what is no answer of KFP's API 2"),
    ],
)
def test_a_session_may_end_at_any_time(
    kubeflow: Kubeflow, address: str, server: KubeflowServer, page: bytes, kind: str, told: str
) -> None:
    """A page to log in has no state, which is no run that waits, and nothing was started or cancelled by it."""
    server.page, server.kind = page, kind
    assert told in refused(address)
    for ask in (
        lambda: kubeflow.look("x"),
        lambda: kubeflow.cancel("x"),
        lambda: kubeflow.start("sweep-1", "x", ("x", "x"), {}),
        lambda: kubeflow.upload("text", "dvq-sweep"),
    ):
        with pytest.raises(DvqError, match=told):
            ask()


def test_what_a_server_says_steers_no_terminal() -> None:
    assert one_line("a\x1b]0;b\x07\n\tc\u202e  dé") == "a]0;b c dé"


def test_addresses_that_lead_nowhere(address: str) -> None:
    assert "no Kubeflow Pipelines is named; set KFP_HOST" in refused("")
    assert "give an address" in refused("kubeflow.example.org")
    assert "give an address" in refused("http://[::1")
    assert "secret" not in refused("https://me:secret@kubeflow.example.org")
    assert "is KFP_HOST right" in refused("http://127.0.0.1:1")
    assert "there is no KFP API 2 there" in refused(address.removesuffix("/pipeline") + "/elsewhere")


def certificate(folder: Path) -> Path:
    """A self-signed one for 127.0.0.1, with its key."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]),
    )
    now = datetime.datetime.now(datetime.UTC)
    until, number = now.replace(year=2099), x509.random_serial_number()
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), number, now, until)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    path, pem = folder / "certificate.pem", serialization.Encoding.PEM
    kind, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, kind, plain))
    return path


def test_a_certificate_of_ones_own(
    server: KubeflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = certificate(tmp_path)
    with server.listening(path) as address:
        assert "name a file: KFP_CA=" in refused(address)
        assert "there is no such file" in refused(address, ca=str(tmp_path / "none.pem"))
        Kubeflow(Cluster(host=address, ca=str(path))).experiment("sweep")
        monkeypatch.setenv("KFP_CA", str(path))
        Kubeflow(Cluster(host=address))
