"""The figures of a measured command are the command's own."""

import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common.measure import CommandError, TooLongError, measure, run

MB = 1_000_000


def hold(megabytes: int) -> list[str]:
    return [sys.executable, "-S", "-c", f"x = bytearray({megabytes * MB})"]


def test_peak_follows_the_command(tmp_path: Path) -> None:
    small = measure(hold(0), tmp_path / "log").peak
    large = measure(hold(200), tmp_path / "log").peak

    assert 190 * MB < large - small < 210 * MB


def test_peak_leaves_this_process_out(tmp_path: Path) -> None:
    ballast = bytearray(os.urandom(1 * MB) * 300)

    assert measure(hold(0), tmp_path / "log").peak < 100 * MB
    assert len(ballast) == 300 * MB


def test_output_goes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = "import sys; print('out'); print('err', file=sys.stderr)"
    measure([sys.executable, "-c", program], log)

    assert sorted(log.read_text().split()) == ["err", "out"]


def test_failing_command_is_reported_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('last words'); sys.exit(7)"]

    for runner in (measure, lambda c, log: run(c, str(log), os.environ)):
        with pytest.raises(CommandError, match=r"exited with 7:\nlast words"):
            runner(command, tmp_path / "log")


def test_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no-such-program"):
        measure(["no-such-program"], tmp_path / "log")


def test_environment_is_the_commands(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import os; print(os.environ.get('GREETING'))"]
    measure(program, tmp_path / "log", {**os.environ, "GREETING": "hello"})

    assert (tmp_path / "log").read_text() == "hello\n"


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(TooLongError, match=r"took more than 0\.5 s"):
        measure([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", limit=0.5)

    assert time.monotonic() - started < 30
    assert measure(hold(0), tmp_path / "log", limit=60).wall < 60


def test_the_command_runs_in_the_folder_it_is_given(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "import os; print(os.getcwd())"]
    measure(program, tmp_path / "log", folder=tmp_path)

    assert Path((tmp_path / "log").read_text().strip()).samefile(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what is mapped")
def test_what_needs_too_much_memory_fails_by_itself(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="MemoryError"):
        measure(hold(400), tmp_path / "log", memory=300 * MB)

    assert measure(hold(100), tmp_path / "log", memory=300 * MB).peak > 100 * MB
