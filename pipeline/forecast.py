"""A forecast of what a sweep will take: trials, pods, and hours of GPUs by measured speeds.

The speed is that of finished trials in the store on the same kind of device: of the same configuration except seed
and steps, or else, as a guess, of the slowest of the same estimator or the profile's ``images_per_second``. Hours
count the time for which a GPU is held, for training and evaluations, by the trials' events.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.store import Store
from dvq import DvqError, events, fingerprints
from dvq.tables import complete
from dvq.trial import Trial, values
from pipeline.profile import TRAINS, Profile

HOLDING = ("training", "evaluating")
"""The states in which a trial holds its GPU."""
TASKS = 3
"""tasks of a trial"""
FROM_PROFILE = "the profile"
"""in place of the device that a speed was measured on"""


@dataclass(frozen=True)
class Plan:
    """What is to be computed, and how long that will take."""

    states: Mapping[str, int]
    """trials by state"""
    hours: float
    """of GPUs, or of CPUs where the profile has no GPU"""
    guessed: int
    """trials assumed to be as slow as the slowest of their estimator, or as the profile says"""
    unknown: tuple[str, ...]
    """trials whose speed is not known"""
    devices: tuple[str, ...]
    """the devices that speed was measured on"""


def devices(profile: Profile) -> float:
    """GPUs, or CPUs, that a trial holds."""
    if profile.gpu:
        return profile.gpu / (profile.cluster.sharing if profile.cluster else 1)
    return profile.cpu or 1


def unit(profile: Profile | None) -> str:
    return "GPU-hours" if profile and profile.gpu else "CPU-hours"


def seconds_held(folder: Path, since: float = 0.0) -> float:
    """Seconds for which the trial in ``folder`` held its device after the time ``since``."""
    seconds, last_time, state = 0.0, 0.0, ""
    for event in events.read(folder):
        begins = event.get("state") in HOLDING  # then the process that was at work before is gone
        if state in HOLDING and not begins:
            seconds += max(0.0, event["time"] - max(last_time, since))
        state = event.get("state", "" if event["kind"] == "failure" else state)
        last_time = event["time"]
    return seconds


def hours_spent(trials: Iterable[Trial], store: Store, profile: Profile, since: float) -> float:
    """Hours of devices that the trials held after the time ``since``."""
    return sum(seconds_held(store.trial(trial.key()), since) for trial in trials) * devices(profile) / 3600


def plan(trials: Mapping[str, Trial], store: Store, profile: Profile, fresh: bool = False) -> Plan:
    """Make the plan from the store; ``fresh``: use only the speeds of finished trials there."""
    keys = [trial.key() for trial in trials.values()]
    store.look(keys)
    done = {
        name for name, trial in trials.items() if not fresh and store.state(trial.key()).name == "finished"
    }
    kinds = {name: _kind(values(trial)) for name, trial in trials.items()}
    speeds, other_speeds = _measured(store.families(trials.values()), store, profile), dict[Kind, Speed]()
    if any(kinds[name] not in speeds for name in trials.keys() - done):
        with suppress(DvqError):  # what is wrong with another sweep's trials is not this one's concern
            store.look(store.keys())
            other_speeds = _measured(store.keys(), store, profile)
    states = {"finished": len(done), "going on": 0, "failed before": 0, "new": 0}
    seconds, guessed, unknown, used = 0.0, 0, [], set[str]()
    for name, trial in trials.items():
        if name in done:
            continue
        reached = 0 if fresh else store.reached_step(trial)
        failed = not fresh and store.state(trial.key()).name == "failed"
        states["failed before" if failed else "going on" if reached else "new"] += 1
        measured = speeds.get(kinds[name]) or other_speeds.get(kinds[name])
        speed = measured or _guess(trial, speeds, profile) or _guess(trial, other_speeds, profile)
        guessed += measured is None and speed is not None
        if speed is None:
            unknown.append(name)
        else:
            seconds += (trial.steps - reached) * trial.batch_size / speed[0]
            used.add(speed[1])
    measured_on = tuple(sorted(used - {FROM_PROFILE}))
    return Plan(states, seconds * devices(profile) / 3600, guessed, tuple(unknown), measured_on)


Kind = tuple[str, fingerprints.Shape, str]
"""what trials of the same speed have in common: estimator, the images' shape, and nearly all fields, as JSON"""
Speed = tuple[float, str]
"""images/s, evaluations included, and the device"""


def _measured(keys: Iterable[str], store: Store, profile: Profile) -> dict[Kind, Speed]:
    """The slowest measured speed of each :func:`_kind`, of the finished trials among ``keys``."""
    keys = [key for key in sorted(keys) if store.has(key, "results.json")]
    store.fetch(keys, "events", "results.json")
    device_kind, speeds = "cuda" if profile.gpu else "cpu", dict[Kind, Speed]()
    for key in keys:
        with suppress(DvqError, KeyError):  # a damaged one is left out
            result: dict[str, Any] = store.results(key) or {}
            device = result.get("provenance", {}).get("device", "")
            if device.startswith(device_kind):
                images = result["trial"]["steps"] * result["trial"]["batch_size"]
                seconds = max(seconds_held(store.trial(key)), result["training"]["seconds"])
                kind = _kind(complete(result["trial"]))
                speeds[kind] = min(speeds.get(kind, (float("inf"), "")), (images / seconds, device))
    return speeds


def _kind(fields: Mapping[str, Any]) -> Kind:
    deciding = {name: fields[name] for name in fields.keys() - {"seed", "steps", "autoregressive_steps"}}
    shape = fingerprints.shape(fields["data"])
    return fields["estimator"], shape, json.dumps(deciding, sort_keys=True)


def _guess(trial: Trial, speeds: Mapping[Kind, Speed], profile: Profile) -> Speed | None:
    name, shape = trial.estimator, trial.image_shape
    candidates = [speed for kind, speed in speeds.items() if kind[:2] == (name, shape)]
    if name in profile.images_per_second:
        candidates.append((profile.images_per_second[name], FROM_PROFILE))
    return min(candidates, default=None)


def check(forecast: Plan, budget: float | None, profile: Profile) -> None:
    """DvqError if the forecast is over the budget, or there can be none."""
    if budget is None:
        return
    name = unit(profile)
    if forecast.unknown:
        raise DvqError(
            f"a budget of {budget:g} {name} cannot be promised: no speed is known for {len(forecast.unknown)} of the "
            f"trials (the first: {forecast.unknown[0]}); run a short one of that configuration first, or give "
            "images_per_second in a profile (ON=docker, ON=kfp)"
        )
    if forecast.hours > budget:
        raise DvqError(
            f"the forecast of {forecast.hours:.2f} {name} is over the budget of {budget:g}: raise BUDGET, or shorten "
            "the sweep; nothing was started"
        )


def lines(forecast: Plan, profile: Profile, jobs: int, image: str, budget: float | None) -> list[str]:
    """The plan, as it is printed."""
    todo = sum(forecast.states.values()) - forecast.states["finished"]
    trials = f"trials   {', '.join(f'{n} {state}' for state, n in forecast.states.items() if n)}"
    if not todo:
        return [trials, "forecast nothing to compute"]
    at_once = min(jobs, todo)
    name = profile.cluster.accelerator if profile.cluster else "GPU"
    gpu = f"{profile.gpu} {name}" if profile.gpu else ""
    limits = (gpu, f"{profile.cpu:g} CPU" if profile.cpu else "", profile.memory or "")
    each = ", ".join(filter(None, limits))
    runs = -(-todo // profile.cluster.limit) if profile.cluster else 1
    driven = ", and a driver for each" if profile.cluster else ""
    hold = f"; {len(TRAINS)} of a trial's {TASKS} hold its GPU" if profile.cluster and profile.gpu else ""
    rows = [
        trials,
        f"at once  {at_once} trial{'s' * (at_once > 1)}" + (f", each {each}" if each else ""),
        f"{'pods' if profile.cluster else 'tasks':8} {TASKS * todo + 3 * runs}{driven}{hold}",
        f"devices  {at_once * devices(profile):g} {'GPU' if profile.gpu else 'CPU'} at most",
        f"image    {image}",
        f"forecast {_hours(forecast, profile, at_once)}",
    ]
    if runs > 1 and profile.cluster:
        rows.insert(1, f"runs     {runs}, each of {profile.cluster.limit} trials at most")
    return rows + ([f"budget   {budget:g} {unit(profile)}"] if budget else [])


def _hours(forecast: Plan, profile: Profile, at_once: int) -> str:
    todo = sum(forecast.states.values()) - forecast.states["finished"]
    if len(forecast.unknown) == todo:
        return "unknown: no trial like these was measured"
    wall = forecast.hours / devices(profile) / at_once
    text = f"{forecast.hours:.2f} {unit(profile)}, {wall:.2f} hours or more on the clock, by images/s measured on "
    text += ", ".join(forecast.devices) or "what the profile says"
    guessed = (
        f"; {forecast.guessed} trial{'s' * (forecast.guessed > 1)} taken as the slowest of their estimator"
        if forecast.guessed
        else ""
    )
    unknown = f"; and {len(forecast.unknown)} of which nothing is known" if forecast.unknown else ""
    return text + guessed + unknown
