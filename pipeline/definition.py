"""The sweep as a Kubeflow pipeline: one definition for all places where it runs.

    plan ────────────┐
    prepare_data ─ trials: for each trial: train → evaluate → analyze ─ report

Its shape runs alike in kfp's local runners and on a cluster. Each rule below avoids a fault that kfp 2.17 does not
report (the guard tests in tests/pipeline/test_kfp.py fail if one of these faults changes):

- Only pipeline parameters, artifacts and the loop's own item enter the loop: another task's output parameter would be
  replaced by the item.
- Nothing is collected from the loop. A trial's failure is data in the store, which ``report`` reads.
- The loop is in a pipeline of its own, because a loop gets no exit hook on a cluster; ``report`` depends on that
  pipeline alone, because with ``ignore_upstream_failure`` it would run once for each dependency.
- kfp's cache is off: it does not see the package's code. The store is the cache.
"""

from collections.abc import Callable
from typing import Any

from kfp import dsl
from kfp.dsl import Dataset, Input

from components import IMAGE
from components.analyze.component import analyze
from components.evaluate.component import evaluate
from components.plan.component import plan
from components.prepare_data.component import prepare_data
from components.report.component import report
from components.train.component import train

NAME = "dvq-sweep"
COMPONENTS: dict[str, Any] = {
    component.python_func.__name__: component
    for component in (plan, prepare_data, train, evaluate, analyze, report)
}


def sweep_pipeline(
    jobs: int,
    image: str = IMAGE,
    settle: Callable[[Any, str], Any] | None = None,
    ttl: int | None = None,
    limit: int = 0,
) -> Any:
    """The pipeline that computes a sweep.

    Its parameters: ``sweep`` (JSON of dvq.sweep.Sweep), ``base`` (JSON of what all its trials share),
    ``data_name`` and ``source`` (as prepare_data takes them), ``experiment`` (the name in MLflow).

    Args:
        jobs: trials at a time, a constant for kfp.
        image: the image of all tasks.
        settle: adds to a task, given its component's name, the settings of the place where it runs.
        ttl: seconds after which a cluster removes the pods of a run that ended.
        limit: trials that a run computes, at most; 0 for all.
    """

    def task(component: Any, **arguments: Any) -> Any:
        configured = component(**arguments).set_caching_options(False).set_container_image(image)
        return settle(configured, component.python_func.__name__) if settle else configured

    @dsl.pipeline(name="trials")
    def trials(items: list[str], data: Input[Dataset], base: str, experiment: str) -> None:
        with dsl.ParallelFor(items, parallelism=jobs) as trial:
            trained = task(
                train, trial=trial, base=base, data=data, experiment=experiment, record_failure=True
            )
            model = trained.outputs["model"]
            evaluated = task(evaluate, data=data, model=model, record_failure=True)
            inputs = {"data": data, "model": model, "evaluation": evaluated.outputs["evaluation"]}
            task(analyze, **inputs, experiment=experiment, record_failure=True)

    @dsl.pipeline(name=NAME, pipeline_config=dsl.PipelineConfig(ttl_seconds_after_finished=ttl))
    def dvq_sweep(sweep: str, base: str, data_name: str, source: str, experiment: str) -> None:
        # Without the experiment: report sends finished trials that MLflow lacks, and they need no tasks.
        items = task(plan, sweep=sweep, **({"limit": limit} if limit else {}))
        data = task(prepare_data, name=data_name, source=source)
        all_trials = trials(items=items.output, data=data.output, base=base, experiment=experiment)
        task(report, sweep=sweep).after(all_trials).ignore_upstream_failure()

    return dvq_sweep
