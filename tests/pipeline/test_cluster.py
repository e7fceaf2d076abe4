"""The sweep on a cluster: what is refused before anything is sent, and how it is followed and submitted again."""

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from docker.errors import NotFound
from rich.console import Console

from components import IMAGE
from components.folder import begin, write_json
from components.store import Store
from dvq import DvqError, data
from dvq.events import Events
from dvq.sweep import Sweep
from pipeline import cancel, cluster, conclusion, containers, forecast, image, submit
from pipeline.connection import UnreachableError
from pipeline.job import Job
from pipeline.kubeflow import Kubeflow, Run
from pipeline.profile import DEFAULTS, Cluster, Profile, find_profile
from tests.kubeflow_server import KubeflowServer, RefusedError

PLAIN = Profile(cpu=1, image="r.example.org/dvq:1", cluster=Cluster(pull_policy="Never"))
Make = Callable[..., Job]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KFP_NAMESPACE", "KFP_TOKEN", "KFP_COOKIE", "KFP_CA", "REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.org/")
    monkeypatch.setattr(cluster, "LOOK", 0.0)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def job(
        profile: Profile | None = PLAIN,
        place: str = "s3://dvq/store",
        seeds: int = 2,
        source: str = "",
        data: str = "cifar10-sample",
        description: str = "",
    ) -> Job:
        sweep = Sweep(
            name="s",
            description=description,
            base={"data": data, "steps": 100},
            grid={"estimator": ["vq-ema"]},
            seeds=list(range(seeds)),
        )
        store = Store(tmp_path / "store")
        store.place = place or store.place
        return Job(sweep, sweep.trials(), store, source, 2, tmp_path, profile)

    return job


def checkpoint(job: Job, step: int, seed: int = 0) -> None:
    """Let the store have one."""
    folder = job.store.trial(job.trials[f"vq-ema-c512-k8-s{seed}"].key()) / "checkpoints" / f"{step:09d}"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text("{}")


def finish(job: Job, seed: int) -> None:
    folder = job.store.trial(job.trials[f"vq-ema-c512-k8-s{seed}"].key())
    (folder / "results.json").write_text('{"evaluation": {"bits_per_dim": 7.0}}')


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_profile_without_a_cluster_is_refused(dry_run: bool) -> None:
    """Before a plan of it is printed, too."""
    with pytest.raises(DvqError, match="the profile has no 'cluster'; name one that has: PROFILE=nvidia"):
        submit.submit("smoke", on="kfp", profile="docker", dry_run=dry_run)


@pytest.mark.parametrize(
    ("job", "told"),
    [
        ({"place": ""}, "set DVQ_STORE=s3://bucket/prefix"),
        ({"description": "x" * 70000}, r"too large for one pipeline \(sweep: 69 KiB of 64\)"),
        (
            {
                "profile": PLAIN.model_copy(update={"cluster": Cluster(pull_policy="Never", limit=4000)}),
                "seeds": 4000,
            },
            r"the trials of a run: \d+ KiB of 64",
        ),
        ({"profile": Profile(cluster=Cluster())}, "name the registry of the image, REGISTRY="),
    ],
)
def test_what_cannot_run_there_is_refused(make: Make, job: dict[str, Any], told: str) -> None:
    with pytest.raises(DvqError, match=told):
        cluster.check(make(**job))


def test_an_image_that_was_not_pushed_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Images:
        images = None

        def get_registry_data(self, name: str) -> None:
            raise NotFound(f"manifest unknown: {name}")

    monkeypatch.setattr(containers, "connect", Images)
    Images.images = Images()  # type: ignore[assignment]
    pushed = PLAIN.model_copy(update={"cluster": Cluster()})
    with pytest.raises(DvqError, match=r"dvq:1 is not in its registry \(.*\): make image PUSH=1"):
        cluster.check(make(profile=pushed))

    def none() -> None:
        raise DvqError("no daemon")

    monkeypatch.setattr(containers, "connect", none)
    assert cluster.check(make(profile=pushed)).image == "r.example.org/dvq:1"


class Daemon:
    """A Docker daemon that has every image, and pushes."""

    def __init__(self) -> None:
        self.images, self.tagged, self.pushed = self, list[str](), list[str]()

    def get(self, _: str) -> "Daemon":
        return self

    def tag(self, name: str) -> None:
        self.tagged.append(name)

    def push(self, name: str, **_: Any) -> list[dict[str, str]]:
        assert name in self.tagged
        self.pushed.append(name)
        return []


@pytest.mark.parametrize("profile", ["", "gke", "kind", "docker"])
def test_what_is_pushed_is_what_the_sweep_and_the_manifests_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], profile: str
) -> None:
    """`make image PUSH=1`, then `submit-sweep ON=kfp`, each with that profile or without one."""
    monkeypatch.setenv("REGISTRY", "r.example.org/me")
    daemon = Daemon()
    monkeypatch.setattr(image, "connect", lambda: daemon)
    image.image(profile, True)
    wanted = image.name(find_profile(profile or DEFAULTS["kfp"]), pushed=True)
    assert capsys.readouterr().out.strip() == wanted
    assert daemon.pushed == [f"r.example.org/me/{IMAGE}", wanted]


KEPT = "tag invalid: The image tag '0.1.0' already exists … and cannot be overwritten because the tag is immutable."
"""Amazon's registry; Harbor's: "Failed to process request due to 'me/dvq:0.1.0' configured as immutable." """


def test_a_registry_that_lets_no_tag_be_overwritten_gets_each_new_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its release's tag stays what it was; the image's own tag, a hash of its content, can only be this image's."""

    class Registry(Daemon):
        told = KEPT

        def push(self, name: str, **_: Any) -> list[dict[str, str]]:
            super().push(name)
            return [{"error": self.told}] if name.endswith(IMAGE) else []

    monkeypatch.setenv("REGISTRY", "r.example.org/me")
    registry = Registry()
    monkeypatch.setattr(image, "connect", lambda: registry)
    image.image("nvidia", True)
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"r.example.org/me/{IMAGE} is there already, and the registry keeps it as it is"
    assert registry.pushed[1:] == [last] == [image.name(find_profile("nvidia"), pushed=True)]
    registry.told = "unauthorized: authentication required"
    with pytest.raises(DvqError, match=f"the push of r.example.org/me/{IMAGE} failed: .*; docker login"):
        image.image("nvidia", True)


@pytest.mark.parametrize("profile", ["docker", "nvidia", "kind"])
def test_what_is_built_is_what_containers_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], profile: str
) -> None:
    """`submit-sweep ON=docker` makes the image first, with the same profile."""
    monkeypatch.delenv("REGISTRY", raising=False)
    monkeypatch.setattr(image, "connect", Daemon)
    image.image(profile, False)
    assert capsys.readouterr().out.strip() == image.name(find_profile(profile), pushed=False)


def test_data_of_this_machine_goes_to_the_store(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in (
        "",
        "https://mirror.example.org/cifar-10-python.tar.gz",
        "s3://data/cifar-10-python.tar.gz",
    ):
        job = make(source=source)
        assert cluster.bring_data(job) is job
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    job = make(source=str(tmp_path))  # the sample needs no source
    assert cluster.bring_data(job).source == ""
    assert list((tmp_path / "store/data").glob("*/data.json"))
    with pytest.raises(DvqError, match="cifar-10"):
        cluster.bring_data(make(source=str(tmp_path), data="cifar10"))
    for source in ("", "https://mirror.example.org/birds.npz"):  # there is no address of them to ask
        with pytest.raises(DvqError, match=r"the store has no images birds@|come from a file"):
            cluster.bring_data(make(source=source, data="birds@0123456789abcdef"))


def test_data_that_this_machines_cache_alone_has_goes_to_the_store(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload that was cut off is made up for."""
    published: list[str] = []
    monkeypatch.setattr(Store, "publish_data", lambda _, name: published.append(name))
    job = make(source=str(tmp_path))
    data.prepare("cifar10-sample", "", job.store.data("cifar10-sample"))
    cluster.bring_data(job)
    assert published == ["cifar10-sample"]


def test_what_is_refused_removes_nothing(make: Make, server: KubeflowServer) -> None:
    job = make(source="/no/birds.npz", data="birds@0123456789abcdef")
    checkpoint(job, 20)
    finish(job, 0)
    before = sorted(job.store.root.rglob("*"))
    with pytest.raises(DvqError, match=r"birds.npz: cannot be read"):
        run(job, fresh=True)
    assert sorted(job.store.root.rglob("*")) == before
    assert not server.runs


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeflowServer]:
    made = KubeflowServer()
    with made.listening() as address:
        monkeypatch.setenv("KFP_HOST", address)
        yield made


def run(job: Job, wait: bool = True, fresh: bool = False) -> tuple[int, str]:
    text = io.StringIO()
    return cluster.run(job, Console(file=text, width=200), wait, fresh), text.getvalue()


@pytest.fixture
def _plain_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the table of results, which wants whole ones."""
    monkeypatch.setattr(cluster, "conclude", lambda *given: 0 if given[3].state == "SUCCEEDED" else 1)


@pytest.mark.usefixtures("_plain_end")
def test_it_is_submitted_again_while_it_gets_on(make: Make, server: KubeflowServer) -> None:
    """An interruption in each run, after 20 steps more; then both trials are finished."""
    job = make()

    def started(made: Any, _: str) -> None:
        number = len(server.runs)
        made.state = "FAILED"
        if number <= 3:
            checkpoint(job, 20 * number)
        else:
            checkpoint(job, 1, seed=1)
            finish(job, 0)
            finish(job, 1)
            made.state = "SUCCEEDED"

    server.started = started
    code, told = run(job)
    assert (code, len(server.runs)) == (0, 4)
    assert told.count("2 trials are left: submitting it again") == 3
    assert told.count("/#/runs/details/") == 4
    assert "mlflow: http://mlflow.example.org/#/experiments" in told
    assert len(server.versions) == 1


@pytest.mark.usefixtures("_plain_end")
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_fault_of_kfps_while_it_is_submitted_again_ends_nothing(
    status: int, make: Make, server: KubeflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor while it is followed; and a run that was made though the answer was an error is not made twice."""
    job, follow = make(), cluster.follow

    def started(made: Any, _: str) -> None:
        made.state = "FAILED" if len(server.runs) == 1 else "RUNNING"
        checkpoint(job, 20, len(server.runs) - 1)
        server.faults = [(status, "busy"), (status, "busy")]  # of what is asked next
        if len(server.runs) == 2:
            raise RefusedError(status, "made, and the answer lost")

    def followed(*given: Any) -> Any:
        if len(server.runs) == 2:
            assert not server.faults
            list(server.runs.values())[1].state = "SUCCEEDED"
            finish(job, 0)
            finish(job, 1)
        return follow(*given)

    server.started = started
    monkeypatch.setattr(cluster, "follow", followed)
    code, told = run(job)
    assert (code, len(server.runs)) == (0, 2)
    assert [told.count(f"/#/runs/details/{made}") for made in server.runs] == [1, 1]


@pytest.mark.usefixtures("_plain_end")
def test_more_trials_than_a_run_may_have_are_several_runs(make: Make, server: KubeflowServer) -> None:
    """The first trial fails at once, which is news enough to go on with the second."""
    job = make(PLAIN.model_copy(update={"cluster": Cluster(pull_policy="Never", limit=1)}))

    def started(made: Any, _: str) -> None:
        seed = len(server.runs) - 1
        checkpoint(job, 0, seed)
        if seed == 0:
            Events(job.store.trial(job.keys()[0])).failure("out of memory")
        else:
            finish(job, seed)
        made.state = "SUCCEEDED" if seed else "FAILED"

    server.started = started
    code, told = run(job)
    assert (code, len(server.runs)) == (0, 2)
    assert "1 of them in each run" in told
    assert "1 trials are left: submitting it again" in told


@pytest.mark.usefixtures("_plain_end")
def test_who_stops_following_is_told_the_run_that_goes_on(
    make: Make, server: KubeflowServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, follow = make(), cluster.follow

    def interrupted(*given: Any) -> Any:
        if len(server.runs) == 2:
            raise KeyboardInterrupt
        return follow(*given)

    def started(made: Any, _: str) -> None:
        made.state = "FAILED"
        checkpoint(job, 20 * len(server.runs))

    server.started = started
    monkeypatch.setattr(cluster, "follow", interrupted)
    assert run(job)[0] == 130
    assert f"make cancel RUN={list(server.runs)[1]}" in capsys.readouterr().out


@pytest.mark.usefixtures("_plain_end")
@pytest.mark.parametrize("first", [True, False])
def test_it_is_not_submitted_again_for_nothing(make: Make, server: KubeflowServer, first: bool) -> None:
    """No step was kept: neither in the first run nor, after one that was, in the second."""
    job = make()

    def started(made: Any, _: str) -> None:
        made.state = "FAILED"
        if not first and len(server.runs) == 1:
            checkpoint(job, 20)

    server.started = started
    code, _ = run(job)
    assert (code, len(server.runs)) == (1, 1 if first else 2)


@pytest.mark.usefixtures("_plain_end")
def test_a_run_that_is_found_under_way_is_shown_from_its_beginning(
    make: Make, server: KubeflowServer
) -> None:
    """A trial that failed before this launcher came does not wait."""
    job = make()
    Events(job.store.trial(job.keys()[1])).failure("of a run before")
    time.sleep(0.01)
    run(job, wait=False)
    (made,) = server.runs.values()
    checkpoint(job, 20)
    Events(job.store.trial(job.keys()[0])).failure("out of memory")
    made.state = "FAILED"
    text = io.StringIO()
    assert PLAIN.cluster
    cluster.follow(job, Kubeflow(PLAIN.cluster), made.run_id, Console(file=text, width=200))
    assert "out of memory" in text.getvalue()
    assert "of a run before" not in text.getvalue()


@pytest.mark.usefixtures("_plain_end")
@pytest.mark.parametrize("noted", [True, False])
def test_a_cancelled_run_stays_cancelled(
    noted: bool, make: Make, server: KubeflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP has it CANCELING, and FAILED in the end; not every version notes the former in its history."""
    job, look = make(), Kubeflow.look
    checkpoint(job, 20)

    def looked(kubeflow: Kubeflow, run: str) -> Run:
        found = look(kubeflow, run)
        if server.runs[run].state == "CANCELING":
            server.runs[run].state = "FAILED"
        else:
            kubeflow.cancel(run)
            server.runs[run].state_history = server.runs[run].state_history if noted else None
            server.runs[run].state = "FAILED" if noted else "CANCELING"
        return found

    monkeypatch.setattr(Kubeflow, "look", looked)
    code, told = run(job)
    assert (code, len(server.runs)) == (1, 1)
    assert "submitting it again" not in told


@pytest.mark.usefixtures("_plain_end")
def test_one_run_of_a_sweep_at_a_time(make: Make, server: KubeflowServer) -> None:
    job = make()
    code, told = run(job, wait=False)
    (first,) = server.runs
    assert code == 0
    assert f"make cancel RUN={first}" in told
    for fresh in (False, True):
        with pytest.raises(
            DvqError, match=f"the sweep 's' is under way: http.*/#/runs/details/{first}; WAIT=1"
        ):
            run(job, wait=False, fresh=fresh)
    server.runs[first].state = "SUCCEEDED"
    for seed in (0, 1):
        checkpoint(job, 100, seed)
        finish(job, seed)
    server.started = lambda made, _: setattr(made, "state", "SUCCEEDED")
    assert run(job)[0] == 0
    assert len(server.runs) == 2
    server.runs[first].state = "RUNNING"
    with pytest.raises(DvqError, match="under way"):
        run(job, wait=True, fresh=True)
    assert job.store.state(job.keys()[0]).name == "finished"


@pytest.mark.usefixtures("_plain_end")
@pytest.mark.parametrize("fresh", [True, False])
def test_one_that_is_started_while_data_are_uploaded_is_the_one(
    fresh: bool, make: Make, server: KubeflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same command in another terminal, as one types that sees nothing happen."""
    job, upload = make(), Kubeflow.upload
    checkpoint(job, 20)
    (job.store.trial(job.keys()[0]) / "trial.json").write_text("{}")

    def slow(*given: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(Kubeflow, "upload", upload)
            run(job, wait=False)
        return upload(*given)

    monkeypatch.setattr(Kubeflow, "upload", slow)
    with pytest.raises(DvqError, match="the sweep 's' is under way"):
        run(job, wait=fresh, fresh=fresh)
    assert len(server.runs) == 1
    assert job.store.steps(job.keys()[0]) == [20]


@pytest.mark.usefixtures("_plain_end")
def test_fresh_removes_what_there_is(make: Make, server: KubeflowServer) -> None:
    job = make()
    name, *_ = job.trials
    begin(job.store.trial(job.keys()[0]), job.trials[name], name)
    checkpoint(job, 20)
    assert job.store.reached_step(job.trials[name]) == 20
    run(job, wait=False, fresh=True)
    assert len(server.runs) == 1
    assert job.store.state(job.keys()[0]).name == "new"


@pytest.mark.parametrize(
    ("state", "failures", "code"),
    [("SUCCEEDED", {}, 0), ("FAILED", {}, 1), ("SUCCEEDED", {"a trial": "out of memory"}, 1)],
)
def test_a_sweep_succeeds_where_its_run_and_all_its_trials_do(
    state: str, failures: dict[str, str], code: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what was spent, what earlier runs did is no part."""
    monkeypatch.setattr(conclusion, "show", lambda *_: failures)
    job, text = make(), io.StringIO()
    plan = forecast.plan(job.trials, job.store, PLAIN)
    Events(job.store.trial(job.keys()[0])).state("training")
    Events(job.store.trial(job.keys()[0])).state("finished")
    (events,) = job.store.trial(job.keys()[0]).glob("events/000001.jsonl")
    events.write_text(json.dumps({**json.loads(events.read_text()), "time": time.time() + 7200}) + "\n")
    for began, spent in ((0.0, "2.00"), (time.time() + 3600, "1.00")):
        ended = Run("run", state)
        assert cluster.conclude(job, plan, PLAIN, ended, began, Console(file=text, width=200)) == code
        assert f"CPU-hours: {spent} spent, no forecast" in text.getvalue()


def test_finished_trials_that_mlflow_lacks_are_counted_by_what_the_pods_noted(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod's own sentence is in its log alone, and the address by which it calls MLflow is its own."""
    job = make(seeds=3)
    monkeypatch.setattr(conclusion, "show", lambda *_: {"vq-ema-c512-k8-s2": "why not"})
    plan = forecast.plan(job.trials, job.store, PLAIN)

    def told(profile: Profile = PLAIN) -> str:
        text = io.StringIO()
        cluster.conclude(job, plan, profile, Run("run", "SUCCEEDED"), 0.0, Console(file=text, width=200))
        return text.getvalue()

    assert "MLflow lacks 2 of the finished trials: the log of the run's task 'report' says why" in told()
    for key, lacks in zip(job.keys(), ("MLflow lacks 1 of", ""), strict=False):
        job.store.trial(key).mkdir(parents=True)
        write_json(job.store.trial(key) / "tracked.json", {"http://mlflow.dvq:5000 another": "finished"})
        assert "MLflow lacks" in told()
        write_json(job.store.trial(key) / "tracked.json", {"http://mlflow.dvq:5000 s": "finished"})
        assert lacks in told()
    assert "MLflow" not in told()
    write_json(job.store.trial(job.keys()[0]) / "tracked.json", {})
    assert "MLflow" not in told(PLAIN.model_copy(update={"cluster": Cluster(config_maps={})}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert "MLflow" not in told()


class Answers:
    """A KFP that answers as it is told."""

    namespace = ""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers = list(answers)

    def look(self, run: str) -> Run:
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return Run(run, found)


def test_a_server_that_is_away_for_a_while_ends_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    away = UnreachableError("away")
    look = cluster.Look(make(), Answers("RUNNING", away, away, "SUCCEEDED"), "run")  # type: ignore[arg-type]
    assert look() == (False, "run running")
    assert look() == (False, "run running; KFP does not answer, asking again")
    assert not look()[0]
    assert look()[0]
    monkeypatch.setattr(cluster, "PATIENCE", -1.0)
    with pytest.raises(UnreachableError):
        cluster.Look(make(), Answers(away), "run")()  # type: ignore[arg-type]


def test_silence_says_where_to_look(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    look = cluster.Look(make(), Answers("PENDING", "PENDING", "PENDING"), "run")  # type: ignore[arg-type]
    assert look()[1] == "run pending"
    monkeypatch.setattr(cluster, "QUIET", -1.0)
    told = look()[1]
    assert "kubectl -n kubeflow get pods -l app.kubernetes.io/part-of=dvq" in told


def test_cancel_wants_a_run(capsys: pytest.CaptureFixture[str], server: KubeflowServer) -> None:
    with pytest.raises(SystemExit) as caught:
        cancel.app(["", "--profile", "kind"])
    assert caught.value.code == 2
    assert "name the run: make cancel RUN=" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cancel.app(["http://h/#/runs/details/abc?namespace=me", "--profile", "kind"])
    assert "has no run 'abc'" in capsys.readouterr().err
    assert server.asked[-1].endswith("/runs/abc:terminate")
