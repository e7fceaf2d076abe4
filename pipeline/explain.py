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


def explain(
    sweep: preflight.SweepName = "smoke",
    trial: Annotated[str, typer.Option(help="a trial of the sweep, for its ledger")] = "",
) -> None:
    """For each trial: finished, or computed and why; for one trial, where its bits go."""
    found = preflight.find_sweep(sweep)
    store = preflight.find_store()
    trials = found.trials()
    store.look([one.key() for one in trials.values()], "results.json")
    if trial:
        print(ledger(trial, trials, store, sweep))
        return
    width, todo = max(map(len, trials)), 0
    store.outcomes(trials)  # DvqError for results that are damaged, or of another default
    for name, one in trials.items():
        state, trained = store.state(one.key()), store.has(one.key(), "model")
        reached = store.reached_step(one)
        todo += state.name != "finished"
        print(f"{name:{width}}  {_told(state, trained, reached)}")
    print(f"{todo} of {len(trials)} trials to compute; the store is {store.place}")


def _told(state: State, trained: bool, reached: int) -> str:
    start = f"goes on from step {reached}" if reached else "starts from the beginning"
    new = f"it {start} of another trial" if reached else "computed from the beginning"
    if trained:
        start = "is only evaluated and analysed"
    return {
        "finished": "finished: it is not computed again",
        "failed": f"failed before ({state.reason}): it is tried again and {start}",
        "interrupted": f"begun and not finished: it {start}",
        "new": f"new: {new}",
    }[state.name]


def ledger(name: str, trials: Mapping[str, Trial], store: Store, sweep: str) -> str:
    """The bits of each latent variable and of each colour channel, which add up to the trial's bits/dim."""
    if name not in trials:
        raise DvqError(f"the sweep has no trial '{name}'; its trials: {', '.join(trials)}")
    key = trials[name].key()
    results = store.finished(trials[name])
    if results is None:
        state = store.state(key)
        told = f"failed ({state.reason})" if state.name == "failed" else "is not finished"
        raise DvqError(f"trial '{name}' {told}: make submit-sweep SWEEP={sweep} tries it")
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
        told = f"under an autoregressive prior, rate {evaluation['rate_autoregressive']:.5f}"
        entries.append(("AR prior", evaluation["autoregressive_bits_per_dim"], told))
    if "bound" in evaluation:
        entries.append(("L_S", evaluation["bound"], f"S = {evaluation['bound_samples']}"))
    lines = [f"{name} on {results['data']['label']}, split {evaluation['split']}, in bits/dim"]
    lines += [f"  {entry:21} {bits:9.5f}  {told}".rstrip() for entry, bits, told in entries]
    model = store.trial(key) / "model"
    if model.is_dir():
        lines.append(f'its model: dvq.load("{model}")')
    return "\n".join(lines)


app = preflight.application(explain)

if __name__ == "__main__":
    app()
