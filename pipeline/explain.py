"""Say what a sweep would compute, without starting anything: ``python -m pipeline.explain SWEEP``."""

from typing import Annotated

import typer

from components.store import State
from pipeline import preflight

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def explain(
    sweep: Annotated[str, typer.Argument(help="a name in pipeline/sweeps, or a YAML file")] = "smoke",
) -> None:
    """For each trial: finished, or computed and why."""
    with preflight.one_sentence():
        found = preflight.find_sweep(sweep)
        store = preflight.set_environment()
    trials = found.trials()
    width, todo = max(map(len, trials)), 0
    for name, trial in trials.items():
        state, trained = store.state(trial.key()), (store.trial(trial.key()) / "model").exists()
        todo += state.name != "finished"
        print(f"{name:{width}}  {_told(state, trained)}")
    print(f"{todo} of {len(trials)} trials to compute; the store is {store.root}")


def _told(state: State, trained: bool) -> str:
    if state.name == "interrupted" and trained:
        return "interrupted after its training: it is only evaluated and analysed"
    return {
        "finished": "finished: it is not computed again",
        "failed": f"failed before ({state.reason}): it is tried again",
        "interrupted": "interrupted before: it starts again",
        "new": "new: the store has no trial with this configuration, data and numerics",
    }[state.name]


if __name__ == "__main__":
    app()
