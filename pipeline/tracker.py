"""Whether the MLflow that MLFLOW_TRACKING_URI names can be used, without importing MLflow, which takes seconds."""

import base64
import http.client
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import certifi

from components import mlflow_server
from dvq import DvqError

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
"""Schemes of MLflow's addresses."""
OTHER_LOGINS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4")
AUTHORITIES = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""The variables that name the certificates that MLflow's client trusts."""


def check() -> str:
    """Why MLflow's server does not answer, in a sentence; empty if it does.

    Raises:
        DvqError: it refuses name and password, or its address holds a password or is one that MLflow cannot use.
    """
    uri = os.environ["MLFLOW_TRACKING_URI"]
    if not uri:  # nothing is tracked
        return ""
    _check_address(uri)
    return _ask(uri) if uri.startswith("http") else ""


def require() -> None:
    """DvqError unless MLflow is named, and answers if it is a server."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    fault = check() if uri else "MLFLOW_TRACKING_URI is empty: nothing is tracked; unset it"
    if fault:
        raise DvqError(fault)


def _check_address(uri: str) -> None:
    if mlflow_server.redacted(uri) != uri:
        raise DvqError(
            "MLFLOW_TRACKING_URI has a password in it, which logs would show; a server's goes into "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, a database's to an MLflow server"
        )
    scheme = uri.partition(":")[0]
    if scheme.partition("+")[0] not in SCHEMES:
        raise DvqError(
            f"MLFLOW_TRACKING_URI = '{uri}': MLflow cannot use this address (a folder no more, since MLflow 3); "
            "give a server's, http://host:port, or a database's, sqlite:///path"
        )
    if uri.rstrip("/") == f"{scheme}:":
        raise DvqError(
            f"MLFLOW_TRACKING_URI = '{uri}': it names no server and nothing that stays; give http://host:port or sqlite:///path"
        )
    if scheme == "sqlite" and set("%?") & set(uri):
        raise DvqError(
            f"MLFLOW_TRACKING_URI = '{uri}': MLflow reads % and ? in a path as something else; move the project to a "
            "folder without them, or set MLFLOW_TRACKING_URI to sqlite:///path elsewhere"
        )


def _ask(uri: str) -> str:
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    try:
        request = urllib.request.Request(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search?max_results=1")
        if user:
            basic = base64.b64encode(f"{user}:{password}".encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {basic}")
        urllib.request.urlopen(request, timeout=5, context=_trust()).close()
    except urllib.error.HTTPError as error:
        if error.code != 401:
            return f"MLflow at {uri} answers with status {error.code}"
        # MLflow's other ways to log in.
        has_credentials = Path("~/.mlflow/credentials").expanduser().exists()
        if not has_credentials and not any(name.startswith(OTHER_LOGINS) for name in os.environ):
            raise DvqError(mlflow_server.REFUSED.format(uri)) from None
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            return f"MLflow at {uri} has a certificate that is not trusted; {AUTHORITIES[0]} names the authority's"
        return f"MLflow at {uri} does not answer"
    except ValueError as error:  # for example, brackets that are not closed
        raise DvqError(f"MLFLOW_TRACKING_URI is no address ({error}); give http://host:port") from None
    return ""


def _trust() -> ssl.SSLContext:
    """The certificates that MLflow's client trusts, which are not the system's."""
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        return ssl._create_unverified_context()
    path = next(filter(None, map(os.environ.get, AUTHORITIES)), certifi.where())
    try:
        if Path(path).is_dir():
            return ssl.create_default_context(capath=path)
        return ssl.create_default_context(cafile=path)
    except OSError as error:
        raise DvqError(
            f"the file of trusted certificates {path}, which {', '.join(AUTHORITIES)} may name, cannot be read "
            f"({error.strerror or error})"
        ) from None
