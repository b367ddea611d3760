"""The JupyterLab that the kit starts, against a configuration that would open it to everyone."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

OPEN_TO_ALL = """
c.ServerApp.ip = "0.0.0.0"
c.IdentityProvider.token = ""
c.ServerApp.allow_remote_access = True
c.ServerApp.allow_unauthenticated_access = True
c.ServerApp.allow_origin = "*"
"""


@pytest.fixture
def lab(tmp_path):
    """The address that a running server prints."""
    (tmp_path / "jupyter_server_config.py").write_text(OPEN_TO_ALL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "dispersive_kit.cli", "lab", "--no-browser", "--port", port]
    process = subprocess.Popen(
        command,
        env={**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = ""
        for line in process.stdout:
            said += line
            if "is running at" in line:
                break
        address = re.search(rf"^open (http://127\.0\.0\.1:{port}/lab\?token=\w+)$", said, re.MULTILINE)
        assert address and "is running at" in said, said
        wait_until_it_answers(int(port))
        yield address[1], process.pid
    finally:
        process.kill()  # no kernel was started
        process.communicate()


def wait_until_it_answers(port, seconds=60):
    """It says that it runs a little before it listens."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as caller:
            if caller.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


def status(address):
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code


def test_jupyterlab_listens_on_localhost_with_a_token_whatever_its_configuration_says(lab):
    address, pid = lab
    base, token = re.match(r"(.+)/lab\?token=(\w+)", address).groups()
    assert len(token) == 48
    assert status(f"{base}/api/contents") == 403 == status(f"{base}/api/contents?token=wrong")
    assert status(f"{base}/api/contents?token={token}") == 200
    with pytest.raises(urllib.error.URLError):  # another address of this machine, as a neighbour would see it
        urllib.request.urlopen(base.replace("127.0.0.1", "127.0.0.2"), timeout=5)
    assert token not in Path(f"/proc/{pid}/cmdline").read_text()
