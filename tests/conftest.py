"""What all tests share: workers of one thread each, repeatable examples, and the real data where there is some."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Workers share the cores already, and one thread rounds alike on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts commands in the background with SIGINT ignored, and nohup with SIGHUP: the processes that tests start
# would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("ci", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """No workers for a single file: to start them takes longer than most files do. Else xdist counts the cores."""
    files = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """While tests are found hardly any garbage arises; all that is there afterwards stays, and need not be searched."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch  # not at the top: the process that only hands out tests does without

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _trained_once(tmp_path_factory) -> Iterator[None]:
    """``synthetic.trained`` learns a model once for all workers; that takes longer than most tests."""
    import torch

    module = importlib.import_module("attrib_zoo.synthetic.scenes")
    train, folder = module._trained, tmp_path_factory.getbasetemp()
    shared = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "trained"
    shared.mkdir(exist_ok=True)

    @functools.cache
    def trained(kind: str, *choice: int | None) -> torch.nn.Module:
        kept = shared / f"{kind} {choice}.pt"
        if not kept.exists():
            part = kept.with_suffix(f".{os.getpid()}")
            torch.save(train(kind, *choice), part)
            part.replace(kept)
        return torch.load(kept, weights_only=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_trained", trained)
        yield


@pytest.fixture(autouse=True)
def _seeded(_one_thread):
    import torch

    torch.default_generator.manual_seed(0)  # torch.manual_seed asks four kinds of devices too, which takes longer


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real weights and photographs."""
    folder = os.environ.get("ATTRIB_ZOO_DATA")
    if not folder:
        pytest.skip("ATTRIB_ZOO_DATA is not set: no real weights and photographs")
    return Path(folder)
