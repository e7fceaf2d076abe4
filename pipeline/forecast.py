"""What a sweep will take, before it runs: trials, pods, and hours of GPUs by the speed that was measured.

The speed is that of the store's finished trials on the same kind of device: of the same configuration except seed and
steps, or else of the slowest of the same estimator, which is a guess, like the profile's ``images_per_second``. Hours
are those for which a GPU is held: training and every evaluation, by the trials' own events.
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

HELD = ("training", "evaluating")
"""The states in which a trial holds its GPU."""
TASKS = 3
"""of a trial"""
PROFILES = "the profile"
"""stands in the place of a device"""


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


def held(folder: Path, since: float = 0.0) -> float:
    """Seconds for which the trial in ``folder`` held its device after the time ``since``."""
    seconds, before, state = 0.0, 0.0, ""
    for event in events.read(folder):
        begins = event.get("state") in HELD  # whichever process was at work before is gone
        if state in HELD and not begins:
            seconds += max(0.0, event["time"] - max(before, since))
        state = event.get("state", "" if event["kind"] == "failure" else state)
        before = event["time"]
    return seconds


def spent(trials: Iterable[Trial], store: Store, profile: Profile, since: float) -> float:
    """Hours of devices that the trials held after the time ``since``."""
    return sum(held(store.trial(one.key()), since) for one in trials) * devices(profile) / 3600


def plan(trials: Mapping[str, Trial], store: Store, profile: Profile, fresh: bool = False) -> Plan:
    """Make the plan from what the store has; ``fresh``: as if it had nothing of the trials but their speed."""
    keys = [one.key() for one in trials.values()]
    store.look(keys)
    done = {name for name, one in trials.items() if not fresh and store.state(one.key()).name == "finished"}
    kinds = {name: _kind(values(one)) for name, one in trials.items()}
    known, others = _measured(store.families(trials.values()), store, profile), dict[Kind, Speed]()
    if any(kinds[name] not in known for name in trials.keys() - done):
        with suppress(DvqError):  # what is wrong with another sweep's trials is not this one's concern
            store.look(store.keys())
            others = _measured(store.keys(), store, profile)
    states = {"finished": len(done), "going on": 0, "failed before": 0, "new": 0}
    seconds, guessed, unknown, used = 0.0, 0, [], set[str]()
    for name, one in trials.items():
        if name in done:
            continue
        reached = 0 if fresh else store.reached_step(one)
        failed = not fresh and store.state(one.key()).name == "failed"
        states["failed before" if failed else "going on" if reached else "new"] += 1
        alike = known.get(kinds[name]) or others.get(kinds[name])
        like = alike or _guess(one, known, profile) or _guess(one, others, profile)
        guessed += alike is None and like is not None
        if like is None:
            unknown.append(name)
        else:
            seconds += (one.steps - reached) * one.batch_size / like[0]
            used.add(like[1])
    measured_on = tuple(sorted(used - {PROFILES}))
    return Plan(states, seconds * devices(profile) / 3600, guessed, tuple(unknown), measured_on)


Kind = tuple[str, fingerprints.Shape, str]
"""what trials of the same speed have in common: estimator, the images' shape, and nearly all fields, as JSON"""
Speed = tuple[float, str]
"""images/s, evaluations included, and the device"""


def _measured(keys: Iterable[str], store: Store, profile: Profile) -> dict[Kind, Speed]:
    """The slowest measured speed for each :func:`_kind`, of the finished trials among ``keys``."""
    keys = [key for key in sorted(keys) if store.has(key, "results.json")]
    store.follow(keys)
    place, found = "cuda" if profile.gpu else "cpu", dict[Kind, Speed]()
    for key in keys:
        with suppress(DvqError, KeyError):  # a damaged one is left out
            result: dict[str, Any] = store.results(key) or {}
            device = result.get("provenance", {}).get("device", "")
            if device.startswith(place):
                images = result["trial"]["steps"] * result["trial"]["batch_size"]
                seconds = max(held(store.trial(key)), result["training"]["seconds"])
                kind = _kind(complete(result["trial"]))
                found[kind] = min(found.get(kind, (float("inf"), "")), (images / seconds, device))
    return found


def _kind(fields: Mapping[str, Any]) -> Kind:
    decide = {name: fields[name] for name in fields.keys() - {"seed", "steps", "autoregressive_steps"}}
    shape = fingerprints.shape(fields["data"])
    return fields["estimator"], shape, json.dumps(decide, sort_keys=True)


def _guess(trial: Trial, known: Mapping[Kind, Speed], profile: Profile) -> Speed | None:
    name, shape = trial.estimator, trial.image_shape
    like = [speed for kind, speed in known.items() if kind[:2] == (name, shape)]
    if name in profile.images_per_second:
        like.append((profile.images_per_second[name], PROFILES))
    return min(like, default=None)


def check(found: Plan, budget: float | None, profile: Profile) -> None:
    """DvqError if the forecast is over the budget, or there can be none."""
    if budget is None:
        return
    name = unit(profile)
    if found.unknown:
        raise DvqError(
            f"a budget of {budget:g} {name} cannot be promised: no speed is known for {len(found.unknown)} of the "
            f"trials (the first: {found.unknown[0]}); run a short one of that configuration first, or give "
            "images_per_second in a profile (ON=docker, ON=kfp)"
        )
    if found.hours > budget:
        raise DvqError(
            f"the forecast of {found.hours:.2f} {name} is over the budget of {budget:g}: raise BUDGET, or shorten "
            "the sweep; nothing was started"
        )


def lines(found: Plan, profile: Profile, jobs: int, image: str, budget: float | None) -> list[str]:
    """The plan, as it is printed."""
    todo = sum(found.states.values()) - found.states["finished"]
    trials = f"trials   {', '.join(f'{n} {state}' for state, n in found.states.items() if n)}"
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
    told = [
        trials,
        f"at once  {at_once} trial{'s' * (at_once > 1)}" + (f", each {each}" if each else ""),
        f"{'pods' if profile.cluster else 'tasks':8} {TASKS * todo + 3 * runs}{driven}{hold}",
        f"devices  {at_once * devices(profile):g} {'GPU' if profile.gpu else 'CPU'} at most",
        f"image    {image}",
        f"forecast {_hours(found, profile, at_once)}",
    ]
    if runs > 1 and profile.cluster:
        told.insert(1, f"runs     {runs}, each of {profile.cluster.limit} trials at most")
    return told + ([f"budget   {budget:g} {unit(profile)}"] if budget else [])


def _hours(found: Plan, profile: Profile, at_once: int) -> str:
    todo = sum(found.states.values()) - found.states["finished"]
    if len(found.unknown) == todo:
        return "unknown: no trial like these was measured"
    wall = found.hours / devices(profile) / at_once
    told = (
        f"{found.hours:.2f} {unit(profile)}, {wall:.2f} hours or more on the clock, by images/s measured on "
    )
    told += ", ".join(found.devices) or "what the profile says"
    guessed = (
        f"; {found.guessed} trial{'s' * (found.guessed > 1)} taken as the slowest of their estimator"
        if found.guessed
        else ""
    )
    unknown = f"; and {len(found.unknown)} of which nothing is known" if found.unknown else ""
    return told + guessed + unknown
