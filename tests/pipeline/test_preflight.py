"""Each wrong input is one sentence on standard error and exit status 2, and nothing is begun."""

import datetime
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.store import Store
from dvq import DvqError
from dvq.sweep import load_sweep
from dvq.trial import values
from pipeline import conclusion, containers, explain, local, preflight, replay, report, stack, submit, ui
from pipeline.command import application
from pipeline.stack import Stack

GRID = {"estimator": ["gs-soft"]}
Refusal = Callable[..., str]


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """What ``command`` says on refusing ``arguments``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVQ_STORE", raising=False)

    def refused(*arguments: str, command: Any = submit) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            command.app(list(arguments))
        assert stopped.value.code == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert error.count("\n") == 1
        assert error.startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return refused


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"base": {"learning_rat": 1}, "grid": GRID}, "learning_rate"),
        ({"grid": {"estimator": ["gs-sof"]}}, "gs-soft"),
        ({}, "no estimator is named"),
        ({"grid": {"estimator": []}}, "estimator"),
        ({"grid": GRID, "include": [{"estimator": "gs-soft"}]}, "twice"),
        ({"base": {"num_codes": 1}, "grid": GRID}, "num_codes"),
        ({"base": {"steps": -5}, "grid": GRID}, "steps"),
        ({"gird": GRID}, "grid"),
        (
            {"grid": {**GRID, "data": ["cifar10", "cifar10-sample"]}},
            "differ in 'data' (cifar10, cifar10-sample)",
        ),
        ({"grid": {**GRID, "split": ["tune", "test"]}}, "differ in 'split' (test, tune)"),
        ({"include": [{"estimator": "gs-soft", "temperature": datetime.date(2026, 1, 1)}]}, "temperature"),
    ],
)
@pytest.mark.parametrize("command", [submit, explain, report])
def test_a_wrong_sweep(
    refusal: Refusal, write_sweep: Callable[..., Path], content: dict[str, Any], said: str, command: Any
) -> None:
    write_sweep(**content)
    assert said in refusal("tiny.yaml", command=command)


def test_a_sweep_that_is_no_yaml(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("base: {\n")
    assert "tiny.yaml" in refusal("tiny.yaml")


def test_a_sweep_that_is_not_there(refusal: Refusal) -> None:
    assert "nowhere.yaml" in refusal("nowhere.yaml")
    assert "smoke" in refusal("smoek")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--jobs", "0"), "JOBS"),
        (("--jobs", "two"), "JOBS"),
        (("--jobs", "9" * 20), "give a whole number from 1 to 1000"),
        (("--jobs", "9" * 5000), "give a whole number from 1 to 1000"),
        (("--on", "mars"), "ON = 'mars'"),
        (("--profile", "gke"), "PROFILE = 'gke'"),
        (("--data", "gone.tar.gz"), "gone.tar.gz"),
        (("--data", "http://127.0.0.1:9/x.tar.gz"), "127.0.0.1:9"),
        (("--data", "batches"), "data_batch_1"),
    ],
)
def test_a_wrong_argument(
    refusal: Refusal, write_sweep: Callable[..., Path], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    write_sweep({"data": "cifar10"}, grid=GRID)
    (tmp_path / "batches").mkdir()
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"):
        (tmp_path / "batches" / name).write_bytes(b"not what was published")
    assert said in refusal("tiny.yaml", *arguments)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("tiny.yaml", "tiny.yaml is a file; name a folder"),
        ("tiny.yaml/store", ""),
        ("gs://bucket/store", ""),
        ("s3://Not_A_Bucket/store", ""),
        ("s3:/bucket/store", ""),
    ],
)
def test_a_store_that_cannot_be_written(
    refusal: Refusal,
    write_sweep: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    said: str,
) -> None:
    write_sweep(grid=GRID)
    monkeypatch.setenv("DVQ_STORE", place)
    told = refusal("tiny.yaml")
    assert "DVQ_STORE" in told
    assert said in told


@pytest.mark.parametrize(
    "address",
    [
        "http://me:secret@127.0.0.1:1",
        "http://me:s@secret@127.0.0.1:1",
        "http://secret@127.0.0.1:1",
        "postgresql://me:secret@127.0.0.1/mlflow",
    ],
)
def test_a_password_in_an_address(
    address: str, refusal: Refusal, write_sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(grid=GRID)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    said = refusal("tiny.yaml")
    assert "MLFLOW_TRACKING_PASSWORD" in said
    assert "secret" not in said


def test_a_home_is_found_where_the_shell_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "birds.npz").touch()
    assert preflight.find_source("~/birds.npz", "birds@0123456789abcdef") == str(tmp_path / "birds.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("DVQ_STORE", "~/store")
    monkeypatch.setenv("DVQ_CACHE", "~/cache")
    assert preflight.find_store().root == tmp_path / "store"
    assert os.environ["DVQ_CACHE"] == str(tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"evaluation": {"bits', "Unterminated string"),
        ("{}", "it is empty"),
        ("[]", "it holds no object"),
        (None, "it is a folder"),
    ],
)
@pytest.mark.parametrize("command", [submit, report, explain])
def test_results_that_are_damaged_are_one_sentence(
    content: str | None,
    says: str,
    command: Any,
    write_sweep: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    (trial,) = load_sweep(write_sweep(grid=GRID)).trials().items()
    folder = Store(tmp_path / "store").trial(trial[1].key())
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text("{}")
    if content is None:
        (folder / "results.json").mkdir()
    else:
        (folder / "results.json").write_text(content)

    def show(job: Any, console: Any, _: bool) -> None:
        conclusion.show(job.sweep, job.trials, job.store, console)

    monkeypatch.setattr(submit, "prepare", lambda job: job)
    monkeypatch.setattr(submit, "run", show)
    for arguments in ([], ["--trial", trial[0]])[: 1 + (command is explain)]:
        with pytest.raises(SystemExit) as stopped:
            command.app(["tiny.yaml", *arguments])
        assert stopped.value.code == 2
        assert f"{folder}/results.json: damaged ({says}" in capsys.readouterr().err


def test_results_of_another_default_are_refused_before_any_work_unless_they_are_computed_anew(
    write_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DVQ_STORE", "DVQ_CACHE", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, str(tmp_path / name))
    sweep = write_sweep(grid=GRID)
    (trial,) = load_sweep(sweep).trials().values()
    folder = Store(tmp_path / "DVQ_STORE").trial(trial.key())
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"trial": {**values(trial), "temperature": 0.25}}))
    with pytest.raises(
        DvqError, match=r"temperature 0.25, and the default is 0.5 now; FRESH=1 computes it anew"
    ):
        submit.checked_job(str(sweep), "", "", None)
    submit.checked_job(str(sweep), "", "", None, fresh=True)


def test_a_field_that_changes_nothing_is_a_warning(
    write_sweep: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("DVQ_STORE", "DVQ_CACHE", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, str(tmp_path / name))
    submit.checked_job(str(write_sweep({"decay_half_life": 5}, grid=GRID)), "", "", None)
    told = "warning: sweep 'tiny': decay_half_life changes nothing without decay_after\n"
    assert capsys.readouterr().err == told


def test_trials_that_test_images_cannot_choose_among_are_noted(
    write_sweep: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("DVQ_STORE", "DVQ_CACHE", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, str(tmp_path / name))
    submit.checked_job(str(write_sweep(grid={**GRID, "temperature": [0.5, 1.0]})), "", "", None)
    assert capsys.readouterr().err.startswith(
        "note: sweep 'tiny': its trials differ in temperature: a choice"
    )


@pytest.mark.parametrize("name", ["cifar10", "cifar10-sample"])
def test_images_of_ones_own_for_a_sweep_on_others_are_refused(
    name: str, refusal: Refusal, write_sweep: Callable[..., Path]
) -> None:
    """Which ran on CIFAR-10, if the store had it."""
    write_sweep({"data": name}, grid=GRID)
    said = refusal("tiny.yaml", "--data", "birds.npz")
    assert f"images of your own, and the sweep is on {name}; make data DATA=birds.npz says" in said


def test_data_for_a_sweep_of_the_sample_is_said_not_to_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preflight.find_source(str(tmp_path), "cifar10-sample") == ""
    assert "DATA is not used" in capsys.readouterr().err
    assert preflight.find_source(str(tmp_path), "cifar10") == str(tmp_path)
    assert preflight.find_source("", "cifar10-sample") == ""
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", [report, replay])
def test_there_is_nothing_to_tell_of_a_sweep_that_was_never_run(
    command: Any, refusal: Refusal, write_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    write_sweep(grid=GRID)
    assert "make submit-sweep SWEEP=tiny.yaml" in refusal("tiny.yaml", command=command)
    assert not (tmp_path / "outputs/store/reports").exists()


def test_make_says_which_option_it_does_not_know() -> None:
    """A slip, SWEP=paper, would run the smoke sweep, and DRYRUN=1 a whole one."""
    for slip in ("SWEP=paper", "DVQ_STOER=here"):
        done = make("help", slip, "JOBS=3", "ARGS=--sizes a=b", "DVQ_STORE=here")
        assert f"{slip.partition('=')[0]} is no option here" in done.stderr
        assert done.stderr.count("no option") == 1
        assert done.returncode == 2


@pytest.mark.parametrize("option", ["FRESH", "WAIT", "DRY_RUN"])
def test_what_is_yes_or_no_to_make(option: str) -> None:
    """FRESH=no removed the sweep's results from the store."""
    flag = f"--{option.lower().replace('_', '-')}"
    for said, on in (("1", True), ("yes", True), ("", False), ("0", False), ("no", False), ("false", False)):
        done = make("submit-sweep", f"{option}={said}")
        assert (flag in done.stdout.split()) == on, said
    done = make("submit-sweep", f"{option}=maybe")
    assert f"{option}=maybe is neither yes nor no: give 1 or 0" in done.stderr
    assert done.returncode == 2


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would do."""
    root = Path(__file__).parents[2]
    return subprocess.run(["make", "-n", *arguments], cwd=root, capture_output=True, text=True, check=False)


def test_a_password_in_the_address_of_data_or_store(
    refusal: Refusal, write_sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(grid=GRID)
    for place in (
        "me:secret@127.0.0.1:1/cifar-10-python.tar.gz",
        "127.0.0.1:1/c.tar.gz?X-Amz-Signature=secret",
    ):
        said = refusal("tiny.yaml", "--data", f"https://{place}")
        assert "DATA has a password or signature" in said
        assert "secret" not in said
    monkeypatch.setenv("DVQ_STORE", "s3://me:secret@bucket/prefix")
    said = refusal("tiny.yaml")
    assert "DVQ_STORE" in said
    assert "secret" not in said


def test_a_tracker_of_no_known_kind(
    refusal: Refusal, write_sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(grid=GRID)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "foo://bar")
    assert "MLflow cannot use this address (a folder no more" in refusal("tiny.yaml")
    assert "MLflow cannot use this address (a folder no more" in refusal(command=ui)


@pytest.mark.parametrize("address", ["sqlite://", "sqlite:///", "sqlite:", "http://"])
def test_a_tracker_that_is_nowhere(
    refusal: Refusal, write_sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """In memory: each task would have a database of its own, of which nothing stays."""
    write_sweep(grid=GRID)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert f"'{address}': it names no server and nothing that stays; give" in refusal("tiny.yaml")


def test_a_database_is_the_same_one_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's working folder is another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVQ_STORE", "store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///outputs/mlflow.db")
    assert preflight.find_store().root == tmp_path / "store"
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/outputs/mlflow.db"


def test_pages_that_cannot_be_served(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "mlflow.db, for no sweep was tracked" in refusal(command=ui)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = str(taken.getsockname()[1])
        assert f"PORT = '{busy}' cannot be listened on (Address already in use)" in refusal(
            "--port", busy, command=ui
        )
    assert "65535" in refusal("--port", "70000", command=ui)
    assert "whole number" in refusal("--port", "abc", command=ui)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert "does not answer" in refusal(command=ui)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert "nothing is tracked; unset it" in refusal(command=ui)


def test_a_path_that_kfp_cannot_run_from(
    refusal: Refusal, write_sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sweep = write_sweep(grid=GRID)
    folder = tmp_path / "python3.11"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "python3" in refusal(str(sweep))
    monkeypatch.chdir(tmp_path)
    write_sweep({"data": "cifar10"}, grid=GRID)
    assert "python3" in refusal("tiny.yaml", "--data", str(folder))
    write_sweep(grid=GRID)
    monkeypatch.setattr(sys, "executable", "/my project/.venv/bin/python")
    assert "space" in refusal("tiny.yaml")


@pytest.mark.parametrize(("text", "word"), [("on python3.12", "python3"), ("{{$.pipeline_job_name}}", "{{$")])
def test_a_text_that_kfp_would_rewrite(
    refusal: Refusal, write_sweep: Callable[..., Path], text: str, word: str
) -> None:
    write_sweep(grid=GRID, description=text)
    assert f"would rewrite '{word}' in sweep" in refusal("tiny.yaml")


def test_a_sweep_that_no_command_line_holds(refusal: Refusal, write_sweep: Callable[..., Path]) -> None:
    """The task plan would not start, for its argument list is too long, and no trial either."""
    point = {"estimator": "gs-soft", "temperature": 0.5, "learning_rate": 1e-4, "kl_warmup": 100}
    write_sweep(include=[{**point, "num_codes": 2 + number} for number in range(1000)])
    assert "takes 96 KiB of sweep, and it has " in refusal("tiny.yaml")


def test_a_child_says_nothing_of_its_own_where_all_is_well(tmp_path: Path) -> None:
    local.check(tmp_path, {"sweep": "{}"})


def test_explain_tells_every_state(
    write_sweep: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_sweep(grid={**GRID, "num_codes": [2, 3, 4, 5, 6, 7, 8, 9]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    folders = [Store(tmp_path / "store").trial(trial.key()) for trial in load_sweep(path).trials().values()]
    for folder in folders[:4]:
        (folder / "events").mkdir(parents=True)
    (folders[0] / "results.json").write_text('{"evaluation": {}}')
    state = json.dumps({"kind": "state", "time": 1.0, "state": "training", "pid": 1}) + "\n"
    failure = json.dumps({"kind": "failure", "time": 2.0, "reason": "it rained"}) + "\n"
    (folders[1] / "events" / "000000.jsonl").write_text(state + failure)
    (folders[2] / "events" / "000000.jsonl").write_text(state)
    (folders[3] / "events" / "000000.jsonl").write_text(state)
    (folders[3] / "model").mkdir()
    (folders[4] / "checkpoints" / "000000003").mkdir(parents=True)
    shorter = folders[5].name.rpartition("-")[0] + "-2"
    (folders[5].parent / shorter / "checkpoints" / "000000002").mkdir(parents=True)
    for part in ("events", "model", "checkpoints/000000004"):  # its evaluation failed
        (folders[7] / part).mkdir(parents=True)
    (folders[7] / "events" / "000000.jsonl").write_text(state + failure)
    explain.app(["tiny.yaml"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    told = [
        "finished",
        "it rained): it is tried again and starts from the beginning",
        "begun and not finished: it starts from the beginning",
        "only evaluated",
        "begun and not finished: it goes on from step 3",
        "new: it goes on from step 2 of another trial",
        "new: computed from the beginning",
        "it rained): it is tried again and is only evaluated and analysed",
        "7 of 8",
    ]
    for line, said in zip(lines, told, strict=True):
        assert said in line


def test_what_replay_met_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failed trials are in the report; that the store has no room is nowhere else, whether trials failed or not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'x.db'}")

    def full(*_: object) -> None:
        raise DvqError("no room in the store")

    monkeypatch.setattr(preflight, "check_begun", lambda *_: None)
    monkeypatch.setattr(replay.mlflow_server, "ensure_database", lambda: None)
    monkeypatch.setattr(Store, "publish_report", full)
    with pytest.raises(SystemExit) as ended:
        replay.app(["smoke"])
    assert ended.value.code == 2
    assert "no room in the store" in capsys.readouterr().err


def test_a_report_in_a_folder_that_was_moved_moves_its_database_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run was sent a second time, and its model to where the folder had been."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    done: list[str] = []
    monkeypatch.setattr(preflight, "check_begun", lambda *_: None)
    monkeypatch.setattr(report.mlflow_server, "ensure_database", lambda: done.append("ensure"))
    monkeypatch.setattr(report.reports, "write", lambda *_: done.append("write"))
    with pytest.raises(SystemExit):
        report.app(["smoke"])
    assert done == ["ensure", "write"]


def test_a_report_is_written_where_mlflows_file_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/taken/mlflow.db")
    monkeypatch.setattr(preflight, "check_begun", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        report.app(["smoke"])
    assert ended.value.code == 1, "its trials are not finished"
    assert (tmp_path / "store/reports/smoke/report.html").exists()
    assert "the report of smoke is not up to date in MLflow" in capsys.readouterr().out


@pytest.mark.parametrize("command", [report, replay, stack])
def test_a_full_disk_is_one_sentence(
    command: Any,
    write_sweep: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'x.db'}")
    monkeypatch.setattr(replay.mlflow_server, "ensure_database", lambda: None)
    for trial in load_sweep(write_sweep(grid=GRID)).trials().values():
        (tmp_path / "store/trials" / trial.key() / "checkpoints/000000003").mkdir(parents=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # write() fails as it does on a full disk
    try:
        with pytest.raises(SystemExit) as ended:
            command.app(["down" if command is stack else "tiny.yaml"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ended.value.code == 2
    assert "File too large; make room, or set DVQ_STORE to a folder" in capsys.readouterr().err


def test_a_terminal_without_a_character_has_another_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    application(lambda: print("6.9 ± 0.1", flush=True))([], standalone_mode=False)
    assert sys.stdout.buffer.getvalue() == b"6.9 ? 0.1\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("command", "handler", "code", "said"),
    [
        (["-m", "pipeline.submit"], signal.SIG_DFL, -signal.SIGINT, ""),
        (["-m", "pipeline.submit"], signal.SIG_IGN, 0, "it goes on"),
        (["-m", "pipeline.local"], signal.SIG_DFL, 0, "KeyboardInterrupt"),
        (["-c", "import pipeline.preflight"], signal.SIG_DFL, 0, "KeyboardInterrupt"),
    ],
)
def test_ctrl_c_while_a_command_is_imported_is_no_traceback(
    command: list[str], handler: signal.Handlers, code: int, said: str, tmp_path: Path
) -> None:
    """Unless it is ignored, as in the background; nor is it another for what is no command."""
    pressed = "import os, signal\ntry:\n    signal.raise_signal(signal.SIGINT)\n    print('it goes on', flush=True)\n"
    pressed += "except KeyboardInterrupt:\n    print('KeyboardInterrupt', flush=True)\nos._exit(0)\n"
    for module in ("typer", "docker"):  # which both are imported early
        (tmp_path / f"{module}.py").write_text(pressed)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (code, said, "")


def test_what_of_a_stack_or_a_daemon_is_damaged_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stack.json").write_text("[]")
    with pytest.raises(DvqError, match=r"stack.json is damaged, and with it the passwords: remove"):
        Stack(tmp_path)
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:99999")
    with pytest.raises(DvqError, match=r"no Docker daemon answers at tcp://127\.0\.0\.1:99999; install one"):
        containers.connect()


def test_a_stack_without_what_it_needs_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """make clean takes the services' packages, and leaves outputs/stack."""
    monkeypatch.setitem(sys.modules, "psutil", None)
    stack = Stack(tmp_path)
    stack.pids = {"s3": 1}
    with pytest.raises(DvqError, match="what it needs is not installed: make stack-up"):
        stack.environment()
