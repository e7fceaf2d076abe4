"""A connection to Kubeflow Pipelines: its address, the credentials, and errors in one sentence.

They come from ``KFP_HOST``, ``KFP_NAMESPACE``, ``KFP_CA`` and ``KFP_TOKEN`` or ``KFP_COOKIE``. All but the last two
can stand in the profile; those are never written to a file of this project.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kfp_server_api as api
from urllib3.exceptions import HTTPError

from dvq import DvqError
from pipeline.profile import Cluster

TIMEOUT = (5, 60)
"""Seconds to connect, and for an answer."""
REMEDIES = {
    "exceeded quota|RESOURCE_EXHAUSTED": "ask for more quota, or lower JOBS or what the profile asks for",
    "ImagePullBackOff|ErrImagePull|InvalidImageName": "make image PUSH=1, and pull_secrets in the profile",
    r"(secret|configmap) \"?[\w.-]+\"? not found": "kubectl apply -k k8s/runs in the runs' namespace",
    "OOMKilled": "raise memory in the profile",
    "PodSecurity": "see k8s/README.md for the level that the runs' namespace needs",
}
"""What to do about errors of a run's pods, by patterns in their messages."""


class UnreachableError(DvqError):
    """KFP does not answer, is busy, or has an error of its own; it may answer later."""


class Connection:
    """A connection to the Kubeflow Pipelines of a profile; DvqError unless it answers and admits us."""

    def __init__(self, cluster: Cluster) -> None:
        getenv = os.environ.get
        self.host = (getenv("KFP_HOST") or cluster.host).rstrip("/")
        self.namespace = getenv("KFP_NAMESPACE") or cluster.namespace or None
        self._token, self._cookie = getenv("KFP_TOKEN", "").strip(), getenv("KFP_COOKIE", "").strip()
        configuration = self._configuration(getenv("KFP_CA") or cluster.ca)
        self._client = api.ApiClient(configuration, cookie=self._cookie or None)
        self._check()

    def _configuration(self, ca: str) -> Any:
        if not self.host:
            raise DvqError(
                "ON=kfp: no Kubeflow Pipelines is named; set KFP_HOST=https://… or cluster.host in the profile"
            )
        try:
            parts = urlsplit(self.host)
        except ValueError:  # for example, brackets that are not closed
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DvqError(f"KFP_HOST = '{self.host}': give an address, https://host/path")
        if parts.password:
            raise DvqError(
                "KFP_HOST has a password in it, which logs would show; use KFP_TOKEN or KFP_COOKIE"
            )
        config = api.Configuration(host=self.host)
        config.retries = 2
        if ca:
            if not Path(ca).is_file():
                raise DvqError(f"KFP_CA = '{ca}': there is no such file of certificates")
            config.ssl_ca_cert = ca
        for name, value in (("KFP_TOKEN", self._token), ("KFP_COOKIE", self._cookie)):
            if not (value.isascii() and value.isprintable()):  # the client's own error would show it
                raise DvqError(
                    f"{name} holds a line break or another character that no header can; copy it anew"
                )
        if self._token:
            config.api_key["authorization"], config.api_key_prefix["authorization"] = (self._token, "Bearer")
        return config

    def _check(self) -> None:
        health = self._ask(api.HealthzServiceApi(self._client).healthz_service_get_healthz, allowed=404)
        if health is None:
            raise DvqError(f"{self}: there is no KFP API 2 there; KFP_HOST is the address before /apis")
        if health.multi_user and not self.namespace:
            raise DvqError(f"{self} has a namespace for each user; name yours: KFP_NAMESPACE")
        if not health.multi_user and self.namespace:
            raise DvqError(
                f"{self} is a plain installation, which has no namespaces for users: unset KFP_NAMESPACE "
                f"('{self.namespace}')"
            )

    def __str__(self) -> str:
        return f"Kubeflow Pipelines at {self.host}"

    def _ask(self, ask: Callable[..., Any], *arguments: Any, allowed: int = 0, **options: Any) -> Any:
        """The answer; None for an error with status ``allowed``; DvqError for another error, or an answer that is not
        KFP's."""
        answer = self._client.last_response = None
        try:
            answer = ask(*arguments, _request_timeout=TIMEOUT, **options)
        except api.ApiException as error:
            if not error.status:
                raise self._unreachable(error.reason or "") from None
            if error.status != allowed:
                raise self._refused(error) from None
            return None
        except HTTPError as error:
            raise self._unreachable(str(error)) from None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # of parsing the answer
            if self._client.last_response is None:
                raise
        response = self._client.last_response
        if response and "json" not in response.getheader("Content-Type", ""):  # a session may end at any time
            raise DvqError(
                f"{self} answers with a page to log in: set KFP_TOKEN, or KFP_COOKIE to its session's"
            )
        if answer is None:
            raise DvqError(f"{self} answers with what is no answer of KFP's API 2; is KFP_HOST right?")
        return answer

    def _unreachable(self, reason: str) -> DvqError:
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            return DvqError(
                f"{self}: its certificate is of no authority known here; name a file: KFP_CA=ca.pem"
            )
        if "too many redirects" in reason:
            return DvqError(f"{self} sends us on to log in: set KFP_TOKEN, or KFP_COOKIE to its session's")
        return UnreachableError(f"{self} does not answer; is KFP_HOST right, and the port-forward or VPN up?")

    def _refused(self, error: Any) -> DvqError:
        reason = _message(error)
        if error.status == 401 or (error.status == 403 and not self.namespace):
            refused = (
                "the token" if self._token else "the cookie" if self._cookie else "to answer without a token"
            )
            return DvqError(f"{self} refuses {refused} ({error.status}): set a valid KFP_TOKEN or KFP_COOKIE")
        if error.status == 403:
            return DvqError(
                f"{self} does not let you work in namespace '{self.namespace}': does it exist, and are you its "
                "owner or a contributor? (KFP_NAMESPACE)"
            )
        kind = UnreachableError if error.status == 429 or error.status >= 500 else DvqError
        return kind(f"{self} answers with an error ({error.status}: {reason}){remedy(reason)}")


def _message(error: Any) -> str:
    """The message in an error of the API."""
    try:
        content = json.loads(error.body)
        entries = (content, *(content.get("details") or ()))  # an upload's error has its message itself
        details = [entry.get("error_message") for entry in entries]
        return one_line(
            next(filter(None, details), "") or content.get("message") or content.get("error") or ""
        )
    except (TypeError, ValueError, AttributeError, RecursionError):
        return one_line(str(error.reason or "no reason"))


def one_line(text: str) -> str:
    """A server's text in one line, without characters that control the terminal."""
    printable = "".join(filter(str.isprintable, " ".join(text.split())))
    return printable if len(printable) <= 300 else f"{printable[:300]}…"


def remedy(message: str) -> str:
    remedies = [remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, message, re.IGNORECASE)]
    return f"; {remedies[0]}" if remedies else ""
