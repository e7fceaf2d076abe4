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
from pipeline.connection import Connection, line, remedy
from pipeline.profile import Cluster

ATTEMPTS = 3
"""How often something that we made, or that another made at the same time, is looked for."""
GOING = ("PENDING", "RUNNING", "PAUSED", "CANCELING")
SUCCEEDED = "SUCCEEDED"


@dataclass(frozen=True)
class Run:
    """A run as it is now."""

    id: str
    state: str
    faults: tuple[str, ...] = ()
    """its tasks' errors, each with a remedy if one is known"""

    @property
    def going(self) -> bool:
        return self.state in GOING


class Kubeflow(Connection):
    """The Kubeflow Pipelines of a profile; DvqError unless it answers and lets us in."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self._account = cluster.service_account
        self._runs = api.RunServiceApi(self._client)
        self._uploads = api.PipelineUploadServiceApi(self._client)
        self._pipelines = api.PipelineServiceApi(self._client)
        self._experiments = api.ExperimentServiceApi(self._client)

    def upload(self, text: str, name: str) -> tuple[str, str]:
        """The ids of the pipeline ``name`` and of its version with this text; what is not there is uploaded."""
        version = f"{__version__}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        pipeline = self._pipeline(name)

        def find() -> str | None:
            ask = self._pipelines.pipeline_service_list_pipeline_versions
            found = self._all(ask, "pipeline_versions", pipeline, filter=_named(version))
            ours = (one for one in found if version in (one.display_name, one.name))
            return next((str(one.pipeline_version_id) for one in ours), None)

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.yaml")
            path.write_text(text, encoding="utf-8")
            named = {"name": version, "display_name": version, "pipelineid": pipeline}
            make = partial(self._uploads.upload_pipeline_version, str(path), **named)
            return pipeline, self._made(f"the version {version} of the pipeline '{name}'", find, make)

    def _pipeline(self, name: str) -> str:
        """The pipeline's id; it is made if it is not there."""

        def find() -> str | None:
            ask = self._pipelines.pipeline_service_get_pipeline_by_name
            found = self._ask(ask, name, but=404, namespace=self.namespace)
            return found and str(found.pipeline_id)

        made = api.V2beta1Pipeline(name=name, display_name=name, namespace=self.namespace)
        make = partial(self._pipelines.pipeline_service_create_pipeline, made)
        return self._made(f"the pipeline '{name}'", find, make)

    def _made(self, what: str, find: Callable[[], str | None], make: Callable[..., Any]) -> str:
        """The id that ``find`` returns; if it finds nothing, we, or another at the same time, ``make`` it."""
        for _ in range(ATTEMPTS):
            if found := find():
                return found
            self._ask(make, but=409)
        where = f" in namespace '{self.namespace}'" if self.namespace else ""
        raise DvqError(f"{self} took {what} and does not show it: may you list what is there{where}?")

    def _all(self, ask: Callable[..., Any], what: str, *arguments: Any, **named: Any) -> Iterator[Any]:
        """The items on all pages of a list."""
        token: str | None = None
        while True:
            page = self._ask(ask, *arguments, page_token=token, page_size=100, **named)
            yield from getattr(page, what) or ()
            token = page.next_page_token
            if not token:
                return

    def experiment(self, name: str) -> str:
        """The experiment's id; it is made if it is not there."""

        def find() -> str | None:
            ask = self._experiments.experiment_service_list_experiments
            found = self._all(ask, "experiments", filter=_named(name), namespace=self.namespace)
            return next((str(one.experiment_id) for one in found if one.display_name == name), None)

        made = api.V2beta1Experiment(display_name=name, namespace=self.namespace)
        make = partial(self._experiments.experiment_service_create_experiment, made)
        return self._made(f"the experiment '{name}'", find, make)

    def start(self, name: str, experiment: str, version: tuple[str, str], arguments: dict[str, Any]) -> str:
        """Start a run; its id."""
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
        return next((str(one.run_id) for one in page.runs or () if one.state in GOING), None)

    def look(self, run: str) -> Run:
        """The run as it is."""
        found = self._ask(self._runs.run_service_get_run, run)
        tasks = (found.run_details and found.run_details.task_details) or ()
        errors = [found.error, *(task.error for task in tasks if task.state == "FAILED")]
        messages = dict.fromkeys(line(error.message) for error in errors if error and error.message)
        return Run(run, found.state or "PENDING", tuple(f"{one}{remedy(one)}" for one in messages))

    def begun(self, run: str) -> float:
        """When the run was made, by the cluster's clock [seconds since 1970]."""
        made: datetime = self._ask(self._runs.run_service_get_run, run).created_at
        return made.timestamp()

    def cancel(self, run: str) -> None:
        """End the run's pods; DvqError if there is no such run."""
        if self._ask(self._runs.run_service_terminate_run, run, but=404) is None:
            raise DvqError(f"{self} has no run '{run}'; its id is what stands last in its link")

    def link(self, run: str) -> str:
        """The page of a run."""
        return f"{self.host}/#/runs/details/{run}"


def _named(name: str) -> str:
    """A filter of KFP's lists."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})
