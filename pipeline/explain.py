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
    states = {name: store.state(trial.key()) for name, trial in trials.items()}
    width = max(map(len, trials))
    for name, state in states.items():
        print(f"{name:{width}}  {_told(state)}")
    todo = sum(state.name != "finished" for state in states.values())
    print(f"{todo} of {len(trials)} trials to compute; the store is {store.root}")


def _told(state: State) -> str:
    return {
        "finished": "finished: it is not computed again",
        "failed": f"failed before ({state.reason}): it is tried again",
        "interrupted": "interrupted before: it starts again",
        "new": "new: the store has no trial with this configuration, data and numerics",
    }[state.name]


if __name__ == "__main__":
    app()
