"""Say what a sweep would compute, or what a finished trial's bits/dim is made of, without starting anything.

python -m pipeline.explain SWEEP [--trial NAME]
"""

from collections.abc import Mapping
from typing import Annotated

import typer

from components.folder import State
from components.store import Store
from dvq import DvqError
from dvq.fingerprints import CHANNELS
from dvq.trial import Trial
from pipeline import preflight
from pipeline.command import SweepName, application


def explain(
    name: SweepName = "smoke",
    trial: Annotated[str, typer.Option(help="a trial of the sweep, for its ledger")] = "",
) -> None:
    """Say of each trial whether it would be computed, and why; of one trial, where its bits go."""
    sweep = preflight.find_sweep(name)
    store = preflight.find_store()
    trials = sweep.trials()
    if trial:
        print(ledger(trial, trials, store, name))
        return
    width, todo = max(map(len, trials)), 0
    store.outcomes(trials)  # DvqError for results that are damaged, or of another default
    for trial_name, each in trials.items():
        key, reached = each.key(), store.reached_step(each)
        state, trained = store.state(key), store.has(key, "model")
        todo += state.name != "finished"
        print(f"{trial_name:{width}}  {_description(state, trained, reached)}")
    print(f"{todo} of {len(trials)} trials to compute; the store is {store.place}")


def _description(state: State, trained: bool, reached: int) -> str:
    start = f"goes on from step {reached}" if reached else "starts from the beginning"
    beginning = f"it {start} of another trial" if reached else "computed from the beginning"
    if trained:
        start = "is only evaluated and analysed"
    return {
        "finished": "finished: it is not computed again",
        "failed": f"failed before ({state.reason}): it is tried again and {start}",
        "interrupted": f"begun and not finished: it {start}",
        "new": f"new: {beginning}",
    }[state.name]


def ledger(name: str, trials: Mapping[str, Trial], store: Store, sweep: str) -> str:
    """The bits of each latent variable and of each colour channel, which add up to the trial's bits/dim."""
    if name not in trials:
        raise DvqError(f"the sweep has no trial '{name}'; its trials: {', '.join(trials)}")
    key = trials[name].key()
    store.look([key], "results.json", "model")
    results = store.finished(trials[name])
    if results is None:
        state = store.state(key)
        outcome = f"failed ({state.reason})" if state.name == "failed" else "is not finished"
        raise DvqError(f"trial '{name}' {outcome}: make submit-sweep SWEEP={sweep} tries it")
    evaluation = results["evaluation"]
    latents = enumerate(evaluation["ledger"]["latents"], start=1)  # as the figures count them
    entries = [(f"latent variable k = {k}", bits, "") for k, bits in latents]
    channels = evaluation["ledger"]["channels"]
    entries += [(colour, bits, "") for colour, bits in zip(CHANNELS[len(channels)], channels, strict=True)]
    entries.append(("rate", evaluation["rate"], "the latent variables' sum"))
    entries.append(("distortion", evaluation["distortion"], "the channels' sum"))
    error = f"± {evaluation['bits_per_dim_se']:.5f} over {evaluation['images']} images"
    entries.append(("bits/dim", evaluation["bits_per_dim"], error))
    if "fitted_bits_per_dim" in evaluation:
        entries.append(("fitted", evaluation["fitted_bits_per_dim"], "prior and statistics estimated anew"))
    if "autoregressive_bits_per_dim" in evaluation:
        about = f"under an autoregressive prior, rate {evaluation['rate_autoregressive']:.5f}"
        entries.append(("AR prior", evaluation["autoregressive_bits_per_dim"], about))
    if "bound" in evaluation:
        entries.append(("L_S", evaluation["bound"], f"S = {evaluation['bound_samples']}"))
    lines = [f"{name} on {results['data']['label']}, split {evaluation['split']}, in bits/dim"]
    lines += [f"  {entry:21} {bits:9.5f}  {about}".rstrip() for entry, bits, about in entries]
    model = store.trial(key) / "model"
    if model.is_dir():
        lines.append(f'its model: dvq.load("{model}")')
    return "\n".join(lines)


app = application(explain)

if __name__ == "__main__":
    app()
