"""End a run on a cluster: ``python -m pipeline.cancel RUN``."""

from typing import Annotated

import typer

from dvq import DvqError
from pipeline.command import ProfileName, application
from pipeline.kubeflow import Kubeflow
from pipeline.profile import DEFAULTS, find_profile


def cancel(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="the run's id, or the link to it")],
    profile: ProfileName = "",
) -> None:
    """End a run on the cluster; what its trials have done is kept."""
    run = run_id.rstrip("/").rpartition("/")[2].partition("?")[0]
    if not run:
        raise DvqError("name the run: make cancel RUN=its id, which stands last in its link")
    limits = find_profile(profile or DEFAULTS["kfp"])
    if limits.cluster is None:
        raise DvqError(f"the profile '{profile}' has no 'cluster'")
    Kubeflow(limits.cluster).cancel(run)
    print(f"cancelled {run}; the same submit-sweep goes on with what its trials have done")


app = application(cancel)

if __name__ == "__main__":
    app()
