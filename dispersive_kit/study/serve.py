"""JupyterLab for the notebooks, and Voila for the lecture console, on this machine alone."""

import os
import secrets
from pathlib import Path

from dispersive_kit.study.lookup import notebooks_folder

LAB = "lab"
CONSOLE = "voila/render/90_lecture_console.ipynb"
BUNDLED_MATHJAX = {"page_config": {"fullMathjaxUrl": "null", "mathjaxConfig": "null"}}  # not that of a public server
# Voila's template for the console's page, which fetches nothing; and defaults of JupyterLab: long lines of code are
# wrapped, so that a projector shows all of them, and no news is fetched, which would cover figures too.
OWN = Path(__file__).parent / "jupyter"


def lab_arguments(port: int, token: str, *, browser: bool, allow_root: bool, page: str = LAB) -> list[str]:
    """Arguments of JupyterLab: they override any configuration file, which may say otherwise."""
    return [
        "--ServerApp.ip=127.0.0.1",
        f"--IdentityProvider.token={token}",
        "--PasswordIdentityProvider.hashed_password=",
        "--ServerApp.allow_remote_access=False",
        "--ServerApp.allow_unauthenticated_access=False",
        "--ServerApp.disable_check_xsrf=False",
        "--ServerApp.allow_origin=",
        "--ServerApp.allow_origin_pat=",
        f"--ServerApp.allow_root={allow_root}",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",  # the address printed is the one that is served
        f"--ServerApp.open_browser={browser}",
        f"--ServerApp.root_dir={notebooks_folder()}",
        f"--LabApp.default_url=/{page}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",  # the other one asks PyPI
        "--VoilaConfiguration.template=offline",
        "--VoilaConfiguration.file_denylist=.*",  # it would give images to whoever asks, without the token
        f"--VoilaConfiguration.resources={BUNDLED_MATHJAX}",
    ]


def serve_lab(port: int, *, browser: bool, allow_root: bool, page: str = LAB) -> None:
    """Start JupyterLab in this process, so that the token is on no command line, and print the address to open.

    page: what the browser opens: `LAB`, or `CONSOLE`, which Voila serves on the same server and behind the same token.
    """
    from jupyterlab.labapp import LabApp

    token = secrets.token_hex(24)
    for variable in ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH"):
        os.environ[variable] = os.pathsep.join(filter(None, [str(OWN), os.environ.get(variable)]))
    # JupyterLab itself prints no token that it was given.
    print(f"open http://127.0.0.1:{port}/{page}?token={token}", flush=True)
    LabApp.launch_instance(lab_arguments(port, token, browser=browser, allow_root=allow_root, page=page))
