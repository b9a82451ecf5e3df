"""What every test shares: the import path, one torch thread, no network, optional real data."""
import os
import pathlib
import socket
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the product is top-level files, not a package
sys.path.insert(0, str(ROOT / "tests"))

# Subprocesses started by tests inherit these: repeatable sums, and no run that waits for a hub.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT)] + [p for p in [os.environ.get("PYTHONPATH")] if p])

import helpers  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs as two processes, each test file in one of them; a part runs as one."""
    whole = config.args_source.name != "ARGS" and not config.option.usepdb
    if whole and "PYTEST_XDIST_WORKER" not in os.environ and (
            getattr(config.option, "numprocesses", 0) is None):
        config.option.numprocesses, config.option.dist = 2, "loadfile"
        config.option.loadscopereorder = False  # it puts files of many tests first, not long ones


LONG = ("scripts", "train_staged", "train_distill", "train_contrastive", "train_clipfit", "devices",
        "faults", "distributed", "repo", "tokenizer", "device", "parity", "clip_model", "weights")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests marked slow")


def pytest_collection_modifyitems(config, items):
    """The longest files first, so that neither process is left alone with one at the end. Tests
    marked slow are left to --slow, and to whoever names their file."""
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if config.args_source.name != "ARGS" and not config.option.slow:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes long: --slow runs it"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than about ten seconds; see --slow")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches out fails at once, in its own process, instead of hanging offline."""
    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"the test suite is offline; refused a connection to {address}")
        return connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def run():
    """A device.Run on the CPU, in fp32."""
    import device
    return device.start("cpu", "fp32")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return helpers.script_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def whole_run(data, tmp_path_factory):
    """name of a script, its "train_" or not -> the folder of an uninterrupted run of six steps."""
    parent = tmp_path_factory.mktemp("whole")

    def run(name):
        name = name.removeprefix("train_")
        if not (parent / name).exists():
            helpers.in_child(helpers.script, f"train_{name}", *helpers.script_flags(
                name, data, "--save-every", 2, "--output-dir", parent / name)).ok()
        return parent / name
    return run


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="session")
def shared():
    """The folder of real development data beside the checkout, if it is here."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real development data (../shared/data) is not here")
    return folder
