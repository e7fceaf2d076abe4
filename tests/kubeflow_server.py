"""Kubeflow Pipelines' API 2 over HTTP, as far as the launcher uses it: the published models, its pages and errors.

Each request's body has to be what the model says; a run's pipeline can really be run, on this machine.
"""

import email
import email.policy
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api

PREFIX = "/apis/v2beta1"
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
PAGE = 2
"""Objects of a page, so that lists have several."""
CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 429: 8, 500: 13}
"""gRPC's codes, which stand in the errors' bodies"""


class RefusedError(Exception):
    """An error of the API."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    def body(self, path: str) -> dict[str, Any]:
        told = str(self)
        if "/upload" in path:  # answered by a handler of its own
            return {"error_message": told, "error_details": told}
        detail = {
            "@type": "type.googleapis.com/google.rpc.Status",
            "error_message": told,
            "error_details": told,
        }
        return {"error": told, "code": CODES.get(self.status, 2), "message": told, "details": [detail]}


class KubeflowServer:
    """What the server has, and how it behaves."""

    def __init__(self) -> None:
        self.multi_user, self.namespaces = False, {"alice"}
        self.token = self.cookie = ""
        self.page, self.kind = b"", "text/html"
        """what is sent instead of any answer, a page to log in, and its Content-Type"""
        self.faults: list[tuple[int, str]] = []
        """statuses and messages of the next answers"""
        self.blind = False
        """lists are empty"""
        self.pipelines: dict[str, Any] = {}
        self.versions: dict[str, Any] = {}
        self.texts: dict[str, str] = {}
        self.experiments: dict[str, Any] = {}
        self.runs: dict[str, Any] = {}
        self.asked: list[str] = []
        self.started: Callable[[Any, str], None] = lambda *_: None
        """called with each new run and its pipeline's text"""
        self._codec = api.ApiClient()
        self._one = threading.Lock()
        """held while a request is answered: KFP's database looks and writes in one step"""

    def plain(self, model: Any) -> Any:
        return self._codec.sanitize_for_serialization(model)

    def parse(self, content: bytes, model: str) -> Any:
        """The body of a request; 400 where it is not as published."""

        class Body:
            data = content

        made = self._codec.deserialize(Body, model)
        if self.plain(made) != json.loads(content):
            raise RefusedError(400, f"not a {model}: {content!r}")
        return made

    def answer(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes) -> Any:
        """What an authenticated request comes to."""
        self.asked.append(f"{method} {path}")
        if self.faults:
            raise RefusedError(*self.faults.pop(0))
        if self.token and headers["Authorization"] != f"Bearer {self.token}":
            raise RefusedError(401, "Request header error: there is no user identity header")
        if self.cookie and headers["Cookie"] != self.cookie:
            raise RefusedError(401, "Request header error: there is no user identity header")
        kind, _, rest = path.removeprefix(f"{PREFIX}/").partition("/")
        found = getattr(self, f"_{method.lower()}_{kind.partition(':')[0]}", None)
        if not path.startswith(PREFIX) or found is None:
            raise RefusedError(404, "Not Found")
        with self._one:
            return found(rest, query, headers, body)

    def _may(self, namespace: str | None) -> None:
        if not self.multi_user and namespace:
            raise RefusedError(
                400, "Invalid input error: In single-user mode, ListExperiment cannot filter by namespace"
            )
        if self.multi_user and namespace not in self.namespaces:
            told = f"User 'alice' is not authorized with reason: (request: namespace:\"{namespace}\")"
            raise RefusedError(403, told) if namespace else RefusedError(400, "Namespace is empty")

    def _get_healthz(self, *_: Any) -> Any:
        return api.V2beta1GetHealthzResponse(multi_user=self.multi_user, pipeline_store="database")

    def _page(self, key: str, items: list[Any], query: dict[str, str]) -> dict[str, Any]:
        for one in json.loads(query.get("filter", "{}")).get("predicates", ()):
            assert (one["operation"], one["key"]) == ("EQUALS", "display_name")
            items = [item for item in items if item.display_name == one["stringValue"]]
        items = [] if self.blind else items
        start = int(query.get("page_token") or 0)
        following = {"next_page_token": str(start + PAGE)} if start + PAGE < len(items) else {}
        return {
            key: [self.plain(one) for one in items[start : start + PAGE]],
            "total_size": len(items),
            **following,
        }

    def _get_pipelines(self, rest: str, query: dict[str, str], *_: Any) -> Any:
        if rest.startswith("names/"):
            self._may(query.get("namespace"))
            for one in self.pipelines.values():
                if one.name == rest.removeprefix("names/"):
                    return one
            raise RefusedError(404, "pipeline not found")
        found = [one for one in self.versions.values() if one.pipeline_id == rest.removesuffix("/versions")]
        return self._page("pipeline_versions", found, query)

    def _post_pipelines(self, rest: str, query: dict[str, str], headers: Any, body: bytes) -> Any:
        if rest == "upload_version":
            return self._upload(query, headers, body)
        made = self.parse(body, "V2beta1Pipeline")
        self._may(made.namespace)
        if any(one.name == made.name for one in self.pipelines.values()):
            raise RefusedError(409, f"The name {made.name} already exist. Please specify a new name")
        made.pipeline_id = uuid.uuid4().hex
        self.pipelines[made.pipeline_id] = made
        return made

    def _upload(self, query: dict[str, str], headers: Any, body: bytes) -> Any:
        if not NAME.fullmatch(query["name"]) or query["pipelineid"] not in self.pipelines:
            raise RefusedError(400, "Invalid input error")
        if any(one.name == query["name"] for one in self.versions.values()):
            raise RefusedError(409, f"The name {query['name']} already exist. Please specify a new name")
        form = email.message_from_bytes(
            b"Content-Type: " + headers["Content-Type"].encode() + b"\r\n\r\n" + body,
            policy=email.policy.HTTP,
        )
        (file,) = form.iter_parts()
        assert file.get_param("name", header="content-disposition") == "uploadfile"
        made = api.V2beta1PipelineVersion(
            pipeline_id=query["pipelineid"], pipeline_version_id=uuid.uuid4().hex, name=query["name"],
            display_name=query["display_name"],
        )  # fmt: skip
        self.texts[made.pipeline_version_id] = file.get_payload(decode=True).decode()
        self.versions[made.pipeline_version_id] = made
        return made

    def _get_experiments(self, _: str, query: dict[str, str], *__: Any) -> Any:
        self._may(query.get("namespace"))
        return self._page("experiments", list(self.experiments.values()), query)

    def _post_experiments(self, _: str, __: Any, ___: Any, body: bytes) -> Any:
        made = self.parse(body, "V2beta1Experiment")
        self._may(made.namespace)
        if any(one.display_name == made.display_name for one in self.experiments.values()):
            raise RefusedError(409, "Already exist error")
        made.experiment_id = uuid.uuid4().hex
        self.experiments[made.experiment_id] = made
        return made

    def _get_runs(self, rest: str, query: dict[str, str], *_: Any) -> Any:
        if rest:
            return self._run(rest)
        assert query["sort_by"] == "created_at desc"
        found = [one for one in self.runs.values() if one.experiment_id == query["experiment_id"]]
        return self._page("runs", found[::-1], query)

    def _run(self, run: str) -> Any:
        if run not in self.runs:
            raise RefusedError(404, f"Failed to get a run: ResourceNotFoundError: Run {run} not found.")
        return self.runs[run]

    def _post_runs(self, rest: str, _: Any, __: Any, body: bytes) -> Any:
        run, _, verb = rest.partition(":")
        if verb == "terminate":
            self._run(run).state = "CANCELING"
            self._run(run).state_history = [api.V2beta1RuntimeStatus(state="CANCELING")]
            return {}
        made = self.parse(body, "V2beta1Run")
        if made.experiment_id not in self.experiments:
            raise RefusedError(404, "experiment not found")
        text = self.texts[made.pipeline_version_reference.pipeline_version_id]
        made.run_id, made.state, made.created_at = uuid.uuid4().hex, "PENDING", datetime.now(UTC)
        self.runs[made.run_id] = made
        self.started(made, text)
        return made

    @contextmanager
    def listening(self, certificate: Path | None = None) -> Iterator[str]:
        """Answer, over TLS with a ``certificate``; the address."""
        server, state = ThreadingHTTPServer(("127.0.0.1", 0), Handler), self
        server.state = state  # type: ignore[attr-defined]
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_address[1]}/pipeline"
        finally:
            server.shutdown()
            server.server_close()


class Handler(BaseHTTPRequestHandler):
    """HTTP around it, behind the path /pipeline."""

    def _handle(self) -> None:
        state: KubeflowServer = self.server.state  # type: ignore[attr-defined]
        split = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(split.query).items()}
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if state.page:
            self._send(200, state.page, state.kind)
            return
        try:
            path = split.path.removeprefix("/pipeline")
            status, content = 200, state.plain(state.answer(self.command, path, query, self.headers, body))
        except RefusedError as error:
            status, content = error.status, error.body(split.path)
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = _handle  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


RUN = """
import json, sys
from kfp import components, local
folder, arguments = sys.argv[1], json.loads(sys.argv[2])
runner = local.SubprocessRunner(use_venv=False)
local.init(runner, pipeline_root=f"{folder}/root", workspace_root=f"{folder}/workspace")
components.load_component_from_file(f"{folder}/pipeline.yaml")(**arguments)
"""


def execute(folder: Path, text: str, run: Any, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Run the uploaded pipeline here, as kfp runs one on this machine, and let ``run`` have its states."""
    folder.mkdir(parents=True)
    (folder / "pipeline.yaml").write_text(text)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder), json.dumps(run.runtime_config.parameters)],
            env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def follow() -> None:
        run.state = "RUNNING"
        while process.poll() is None:
            if run.state == "CANCELING":
                os.killpg(process.pid, 9)
            time.sleep(0.1)
        run.state = "FAILED" if process.returncode else "SUCCEEDED"  # of a cancelled run too, as Argo has it

    threading.Thread(target=follow, daemon=True).start()
    return process
