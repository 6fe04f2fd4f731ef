"""Signals end a benchmark, which leaves no folder behind, and a count of memory."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from asymflow_ft.bench.scratch import ended_by_signals
from asymflow_ft.training.rehearsal import Meter
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_what_drops_exceptions(name, tmp_path):
    code = f"""
import os, signal, weakref
from asymflow_ft.bench.scratch import ended_by_signals, scratch_folder

def callback(_):  # where Python drops exceptions, as in a fork's
    os.kill(os.getpid(), signal.{name})
    for _ in range(1000):
        pass

signal.signal(signal.{name}, signal.SIG_DFL)  # under nohup it would be ignored
with ended_by_signals(), scratch_folder() as folder:
    (folder / "file").touch()
    held = set()
    watched = weakref.ref(held, callback)
    del held
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, cwd=REPOSITORY)
    assert done.returncode == 128 + signal.Signals[name] and not list(tmp_path.iterdir())


def test_handlers_of_signals_come_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in before} == before
    with ThreadPoolExecutor() as pool:  # which gets no signals
        pool.submit(ended_by_signals().__enter__).result()


def test_sigterm_ends_a_benchmark(tmp_path):
    command = [sys.executable, "-m", "asymflow_ft.cli", "bench", "step", "--resolution", "64", "--repeats", "100000"]
    bench = subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("asymflow-bench-*/run/cache/*")) and time.monotonic() < deadline:
            assert bench.poll() is None
            time.sleep(0.1)
        bench.terminate()
        assert bench.wait(60) == 143 and not list(tmp_path.glob("asymflow-bench-*"))
    finally:
        bench.kill()


def test_ctrl_c_ends_a_count(monkeypatch):
    """Python drops exceptions in callbacks, and the death of each counted tensor could be one."""
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for number in range(100):
            with pytest.raises(KeyboardInterrupt), Meter() as meter:
                signal.setitimer(signal.ITIMER_REAL, 1e-3 + number * 1e-5, 5)  # once more if it was lost
                while True:
                    torch.empty(8)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert meter.peak <= 64
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not lost
