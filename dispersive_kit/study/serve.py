"""JupyterLab for the notebooks, on this machine alone."""

import secrets

from dispersive_kit.study.lookup import notebooks_folder


def lab_arguments(port: int, token: str, *, browser: bool, allow_root: bool) -> list[str]:
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
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.extension_manager=readonly",  # the other one asks PyPI
    ]


def serve_lab(port: int, *, browser: bool, allow_root: bool) -> None:
    """Start JupyterLab in this process, so that the token is on no command line, and print the address to open."""
    from jupyterlab.labapp import LabApp

    token = secrets.token_hex(24)
    # JupyterLab itself prints no token that it was given.
    print(f"open http://127.0.0.1:{port}/lab?token={token}", flush=True)
    LabApp.launch_instance(lab_arguments(port, token, browser=browser, allow_root=allow_root))
