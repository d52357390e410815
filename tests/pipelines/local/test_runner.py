"""The runner, on small real pipelines: side by side, failure, going on, and nothing left running."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kfp import dsl

from pipelines.local.processes import started_at
from pipelines.local.records import read_record
from pipelines.local.runner import run_pipeline
from zhllama import storage
from zhllama.errors import InputError

RUN = """
import sys
from pathlib import Path
from pipelines.local.runner import run_pipeline
result = run_pipeline(Path(sys.argv[1]), dict(item.split("=", 1) for item in sys.argv[3:]), Path(sys.argv[2]))
sys.exit(result.exit_code)
"""


def wait_for(there: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


@pytest.fixture
def runner(compiled, work: Path, tmp_path: Path):
    """Starts the runner as a process of its own; what is still there at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(pipeline, **arguments) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", RUN, str(compiled(pipeline)), str(work)]
        words += [f"{name}={value}" for name, value in arguments.items()]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


# --- what runs --------------------------------------------------------------------------------------------------------


def test_a_pipeline_with_a_condition_is_refused_before_anything_runs(compiled, steps, work, journal, ran):
    @dsl.pipeline(name="test")
    def pipeline(value: str):
        steps.echo(value="first")
        with dsl.If(value == ""):
            steps.echo(value="none")

    with pytest.raises(InputError, match=r"condition-1: it has a condition \(dsl\.If.*decided when our pipelines are"):
        run_pipeline(compiled(pipeline), {"value": ""}, work)
    assert ran() == []


def test_what_waits_for_a_sub_pipeline_waits_for_all_of_it(compiled, steps, work, journal, ran):
    @dsl.pipeline
    def inner():
        first = steps.echo(value="a", name="one")
        steps.echo(value="b", name="two").after(first)

    @dsl.pipeline(name="test")
    def pipeline():
        steps.echo(value="c", name="after").after(inner())

    assert run_pipeline(compiled(pipeline), {}, work).exit_code == 0
    assert ran() == ["one", "two", "after"]


def test_values_travel_through_sub_pipelines_texts_and_types(compiled, steps, work):
    @dsl.pipeline
    def inner(number: int, rate: float, run: str) -> str:
        return steps.echo(value=f"{number} at {rate} in {run}").output

    @dsl.pipeline(name="test")
    def pipeline(number: int = 3, rate: float = 2e-5):
        told = inner(number=number, rate=rate, run=dsl.PIPELINE_JOB_NAME_PLACEHOLDER)
        steps.echo(value=f"<{told.output}>").set_display_name("last")

    assert run_pipeline(compiled(pipeline), {"rate": "1e-5"}, work).reference("last") == "<3 at 0.00001 in test-local>"


def test_a_number_looks_in_a_command_as_kfps_driver_writes_it(compiled, work):
    @dsl.container_component
    def say(rate: float, steps: int, ref: dsl.OutputPath(str)):
        code = "import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv[1:3]))"
        return dsl.ContainerSpec(image="none", command=["python", "-c", code], args=[rate, steps, ref])

    @dsl.pipeline(name="test")
    def pipeline(rate: float, steps: int):
        say(rate=rate, steps=steps)

    assert (
        run_pipeline(compiled(pipeline), {"rate": "1e-5", "steps": "1000000"}, work).reference("say") == "1e-05 1000000"
    )


def test_an_optional_parameter_without_a_value_is_refused_before_anything_runs(compiled, steps, work, journal, ran):
    @dsl.container_component
    def say(value: str = "default"):
        return dsl.ContainerSpec(image="none", command=["python", "-c", "pass"], args=[value])

    @dsl.pipeline(name="test")
    def pipeline(value: str = None):  # noqa: RUF013 - kfp's way to an optional parameter
        say(value=value).after(steps.echo(value="first"))

    path = compiled(pipeline)
    with pytest.raises(
        InputError, match=r'^say: failed to resolve input parameters: parameter "value" not found in exec'
    ):
        run_pipeline(path, {}, work)
    assert ran() == []
    assert run_pipeline(path, {"value": "a"}, work).exit_code == 0


def test_an_output_that_looks_like_a_placeholder_fails_the_step_that_takes_it(
    compiled, steps, work, journal, ran, capsys
):
    @dsl.container_component
    def write(ref: dsl.OutputPath(str)):
        code = "import sys; open(sys.argv[1], 'w').write('{' + '{$.inputs}' + '}')"
        return dsl.ContainerSpec(image="none", command=["python", "-c", code], args=[ref])

    @dsl.pipeline(name="test")
    def pipeline():
        with dsl.ExitHandler(steps.tidy()):
            steps.echo(value=write().output, name="after")

    result = run_pipeline(compiled(pipeline), {}, work)
    assert result.exit_code == 2
    assert result.error.startswith("echo: value: its text holds {{$.inputs}}, which KFP would take for a placeholder")
    assert ran() == ["tidy"]
    assert (
        "echo failed with exit code 2. Its last lines:\n  error: echo: value: its text holds" in capsys.readouterr().out
    )


def test_an_artifacts_path_reaches_the_next_step(compiled, work):
    @dsl.container_component
    def write(thing: dsl.Output[dsl.Artifact]):
        code = "import sys; open(sys.argv[1], 'w').write('content')"
        return dsl.ContainerSpec(image="none", command=["python", "-c", code], args=[thing.path])

    @dsl.container_component
    def read(thing: dsl.Input[dsl.Artifact], ref: dsl.OutputPath(str)):
        code = "import sys; open(sys.argv[2], 'w').write(open(sys.argv[1]).read())"
        return dsl.ContainerSpec(image="none", command=["python", "-c", code], args=[thing.path, ref])

    @dsl.pipeline(name="test")
    def pipeline():
        read(thing=write().outputs["thing"])

    assert run_pipeline(compiled(pipeline), {}, work).reference("read") == "content"


def test_independent_steps_run_side_by_side(compiled, steps, work, tmp_path):
    @dsl.pipeline(name="test")
    def pipeline(place: str):
        steps.meet(place=place, name="one")
        steps.meet(place=place, name="two")

    assert run_pipeline(compiled(pipeline), {"place": str(tmp_path / "place")}, work).exit_code == 0


def test_no_more_than_parallel_steps_run_at_once(compiled, work, tmp_path):
    @dsl.container_component
    def count(place: str, name: str):
        code = (
            "import sys, os, time; place, name = sys.argv[1:]\n"
            "os.makedirs(place, exist_ok=True); mine = os.path.join(place, name); open(mine, 'w').close()\n"
            "time.sleep(0.05); assert len(os.listdir(place)) == 1; os.unlink(mine)"
        )
        return dsl.ContainerSpec(image="none", command=["python", "-c", code], args=[place, name])

    @dsl.pipeline(name="test")
    def pipeline(place: str):
        for name in ("one", "two", "three"):
            count(place=place, name=name)

    assert run_pipeline(compiled(pipeline), {"place": str(tmp_path / "place")}, work, parallel=1).exit_code == 0


def test_the_exit_handler_runs_after_success_and_after_failure(compiled, steps, work, journal, ran):
    @dsl.pipeline(name="test")
    def pipeline(code: int):
        with dsl.ExitHandler(steps.tidy()):
            steps.fail(value="no", code=code)

    path = compiled(pipeline)
    assert run_pipeline(path, {"code": "0"}, work).exit_code == 0
    assert ran() == ["fail", "tidy"]
    assert run_pipeline(path, {"code": "7"}, work).exit_code == 1
    assert ran() == ["fail", "tidy", "fail", "tidy"]


# --- failure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "whole"), [(1, 1), (2, 2), (5, 1)], ids=["fault", "input", "other"])
def test_a_failed_step_ends_the_run_with_its_line_and_starts_nothing_new(
    compiled, steps, work, journal, ran, capsys, code, whole
):
    @dsl.pipeline(name="test")
    def pipeline(code: int):
        failing = steps.fail(value="the text is empty; give another", code=code)
        steps.echo(value="b", name="after").after(failing)

    result = run_pipeline(compiled(pipeline), {"code": str(code)}, work, again="zhllama run")
    assert result.exit_code == whole
    assert result.error == "fail: the text is empty; give another"
    assert ran() == ["fail"]
    said = capsys.readouterr().out
    assert f"fail failed with exit code {code}. Its last lines:" in said
    assert f"its log: {work / 'steps' / 'fail' / 'log.txt'}" in said
    assert "to go on: zhllama run (what is done is kept)" in said


def test_a_step_that_writes_no_output_is_a_failure(compiled, work):
    @dsl.container_component
    def silent(ref: dsl.OutputPath(str)):
        return dsl.ContainerSpec(image="none", command=["python", "-c", "pass"], args=[ref])

    @dsl.pipeline(name="test")
    def pipeline():
        silent()

    result = run_pipeline(compiled(pipeline), {}, work)
    assert (result.exit_code, result.error) == (1, "silent: silent: it ended with 0 but did not write its output ref")


def test_a_program_that_is_not_there_is_a_failure(compiled, work):
    @dsl.container_component
    def absent():
        return dsl.ContainerSpec(image="none", command=["no-such-program"], args=[])

    @dsl.pipeline(name="test")
    def pipeline():
        absent()

    assert run_pipeline(compiled(pipeline), {}, work).error == "absent: no-such-program: No such file or directory"


def test_a_step_has_its_own_environment_but_for_the_places_in_a_pod(compiled, work):
    @dsl.container_component
    def say(ref: dsl.OutputPath(str)):
        code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['WORD'] + os.environ['ZHLLAMA_CACHE'])"
        return dsl.ContainerSpec(image="none", command=["python", "-c", code], args=[ref])

    @dsl.pipeline(name="test")
    def pipeline():
        say().set_env_variable("WORD", "hello").set_env_variable("ZHLLAMA_CACHE", "/nowhere")

    assert run_pipeline(compiled(pipeline), {}, work).reference("say") == f"hello{work / 'cache'}"


def test_a_failing_step_leaves_those_beside_it_to_end(compiled, steps, work, tmp_path):
    @dsl.container_component
    def fail_beside(place: str):
        code = (
            "import sys, os, time; place = sys.argv[1]; os.makedirs(place, exist_ok=True)\n"
            "while not os.listdir(place): time.sleep(0.02)\n"
            "open(os.path.join(place, 'failed'), 'w').close(); sys.exit(3)"
        )
        return dsl.ContainerSpec(image="none", command=["python", "-c", code], args=[place])

    @dsl.pipeline(name="test")
    def pipeline(place: str):
        fail_beside(place=place)
        steps.meet(place=place, name="one")

    result = run_pipeline(compiled(pipeline), {"place": str(tmp_path / "place")}, work)
    assert {name: step["state"] for name, step in result.steps.items()} == {"fail-beside": "failed", "meet": "done"}


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(steps):
    """Three published values, each made of the one before, and a side branch."""

    @dsl.pipeline(name="test")
    def pipeline(store: str, word: str = "a", source: str = ""):
        one = steps.publish(store=store, value=f"{word}1", name="one", source=source)
        two = steps.publish(store=store, value=f"2 of {one.outputs['ref']}", name="two")
        steps.publish(store=store, value=f"3 of {two.outputs['ref']}", name="three")
        steps.publish(store=store, value="side", name="side")
        for task, title in ((one, "one"), (two, "two")):
            task.set_display_name(title)

    return pipeline


@pytest.fixture
def arguments(tmp_path):
    return {"store": str(tmp_path / "store")}


@pytest.mark.slow
def test_what_has_not_changed_does_not_run_again(compiled, chain, work, arguments, journal, ran, capsys):
    path = compiled(chain)
    first = run_pipeline(path, arguments, work)
    assert sorted(ran()) == ["one", "side", "three", "two"]
    journal.write_text("")
    second = run_pipeline(path, arguments, work)
    assert ran() == []
    assert {step["state"] for step in second.steps.values()} == {"unchanged"}
    assert {(step["kind"], step["facts"]["summary"]) for step in second.steps.values()} >= {("files", "2 characters")}
    assert [step["reference"] for step in first.steps.values()] == [step["reference"] for step in second.steps.values()]
    assert " one       unchanged: 2 characters\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_changed_argument_runs_what_it_reaches(compiled, chain, work, arguments, journal, ran):
    path = compiled(chain)
    run_pipeline(path, arguments, work)
    journal.write_text("")
    run_pipeline(path, {**arguments, "word": "b"}, work)
    assert ran() == ["one", "two", "three"]


@pytest.mark.slow
def test_a_missing_file_in_the_store_runs_its_step(compiled, chain, work, arguments, journal, ran):
    path = compiled(chain)
    first = run_pipeline(path, arguments, work)
    Path(first.reference("two")).with_name("value.txt").unlink()
    journal.write_text("")
    run_pipeline(path, arguments, work)
    assert ran() == ["two"]


@pytest.mark.slow
def test_a_changed_file_behind_a_path_runs_its_step(compiled, chain, work, arguments, journal, ran, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "text.txt").write_text("old")
    path = compiled(chain)
    run_pipeline(path, {**arguments, "source": str(source)}, work)
    journal.write_text("")
    (source / "text.txt").write_text("newer")
    run_pipeline(path, {**arguments, "source": str(source)}, work)
    assert ran() == ["one"]


@pytest.mark.slow
def test_from_runs_a_step_and_what_follows_again(compiled, chain, work, arguments, journal, ran):
    path = compiled(chain)
    run_pipeline(path, arguments, work)
    journal.write_text("")
    run_pipeline(path, arguments, work, start_from="two")
    assert ran() == ["two", "three"]


@pytest.mark.slow
def test_until_stops_after_a_step_and_the_next_run_goes_on(compiled, chain, work, arguments, journal, ran):
    path = compiled(chain)
    result = run_pipeline(path, arguments, work, until="two")
    assert ran() == ["one", "two"]
    assert sorted(step["state"] for step in result.steps.values()) == ["done", "done", "left out", "left out"]
    journal.write_text("")
    run_pipeline(path, arguments, work)
    assert sorted(ran()) == ["side", "three"]


def test_a_text_longer_than_a_files_name_is_a_text(compiled, steps, work):
    @dsl.pipeline(name="test")
    def pipeline(value: str):
        steps.echo(value=value)

    assert run_pipeline(compiled(pipeline), {"value": "字" * 300}, work).reference("echo") == "字" * 300


def test_the_run_keeps_its_id_in_a_work_folder(compiled, steps, work):
    @dsl.pipeline(name="test")
    def pipeline():
        steps.echo(value=dsl.PIPELINE_JOB_ID_PLACEHOLDER)

    path = compiled(pipeline)
    assert run_pipeline(path, {}, work).reference("echo") == run_pipeline(path, {}, work).reference("echo")


def test_a_work_folder_of_another_run_is_refused(compiled, steps, work, tmp_path, runner):
    @dsl.pipeline(name="test")
    def pipeline(place: str):
        steps.hang(place=place)

    runner(pipeline, place=tmp_path / "place")
    wait_for(lambda: (tmp_path / "place" / "pids").exists())
    with pytest.raises(InputError, match="another run is using this folder"):
        run_pipeline(compiled(pipeline), {"place": str(tmp_path / "place")}, work)


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hanging(steps):
    @dsl.pipeline(name="test")
    def pipeline(store: str, place: str):
        with dsl.ExitHandler(steps.tidy()):
            first = steps.publish(store=store, value="done before", name="first")
            steps.hang(place=place, after=first.outputs["ref"])

    return pipeline


def pids_in(place: Path) -> list[int]:
    wait_for(lambda: (place / "pids").exists() and (place / "pids").read_text().count(" ") == 1)
    return [int(word) for word in (place / "pids").read_text().split()]


def alive(pid: int) -> bool:
    return bool(started_at(pid))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_stop_leaves_nothing_running_not_even_the_s3_server(
    hanging, work, journal, ran, tmp_path, runner, monkeypatch, number
):
    for name in ("ZHLLAMA_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    process = runner(hanging, place=tmp_path / "place", store="")
    pids = pids_in(tmp_path / "place")
    server = [int(pid) for pid in json.loads((work / "s3" / "running.json").read_text())]
    assert all(alive(pid) for pid in [*pids, *server])
    os.kill(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "cancelled after" in said
    # the kernel takes a moment to end what was killed
    wait_for(lambda: not [pid for pid in [*pids, *server] if alive(pid)])
    assert ran() == ["first", "hang", "tidy"]


def test_after_kill_9_nothing_is_left_and_the_next_run_goes_on(hanging, compiled, work, journal, ran, tmp_path, runner):
    arguments = {"place": str(tmp_path / "place"), "store": str(tmp_path / "store")}
    process = runner(hanging, **arguments)
    pids = pids_in(tmp_path / "place")
    process.kill()
    process.wait()
    # the step hears of it from the kernel; its child, which does not, is ended by the next run
    wait_for(lambda: not alive(pids[0]))
    (tmp_path / "place" / "pids").unlink()
    journal.write_text("")
    again = runner(hanging, **arguments)
    more = pids_in(tmp_path / "place")
    assert ran() == ["hang"]
    assert not [pid for pid in pids if alive(pid)]
    again.terminate()
    again.wait(60)
    wait_for(lambda: not [pid for pid in more if alive(pid)])


# --- bad surroundings -------------------------------------------------------------------------------------------------


@pytest.fixture
def published(compiled, steps):
    @dsl.pipeline(name="test")
    def pipeline(store: str, value: str = "a"):
        steps.publish(store=store, value=value)

    return compiled(pipeline)


@pytest.mark.slow
def test_a_store_of_its_own_is_an_s3_server_whose_data_stays(published, work, monkeypatch):
    for name in ("ZHLLAMA_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    first = run_pipeline(published, {}, work)
    assert first.reference("publish").startswith("s3://zhllama/artifacts/small/")
    assert run_pipeline(published, {}, work).steps["publish"]["state"] == "unchanged"
    assert "ZHLLAMA_S3_ENDPOINT" not in os.environ


def test_a_store_that_is_not_to_be_had_or_a_damaged_manifest_asks_the_stage(
    published, work, tmp_path, monkeypatch, caplog
):
    first = run_pipeline(published, {"store": str(tmp_path / "store")}, work)
    record = read_record(work / "steps" / "publish")
    assert record.still_there()
    Path(first.reference("publish")).write_text("{", encoding="utf-8")
    assert not record.still_there()
    assert not caplog.records

    def refused(uri: str) -> bytes:
        raise InputError(f"{uri}: S3 refuses these credentials")

    monkeypatch.setattr(storage, "read_bytes", refused)
    assert not record.still_there()


@pytest.mark.slow
def test_an_endpoint_in_the_environment_wins(published, work, s3_store):
    result = run_pipeline(published, {"store": s3_store}, work)
    assert result.reference("publish").startswith(f"{s3_store}/small/")
    assert not (work / "s3").exists()


def test_an_endpoint_where_nobody_answers_is_one_line(published, work, monkeypatch, s3_store):
    monkeypatch.setenv("ZHLLAMA_S3_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage.forget_client()
    with pytest.raises(
        InputError, match=r"no S3 server answers at http://127\.0\.0\.1:9; check the endpoint"
    ) as caught:
        run_pipeline(published, {"store": s3_store}, work)
    assert "\n" not in str(caught.value)


def test_wrong_credentials_are_one_line_and_the_next_run_goes_on(published, work, monkeypatch, s3_store):
    right = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong" * 8)
    storage.forget_client()
    with pytest.raises(InputError, match="S3 refuses these credentials"):
        run_pipeline(published, {"store": s3_store}, work)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", right)
    storage.forget_client()
    assert run_pipeline(published, {"store": s3_store}, work).exit_code == 0


def test_a_work_folder_that_cannot_be_made_is_one_line(published, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--work .*/file/work: Not a directory; choose another folder"):
        run_pipeline(published, {"store": str(tmp_path)}, tmp_path / "file" / "work")


def test_a_store_that_cannot_be_written_is_one_line(published, work, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/store: cannot write there"):
        run_pipeline(published, {"store": str(tmp_path / "file" / "store")}, work)


def test_wrong_names_are_refused_before_anything_starts(published, work):
    with pytest.raises(InputError, match=r"--set valu: .* \(did you mean value\?\)"):
        run_pipeline(published, {"valu": "b"}, work)
    with pytest.raises(InputError, match=r"--until publich: .* \(did you mean publish\?\)"):
        run_pipeline(published, {"store": str(work / "store")}, work, until="publich")
    assert not (work / "s3").exists()


def in_namespace(
    options: str, prepare: str, package: Path, work: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """The runner in namespaces of its own (`unshare`), after a shell command that changes them."""
    if subprocess.run(["unshare", options, "true"], capture_output=True).returncode:
        pytest.skip(f"this machine allows no `unshare {options}`")
    script = f'{prepare} && exec "$@"'
    words = [
        "unshare",
        options,
        "sh",
        "-c",
        script,
        "sh",
        sys.executable,
        "-c",
        GUARDED,
        str(package),
        str(work),
        *arguments,
    ]
    around = {
        name: value for name, value in os.environ.items() if name not in ("ZHLLAMA_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3")
    }
    return subprocess.run(words, capture_output=True, text=True, env=around, timeout=120)


GUARDED = f"from zhllama.stage.program import guarded\nguarded(lambda: exec({RUN!r}, {{}}))"


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(published, work, tmp_path):
    work.mkdir()
    full = f"mount -t tmpfs -o size=16k tmpfs {work} && head -c 15k /dev/zero > {work}/filler"
    ended = in_namespace("-rm", full, published, work, f"store={tmp_path / 'store'}")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "no space left; free some" in ended.stderr
    assert run_pipeline(published, {"store": str(tmp_path / "store")}, work).exit_code == 0


def test_no_free_port_is_one_line(published, work):
    few = "echo '40000 40003' > /proc/sys/net/ipv4/ip_local_port_range && ip link set lo up"
    ended = in_namespace("-rn", few, published, work)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "no free port on 127.0.0.1 for the S3 server" in ended.stderr
