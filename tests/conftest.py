"""What every test shares: the import path, one torch thread, no network, and the optional real data."""
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the product is top-level files, not a package

# Subprocesses started by tests inherit these: repeatable sums, and no run that waits for a hub.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT)] + [p for p in [os.environ.get("PYTHONPATH")] if p])

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches out fails at once, in its own process, instead of hanging offline."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"the test suite is offline; refused a connection to {address}")
        return connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session", autouse=True)
def simulated_devices(request, tmp_path_factory):
    """Both simulated devices at work, each in its own process: {name: (folder, process)}. They
    start with the session, beside the tests that come before test_devices.py on the other core."""
    at_work, here = {}, pathlib.Path(__file__).resolve().parent
    if any(item.path.name == "test_devices.py" for item in request.session.items):
        for name in ("npu", "mps"):
            folder = tmp_path_factory.mktemp(name)
            with open(folder / "output.txt", "w") as output:
                at_work[name] = folder, subprocess.Popen(
                    [sys.executable, str(here / "simulated_device.py"), name,
                     str(here / "test_devices.py"), name, str(folder)],
                    stdout=output, stderr=output)
    yield at_work
    for _, process in at_work.values():
        process.kill()


@pytest.fixture(scope="session")
def shared():
    """The folder of real development data beside the checkout; tests that need it skip without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real development data (../shared/data) is not here")
    return folder
