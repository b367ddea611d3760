"""The JupyterLab that the kit starts, against a configuration that would open it to everyone."""

import asyncio
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from queue import Empty

import pytest
import warm
import zmq.asyncio
from jupyter_client.session import Session

from dispersive_kit.study.lab import _Shell

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
        port = free.getsockname()[1]
    places = {"JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    process = warm.start("dispersive-kit", "lab", "--no-browser", "--port", port, **places)
    try:
        process.until(lambda: answers(port), timeout=120)
        address = re.search(rf"^open (http://127\.0\.0\.1:{port}/lab\?token=\w+)$", process.output, re.MULTILINE)
        assert address, process.output
        yield address[1]
    finally:
        process.kill()  # no kernel was started


def answers(port):
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def status(address):
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code


def test_jupyterlab_listens_on_localhost_with_a_token_whatever_its_configuration_says(lab):
    base, token = re.match(r"(.+)/lab\?token=(\w+)", lab).groups()
    assert len(token) == 48
    assert status(f"{base}/api/contents") == 403 == status(f"{base}/api/contents?token=wrong")
    assert status(f"{base}/api/contents?token={token}") == 200
    with pytest.raises(urllib.error.URLError):  # another address of this machine, as a neighbour would see it
        urllib.request.urlopen(base.replace("127.0.0.1", "127.0.0.2"), timeout=5)
    assert token not in subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout


def test_an_answer_that_comes_while_a_widget_sends_its_state_is_not_missed():
    """Without the look each second: the client waits for a cell whose end has come."""

    async def ask():
        context, session = zmq.asyncio.Context(), Session(key=b"k")
        kernel, asked = zmq.Context.shadow(context.underlying).socket(zmq.ROUTER), context.socket(zmq.DEALER)
        asked.connect(f"tcp://127.0.0.1:{kernel.bind_to_random_port('tcp://127.0.0.1')}")
        channel = _Shell(asked, session)
        channel.send(session.msg("execute_request"))
        who, *_ = kernel.recv_multipart()
        waiting = asyncio.create_task(channel.get_msg(timeout=30))
        await asyncio.sleep(0.2)
        session.send(kernel, "execute_reply", ident=who)
        time.sleep(0.2)  # the answer is there, and the event loop does not know yet
        channel.send(session.msg("comm_msg"))
        assert (await asyncio.wait_for(waiting, 20))["msg_type"] == "execute_reply"
        with pytest.raises(Empty):
            await channel.get_msg(timeout=0.1)
        kernel.close(0)
        context.destroy(0)

    with ThreadPoolExecutor(1) as thread:  # Playwright keeps a loop in the thread of the tests
        thread.submit(asyncio.run, ask()).result()
