"""Kubeflow Pipelines' API, by its own generated client: upload, run, look, cancel; errors of one sentence.

``KFP_HOST``, ``KFP_NAMESPACE``, ``KFP_CA`` and, never in a file of this project, ``KFP_TOKEN`` or ``KFP_COOKIE`` say
where it is and who asks; all but the last two can stand in the profile.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kfp_server_api as api
from urllib3.exceptions import HTTPError

from dvq import DvqError, __version__
from pipeline.profile import Cluster

TIMEOUT = (5, 60)
"""Seconds to connect, and for an answer."""
ATTEMPTS = 3
"""How often something is looked for that was made, or that another made at the same time."""
GOING = ("PENDING", "RUNNING", "PAUSED", "CANCELING")
SUCCEEDED = "SUCCEEDED"
REMEDIES = {
    "exceeded quota|RESOURCE_EXHAUSTED": "ask for more quota, or lower JOBS or what the profile asks for",
    "ImagePullBackOff|ErrImagePull|InvalidImageName": "make image PUSH=1, and pull_secrets in the profile",
    r"(secret|configmap) \"?[\w.-]+\"? not found": "kubectl apply -k k8s/runs in the runs' namespace",
    "OOMKilled": "raise memory in the profile",
    "PodSecurity": "see k8s/README.md for the level that the runs' namespace needs",
}
"""What to do about what a run's pods met."""


class UnreachableError(DvqError):
    """KFP does not answer; it may later."""


@dataclass(frozen=True)
class Run:
    """A run as it is now."""

    id: str
    state: str
    faults: tuple[str, ...] = ()
    """what its tasks met, each with a remedy where one is known"""

    @property
    def going(self) -> bool:
        return self.state in GOING


class Kubeflow:
    """The Kubeflow Pipelines of a profile; DvqError unless it answers and lets us in."""

    def __init__(self, cluster: Cluster) -> None:
        told = os.environ.get
        self.host = (told("KFP_HOST") or told("KF_PIPELINES_ENDPOINT") or cluster.host).rstrip("/")
        self.namespace = told("KFP_NAMESPACE") or cluster.namespace
        self._token, self._cookie = told("KFP_TOKEN", "").strip(), told("KFP_COOKIE", "").strip()
        self._client = api.ApiClient(
            self._configuration(told("KFP_CA") or cluster.ca), cookie=self._cookie or None
        )
        self._runs, self._uploads = (
            api.RunServiceApi(self._client),
            api.PipelineUploadServiceApi(self._client),
        )
        self._pipelines = api.PipelineServiceApi(self._client)
        self._experiments = api.ExperimentServiceApi(self._client)
        self._check()

    def _configuration(self, ca: str) -> Any:
        if not self.host:
            raise DvqError(
                "ON=kfp: no Kubeflow Pipelines is named; set KFP_HOST=https://… or cluster.host in the profile"
            )
        try:
            parts = urlsplit(self.host)
        except ValueError:  # of brackets that are not closed
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DvqError(f"KFP_HOST = '{self.host}': give an address, https://host/path")
        if parts.password:
            raise DvqError(
                "KFP_HOST has a password in it, which logs would show; use KFP_TOKEN or KFP_COOKIE"
            )
        made = api.Configuration(host=self.host)
        made.retries = 2
        if ca:
            if not Path(ca).is_file():
                raise DvqError(f"KFP_CA = '{ca}': there is no such file of certificates")
            made.ssl_ca_cert = ca
        if self._token:
            made.api_key["authorization"], made.api_key_prefix["authorization"] = self._token, "Bearer"
        return made

    def _check(self) -> None:
        ask = api.HealthzServiceApi(self._client).healthz_service_get_healthz_with_http_info
        try:
            health, _, headers = self._ask(ask)
        except api.ApiException as error:
            if error.status != 404:
                raise self._refused(error) from None
            raise DvqError(
                f"{self}: there is no KFP API 2 there; KFP_HOST is the address before /apis"
            ) from None
        if "json" not in headers.get("Content-Type", ""):
            raise DvqError(
                f"{self} answers with a page to log in: set KFP_TOKEN, or KFP_COOKIE to its session's"
            )
        if health.multi_user and not self.namespace:
            raise DvqError(f"{self} has a namespace for each user; name yours: KFP_NAMESPACE")
        if not health.multi_user and self.namespace:
            raise DvqError(
                f"{self} is a plain installation, which has no namespaces for users: unset KFP_NAMESPACE "
                f"('{self.namespace}')"
            )

    def __str__(self) -> str:
        return f"Kubeflow Pipelines at {self.host}"

    def _ask(self, ask: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """The answer; ApiException if it is an error."""
        if self.namespace and "namespace" in named and named["namespace"] is None:
            named["namespace"] = self.namespace
        given = {name: value for name, value in named.items() if value is not None}
        try:
            return ask(*arguments, _request_timeout=TIMEOUT, **given)
        except api.ApiException as error:
            if error.status:
                raise
            raise self._unreachable(error.reason or "") from None
        except HTTPError as error:
            raise self._unreachable(str(error)) from None

    def _get(self, ask: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """The answer; DvqError if it is an error."""
        try:
            return self._ask(ask, *arguments, **named)
        except api.ApiException as error:
            raise self._refused(error) from None

    def _unreachable(self, told: str) -> DvqError:
        if "CERTIFICATE_VERIFY_FAILED" in told:
            return DvqError(
                f"{self}: its certificate is of no authority known here; name a file: KFP_CA=ca.pem"
            )
        if "too many redirects" in told:
            return DvqError(f"{self} sends us on to log in: set KFP_TOKEN, or KFP_COOKIE to its session's")
        return UnreachableError(f"{self} does not answer; is KFP_HOST right, and the port-forward or VPN up?")

    def _refused(self, error: Any) -> DvqError:
        reason = _message(error)
        if error.status == 401 or (error.status == 403 and not self.namespace):
            what = (
                "the token" if self._token else "the cookie" if self._cookie else "to answer without a token"
            )
            return DvqError(f"{self} refuses {what} ({error.status}): set a valid KFP_TOKEN or KFP_COOKIE")
        if error.status == 403:
            return DvqError(
                f"{self} does not let you work in namespace '{self.namespace}': does it exist, and are you its "
                "owner or a contributor? (KFP_NAMESPACE)"
            )
        told = f"{self} answers with an error ({error.status}: {reason})"
        if error.status in (502, 503, 504):
            return UnreachableError(told)
        return DvqError(f"{told}{_remedy(reason)}")

    def upload(self, text: str, name: str) -> tuple[str, str]:
        """The ids of the pipeline ``name`` and of its version whose text this is; what is not there is uploaded."""
        version = f"{__version__}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        pipeline = self._pipeline(name)
        for _ in range(ATTEMPTS):
            if found := self._version(pipeline, version):
                return pipeline, found
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, f"{name}.yaml")
                path.write_text(text, encoding="utf-8")
                upload = self._uploads.upload_pipeline_version
                self._unless_there(upload, str(path), name=version, display_name=version, pipelineid=pipeline)
        raise self._hidden(f"the version {version} of the pipeline '{name}'")

    def _hidden(self, what: str) -> DvqError:
        return DvqError(
            f"{self} took {what} and does not show it: may you list what is in namespace '{self.namespace}'?"
        )

    def _pipeline(self, name: str) -> str:
        """The pipeline's id; it is made if it is not there."""
        for _ in range(ATTEMPTS):
            try:
                found = self._ask(self._pipelines.pipeline_service_get_pipeline_by_name, name, namespace=None)
                return str(found.pipeline_id)
            except api.ApiException as error:
                if error.status != 404:
                    raise self._refused(error) from None
            made = api.V2beta1Pipeline(name=name, display_name=name, namespace=self.namespace or None)
            self._unless_there(self._pipelines.pipeline_service_create_pipeline, made)
        raise self._hidden(f"the pipeline '{name}'")

    def _unless_there(self, ask: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Create something that another may create at the same time."""
        try:
            self._ask(ask, *arguments, **named)
        except api.ApiException as error:
            if error.status != 409:
                raise self._refused(error) from None

    def _version(self, pipeline: str, name: str) -> str | None:
        ask = self._pipelines.pipeline_service_list_pipeline_versions
        for one in self._all(ask, "pipeline_versions", pipeline, filter=_named(name)):
            if name in (one.display_name, one.name):
                return str(one.pipeline_version_id)
        return None

    def _all(self, ask: Callable[..., Any], what: str, *arguments: Any, **named: Any) -> Iterator[Any]:
        """What all pages of a list have."""
        token: str | None = None
        while True:
            page = self._get(ask, *arguments, page_token=token, page_size=100, **named)
            yield from getattr(page, what) or ()
            token = page.next_page_token
            if not token:
                return

    def experiment(self, name: str) -> str:
        """The experiment's id; it is made if it is not there."""
        for _ in range(ATTEMPTS):
            ask = self._experiments.experiment_service_list_experiments
            for one in self._all(ask, "experiments", filter=_named(name), namespace=None):
                if one.display_name == name:
                    return str(one.experiment_id)
            made = api.V2beta1Experiment(display_name=name, namespace=self.namespace or None)
            self._unless_there(self._experiments.experiment_service_create_experiment, made)
        raise self._hidden(f"the experiment '{name}'")

    def start(
        self, name: str, experiment: str, version: tuple[str, str], arguments: dict[str, Any], account: str
    ) -> str:
        """Start a run; its id."""
        reference = api.V2beta1PipelineVersionReference(
            pipeline_id=version[0], pipeline_version_id=version[1]
        )
        run = api.V2beta1Run(
            experiment_id=experiment,
            display_name=name,
            pipeline_version_reference=reference,
            runtime_config=api.V2beta1RuntimeConfig(parameters=arguments),
            service_account=account or None,
        )
        return str(self._get(self._runs.run_service_create_run, run).run_id)

    def going(self, experiment: str) -> str | None:
        """The id of the experiment's latest run that has not ended, if there is one."""
        ask = self._runs.run_service_list_runs
        page = self._get(ask, experiment_id=experiment, sort_by="created_at desc", page_size=20)
        return next((str(one.run_id) for one in page.runs or () if one.state in GOING), None)

    def look(self, run: str) -> Run:
        """The run as it is."""
        found = self._get(self._runs.run_service_get_run, run)
        tasks = (found.run_details and found.run_details.task_details) or ()
        errors = [found.error, *(task.error for task in tasks if task.state == "FAILED")]
        told = dict.fromkeys(_line(error.message) for error in errors if error and error.message)
        return Run(run, found.state or "PENDING", tuple(f"{one}{_remedy(one)}" for one in told))

    def cancel(self, run: str) -> None:
        """End the run's pods; DvqError if there is no such run."""
        try:
            self._ask(self._runs.run_service_terminate_run, run)
        except api.ApiException as error:
            if error.status != 404:
                raise self._refused(error) from None
            raise DvqError(f"{self} has no run '{run}'; its id is what stands last in its link") from None

    def link(self, run: str) -> str:
        """The page of a run."""
        return f"{self.host}/#/runs/details/{run}"


def _named(name: str) -> str:
    """A filter of KFP's lists."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _message(error: Any) -> str:
    """What an error of the API says."""
    try:
        content = json.loads(error.body)
        said = (content, *(content.get("details") or ()))  # an upload's error has its message itself
        details = [one.get("error_message") for one in said]
        return _line(next(filter(None, details), "") or content.get("message") or content.get("error") or "")
    except (TypeError, ValueError, AttributeError):
        return _line(str(error.reason or "no reason"))


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]}…"


def _remedy(told: str) -> str:
    found = [remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, told, re.IGNORECASE)]
    return f"; {found[0]}" if found else ""
