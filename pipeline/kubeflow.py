"""Kubeflow Pipelines' API, by its own generated client: upload, run, look, cancel."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import kfp_server_api as api

from dvq import DvqError, __version__
from pipeline.connection import Connection, one_line, remedy
from pipeline.profile import Cluster

ATTEMPTS = 3
"""How often something is looked for that we, or somebody at the same time, made."""
SUCCEEDED, FAILED, CANCELING, CANCELED = "SUCCEEDED", "FAILED", "CANCELING", "CANCELED"
ENDED = (SUCCEEDED, "SKIPPED", FAILED, CANCELED)
"""A run in any other state goes on, also in none: KFP has no state, or RUNTIME_STATE_UNSPECIFIED, of a run that Argo
has not looked at yet."""


@dataclass(frozen=True)
class Run:
    """A run as it is now."""

    id: str
    state: str
    faults: tuple[str, ...] = ()
    """its tasks' errors, each with a remedy if one is known"""

    @property
    def going(self) -> bool:
        return self.state not in ENDED


class Kubeflow(Connection):
    """The Kubeflow Pipelines of a profile; DvqError unless it answers and admits us."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self._account = cluster.service_account
        self._cancelled = set[str]()  # runs that were seen to be
        self._runs = api.RunServiceApi(self._client)
        self._uploads = api.PipelineUploadServiceApi(self._client)
        self._pipelines = api.PipelineServiceApi(self._client)
        self._experiments = api.ExperimentServiceApi(self._client)

    def upload(self, text: str, name: str) -> tuple[str, str]:
        """The ids of the pipeline ``name`` and of its version with this text, which are uploaded if missing."""
        version = f"{__version__}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        pipeline = self._pipeline(name)

        def find() -> str | None:
            ask = self._pipelines.pipeline_service_list_pipeline_versions
            versions = self._items(ask, "pipeline_versions", pipeline, filter=_named(version))
            ours = (item for item in versions if version in (item.display_name, item.name))
            return next((str(item.pipeline_version_id) for item in ours), None)

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.yaml")
            path.write_text(text, encoding="utf-8")
            names = {"name": version, "display_name": version, "pipelineid": pipeline}
            make = partial(self._uploads.upload_pipeline_version, str(path), **names)
            return pipeline, self._find_or_make(f"the version {version} of the pipeline '{name}'", find, make)

    def _pipeline(self, name: str) -> str:
        """The pipeline's id; it is made if missing."""

        def find() -> str | None:
            ask = self._pipelines.pipeline_service_get_pipeline_by_name
            pipeline = self._ask(ask, name, allowed=404, namespace=self.namespace)
            return pipeline and str(pipeline.pipeline_id)

        request = api.V2beta1Pipeline(name=name, display_name=name, namespace=self.namespace)
        make = partial(self._pipelines.pipeline_service_create_pipeline, request)
        return self._find_or_make(f"the pipeline '{name}'", find, make)

    def _find_or_make(self, what: str, find: Callable[[], str | None], make: Callable[..., Any]) -> str:
        """The id that ``find`` returns, after ``make`` if it finds nothing; somebody else may make it first."""
        for _ in range(ATTEMPTS):
            if found := find():
                return found
            self._ask(make, allowed=409)
        where = f" in namespace '{self.namespace}'" if self.namespace else ""
        raise DvqError(f"{self} took {what} and does not show it: may you list what is there{where}?")

    def _items(self, ask: Callable[..., Any], what: str, *arguments: Any, **named: Any) -> Iterator[Any]:
        """The items on all pages of a list."""
        token: str | None = None
        while True:
            page = self._ask(ask, *arguments, page_token=token, page_size=100, **named)
            yield from getattr(page, what) or ()
            token = page.next_page_token
            if not token:
                return

    def experiment(self, name: str) -> str:
        """The experiment's id; it is made if missing."""

        def find() -> str | None:
            ask = self._experiments.experiment_service_list_experiments
            experiments = self._items(ask, "experiments", filter=_named(name), namespace=self.namespace)
            return next((str(item.experiment_id) for item in experiments if item.display_name == name), None)

        request = api.V2beta1Experiment(display_name=name, namespace=self.namespace)
        make = partial(self._experiments.experiment_service_create_experiment, request)
        return self._find_or_make(f"the experiment '{name}'", find, make)

    def start(self, name: str, experiment: str, version: tuple[str, str], arguments: dict[str, Any]) -> str:
        """Start a run; returns its id."""
        reference = api.V2beta1PipelineVersionReference(
            pipeline_id=version[0], pipeline_version_id=version[1]
        )
        run = api.V2beta1Run(
            experiment_id=experiment,
            display_name=name,
            pipeline_version_reference=reference,
            runtime_config=api.V2beta1RuntimeConfig(parameters=arguments),
            service_account=self._account or None,
        )
        return str(self._ask(self._runs.run_service_create_run, run).run_id)

    def going(self, experiment: str) -> str | None:
        """The id of the experiment's latest run that has not ended, if there is one."""
        ask = self._runs.run_service_list_runs
        page = self._ask(ask, experiment_id=experiment, sort_by="created_at desc", page_size=20)
        return next((str(run.run_id) for run in page.runs or () if run.state not in ENDED), None)

    def look(self, run: str) -> Run:
        """The run as it is. One that was cancelled, here or on KFP's pages, is CANCELED; KFP has it CANCELING, and in
        the end FAILED, as Argo has it."""
        response = self._ask(self._runs.run_service_get_run, run)
        state = response.state or "PENDING"
        if CANCELING in (state, *(past.state for past in response.state_history or ())):
            self._cancelled.add(run)
        if state == FAILED and run in self._cancelled:
            state = CANCELED
        tasks = (response.run_details and response.run_details.task_details) or ()
        errors = [response.error, *(task.error for task in tasks if task.state == FAILED)]
        messages = dict.fromkeys(one_line(error.message) for error in errors if error and error.message)
        return Run(run, state, tuple(f"{message}{remedy(message)}" for message in messages))

    def created_at(self, run: str) -> float:
        """When the run was made, by the cluster's clock [seconds since 1970]."""
        created: datetime = self._ask(self._runs.run_service_get_run, run).created_at
        return created.timestamp()

    def cancel(self, run: str) -> None:
        """End the run's pods; DvqError if there is no such run."""
        if self._ask(self._runs.run_service_terminate_run, run, allowed=404) is None:
            raise DvqError(f"{self} has no run '{run}'; its id is what stands last in its link")

    def link(self, run: str) -> str:
        """The page of a run."""
        return f"{self.host}/#/runs/details/{run}"


def _named(name: str) -> str:
    """A filter of KFP's lists."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})
