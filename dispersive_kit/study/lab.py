"""How the kit starts Jupyter: kernels without ports, and JupyterLab and Voila for this machine only."""

import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from queue import Empty
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.manager import AsyncKernelManager
from traitlets import Type, default

from dispersive_kit.study.machine import require_home
from dispersive_kit.study.notebook import notebooks_folder

CONSOLE = "voila/render/90_lecture_console.ipynb"
# Voila's template for the console's page, which fetches nothing; and defaults of JupyterLab: long lines of code are
# wrapped, so that a projector shows all of them, and no news is fetched, since its window would cover figures.
_OWN = Path(__file__).parent / "jupyter"
_BUNDLED_MATHJAX = {"page_config": {"fullMathjaxUrl": "null", "mathjaxConfig": "null"}}  # not that of a public server
_BEGIN_S = 60  # seconds within which a kernel must start a cell that was sent to it

# What Voila's pages use: others, such as that of the package notebook, are made for JupyterLab and fail there.
_SHOWN = ["anywidget", "@jupyter-widgets/jupyterlab-manager", "@voila-dashboards/widgets-manager8"]


class _Iopub(AsyncZMQSocketChannel):
    """Keeps the time at which a cell was sent, until the kernel starts it."""

    sent = float("inf")

    async def get_msg(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        message = await super().get_msg(*args, **kwargs)
        if message["content"].get("execution_state") == "busy":
            self.sent = float("inf")
        return message


class _Shell(AsyncZMQSocketChannel):
    """Checks each second whether an answer has come. jupyter_client sends some messages outside the event loop, such
    as a widget's state while a cell runs. An answer that comes then does not wake the loop (ZMQ_FD in libzmq's manual).
    """

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:  # type: ignore[override]
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while not await self.socket.poll(round(1000 * min(1, max(0, end - time.monotonic())))):
            if time.monotonic() >= end:
                raise Empty
        return await self._recv()


class _Client(AsyncKernelClient):
    """Treats a kernel as dead if it does not start a cell: it hangs, or the message was lost."""

    iopub_channel_class = Type(_Iopub)
    shell_channel_class = Type(_Shell)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        self.iopub_channel.sent = time.monotonic()
        return super().execute(*args, **kwargs)

    async def is_alive(self) -> bool:
        return time.monotonic() - self.iopub_channel.sent < _BEGIN_S and await super().is_alive()


class Kernel(AsyncKernelManager):
    """A kernel reached through files in a folder of its own: a free port could be taken before the kernel binds it."""

    client_factory = Type(_Client)

    @default("transport")
    def _transport_default(self) -> str:
        return "tcp" if os.name == "nt" else "ipc"

    @default("ip")
    def _ip_default(self) -> str:
        if self.transport == "tcp":
            return super()._ip_default()
        return f"{tempfile.mkdtemp(prefix='kernel-', dir='/tmp')}/at"  # short: a socket's path has at most 103 letters

    async def cleanup_resources(self, restart: bool = False) -> None:  # type: ignore[override]
        await super().cleanup_resources(restart)
        if self.transport == "ipc" and not restart:
            shutil.rmtree(Path(self.ip).parent, ignore_errors=True)


def serve_lab(port: int, *, browser: bool, page: str = "lab") -> None:
    """Start JupyterLab in this process, so that the token is on no command line, and print the address to open.

    page: what the browser opens: JupyterLab, or `CONSOLE`, which Voila serves on the same server behind the same token.
    """
    require_home()
    from jupyterlab.labapp import LabApp

    token = secrets.token_hex(24)
    for variable in ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH"):
        os.environ[variable] = os.pathsep.join(filter(None, [str(_OWN), os.environ.get(variable)]))
    print(f"open http://127.0.0.1:{port}/{page}?token={token}", flush=True)  # JupyterLab prints no token it was given
    LabApp.launch_instance([  # arguments override any configuration file, which may say otherwise
        "--ServerApp.ip=127.0.0.1",
        f"--IdentityProvider.token={token}",
        "--PasswordIdentityProvider.hashed_password=",
        "--ServerApp.allow_remote_access=False",
        "--ServerApp.allow_unauthenticated_access=False",
        "--ServerApp.disable_check_xsrf=False",
        "--ServerApp.allow_origin=",
        "--ServerApp.allow_origin_pat=",
        "--ServerApp.allow_root=True",  # root is the usual user in a container
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",  # the address printed is the one that is served
        f"--ServerApp.open_browser={browser}",
        f"--ServerApp.root_dir={notebooks_folder()}",
        f"--LabApp.default_url=/{page}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",  # the other one contacts PyPI
        "--VoilaConfiguration.template=offline",
        f"--VoilaConfiguration.extension_allowlist={_SHOWN}",
        "--VoilaConfiguration.extension_denylist=[]",
        "--VoilaConfiguration.file_denylist=.*",  # otherwise images can be read without the token
        f"--VoilaConfiguration.resources={_BUNDLED_MATHJAX}",
    ])  # fmt: skip
