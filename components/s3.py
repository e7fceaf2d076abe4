"""A connection to S3 by boto3: operations that outlast a server's restart, and errors of one sentence.

Endpoint, region and credentials come from the usual AWS variables and files; credentials are never shown.
"""

import os
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dvq import DvqError

PATIENCE = 300.0
"""Seconds for which an operation is retried while the server does not answer, or says that it cannot."""
LONGEST_WAIT = 5.0
"""Seconds between two attempts, at most."""
THREADS = 8
"""Operations at once."""
TRANSIENT = {"RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "SlowDown"}
DAMAGED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch"}
"""What arrived is not what was sent."""
FULL = {"XMinioStorageFull", "QuotaExceeded", "507"}
NOT_IMPLEMENTED = 501
UNTRUSTED = re.compile("certificate|No such file", re.IGNORECASE)
"""in a TLS error, of the server's certificate or of the file of those to trust"""
EXPIRED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
"""of credentials for a time, with status 400"""
URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*?))?/*")
R = TypeVar("R")


class ChangedError(Exception):
    """The object is not the one in a condition."""


class MissingError(DvqError):
    """There is no such object."""


class Connection:
    """A connection to a bucket, and to a prefix in it."""

    def __init__(self, url: str, variable: str) -> None:
        match = URL.fullmatch(url)
        if not match:
            shown = re.sub("//.*@", "//…@", url)  # without a password
            raise DvqError(
                f"{variable} = '{shown}': give s3://bucket/prefix, the bucket's name as S3 allows it"
            )
        self.name, self.prefix = match[1], f"{match[2]}/" if match[2] else ""
        self.patience = PATIENCE
        self._worked = self._announced = False

    def __str__(self) -> str:
        return f"s3://{self.name}/{self.prefix}".rstrip("/")

    @cached_property
    def client(self) -> Any:
        """boto3's client, which threads may share; its import takes a third of a second."""
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        credentials = [
            os.environ.get(f"AWS_{name}", "")
            for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")
        ]
        if not all(map(str.isprintable, credentials)):  # boto3 would report a server that does not answer
            raise DvqError(f"{self}: the AWS_* credentials hold a line break; set them anew")
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path" if "AWS_ENDPOINT_URL" in os.environ else "auto"},
            retries={"mode": "standard", "total_max_attempts": 1},  # the SDK's own give up within a second
            connect_timeout=3,
            read_timeout=30,
            max_pool_connections=2 * THREADS,
            tcp_keepalive=True,
            request_checksum_calculation="when_required",  # SHA-256 is given and checked instead of CRC-32
            response_checksum_validation="when_required",
        )
        try:
            session = boto3.Session()
            return session.client("s3", region_name=session.region_name or "us-east-1", config=config)
        except (BotoCoreError, ValueError) as error:
            raise DvqError(f"{self}: the AWS_* settings cannot be used ({type(error).__name__})") from None

    @property
    def server(self) -> str:
        """``S3 at host:port``, without credentials."""
        return f"S3 at {urlsplit(self.client.meta.endpoint_url).netloc.rpartition('@')[2]}"

    def call(self, operation: str, **arguments: Any) -> Any:
        """Call an operation of boto3's client on the bucket; it is retried while its error is transient."""
        operate = getattr(self.client, operation)
        return self.retry(lambda: operate(Bucket=self.name, **arguments))

    def retry(self, attempt: Callable[[], R]) -> R:
        """What ``attempt`` returns; it is retried while its error is transient.

        Raises:
            ChangedError: a condition does not hold.
            DvqError: S3 refuses for another reason, or the error did not pass.
        """
        import tenacity

        retrying = tenacity.Retrying(
            stop=lambda state: (state.seconds_since_start or 0) > self.patience,
            wait=tenacity.wait_exponential_jitter(multiplier=0.2, max=LONGEST_WAIT, jitter=0.2),
            retry=tenacity.retry_if_exception(self.is_transient),
            before_sleep=self._announce,
            reraise=True,
        )
        try:
            result = retrying(attempt)
        except Exception as error:
            translated = self._translated(error)
            self._worked = self._worked or isinstance(translated, MissingError | ChangedError)
            raise translated from None
        self._worked, self._announced = True, False
        return result

    def is_transient(self, error: BaseException) -> bool:
        """Whether the operation may succeed later, as it may if bucket, credentials and TLS have worked before."""
        from botocore.exceptions import ClientError, HTTPClientError
        from botocore.exceptions import ConnectionError as UnreachableError
        from botocore.exceptions import IncompleteReadError as CutShortError

        if _is_untrusted(error):
            return self._worked
        if not isinstance(error, ClientError):
            return isinstance(error, UnreachableError | HTTPClientError | CutShortError)
        status, code = _status_and_code(error)
        if self._worked and (status in (401, 403) or code in EXPIRED | {"NoSuchBucket"}):
            return code != "RequestTimeTooSkewed"
        failed = status >= 500 and status != NOT_IMPLEMENTED
        return failed or status == 429 or code in TRANSIENT | DAMAGED | FULL

    def _announce(self, state: Any) -> None:
        if not self._announced:
            self._announced = True
            translated = self._translated(state.outcome.exception())
            print(f"{translated}; trying again for {self.patience:.0f} s", flush=True)

    def _translated(self, error: BaseException) -> BaseException:
        """The error as one sentence, without credentials; other errors, which are bugs, as they are."""
        from botocore.exceptions import BotoCoreError, ClientError

        if isinstance(error, ClientError):
            return self._refusal(*_status_and_code(error))
        if isinstance(error, RecursionError):  # botocore's, which follows redirections without end
            return DvqError(f"{self.server} redirects; is AWS_ENDPOINT_URL right, https where it must be?")
        if not isinstance(error, BotoCoreError):
            return error
        if _is_untrusted(error):
            return DvqError(
                f"{self.server} has a certificate that is not trusted; AWS_CA_BUNDLE names a file of its authority's"
            )
        name = type(error).__name__
        if self.is_transient(error):
            return DvqError(f"{self.server} does not answer ({name}); is it up, and AWS_ENDPOINT_URL right?")
        remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or log in anew"
        return DvqError(f"{self.server}: there are no credentials to use ({name}); {remedy}")

    def _refusal(self, status: int, code: str) -> Exception:
        context = f"for bucket '{self.name}' ({status} {code})"
        if status == 412:
            return ChangedError()
        if code == "NoSuchBucket":
            return DvqError(f"{self.server} has no bucket '{self.name}'; create it, or name another")
        if status == 404:
            return MissingError(f"{self.server} does not have what was asked {context}")
        if code == "RequestTimeTooSkewed":
            return DvqError(f"{self.server} refuses: this machine's clock is wrong {context}; set the clock")
        if code in FULL:
            return DvqError(
                f"{self.server} is out of space {context}; make room, and the same command goes on"
            )
        if status in (401, 403) or code in EXPIRED:
            remedy = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do"
            return DvqError(f"{self.server} refuses the credentials {context}; {remedy}")
        if status == NOT_IMPLEMENTED:
            remedy = "take an S3 that has it, as Amazon's and SeaweedFS do"
            return DvqError(f"{self.server} lacks something that a store needs {context}; {remedy}")
        hint = ", as some servers do that are out of space" if status == 500 else ""
        if code == str(status):  # no word of S3's, as where a web page answers
            hint = "; is AWS_ENDPOINT_URL right?"
        return DvqError(f"{self.server} answers with an error {context}{hint}")


def _is_untrusted(error: BaseException) -> bool:
    from botocore.exceptions import SSLError

    return isinstance(error, SSLError) and bool(UNTRUSTED.search(str(error)))


def _status_and_code(error: Any) -> tuple[int, str]:
    """The HTTP status and S3's own code of an error."""
    response = error.response
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status, response.get("Error", {}).get("Code", "")
