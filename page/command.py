"""``python cli.py page``: starts the page's server on this machine. Imports nothing heavy."""

from __future__ import annotations

import argparse
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from antidreambooth.errors import InputError
from antidreambooth.files import writing
from page.texts import say

PORT = 8421
NEEDED = "the page needs Starlette and uvicorn: pip install -e '.[page]'"


def page(words: list[str]) -> None:
    """Serves the page until Ctrl-C; work that was started goes on after it.

    Args:
        words: the command line after ``page``.

    Raises:
        InputError: Starlette is missing, the folder cannot be written, or the port is taken.
    """
    options = parser().parse_args(words)
    try:
        import uvicorn

        from page.guard import ADDRESS, read_key
        from page.server import application
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise InputError(NEEDED) from error
    home = Path(options.folder).absolute()
    with writing(home, "choose another one with --folder"):
        key = read_key(home)
    listener = bound(ADDRESS, options.port)
    port = listener.getsockname()[1]
    print(say("terminal_open", address=f"http://{ADDRESS}:{port}/?token={key}"), flush=True)
    name_old(home)
    app = application(home, port, key, [Path(one).expanduser() for one in options.models], options.rounds)
    how: dict[str, Any] = {"access_log": False, "log_level": "warning", "server_header": False, "ws": "none"}
    with suppress(KeyboardInterrupt):  # uvicorn has ended already, and gives it on
        uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **how)).run(sockets=[listener])
    say_what_goes_on(home)


def main(words: list[str]) -> None:
    """The same for ``cli.py``, which comes here before it imports anything heavy."""
    try:
        page(words)
    except InputError as error:
        sys.exit(f"error: {error}")


def bound(address: str, port: int) -> socket.socket:
    """A socket that listens on this address.

    Raises:
        InputError: the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if sys.platform != "win32":  # where it means that two programs may have the same port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
        listener.listen()  # so that whoever reads the address finds somebody there
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"port {port} cannot be used: {error}; choose another one with --port") from error
    return listener


def parser() -> argparse.ArgumentParser:
    """The options; there is none for the address, which is this machine's own."""
    options = argparse.ArgumentParser("cli.py page", description=say("terminal_what"))
    options.add_argument("--port", type=int, default=PORT, help="of the address; 0 takes a free one")
    options.add_argument("--folder", default="outputs/page", help="where photos and results are kept until deleted")
    options.add_argument(
        "--models", action="append", default=[], metavar="FOLDER", help="a base model in diffusers layout, or several"
    )
    options.add_argument("--rounds", type=int, default=50, help="steps of a run; fewer are quicker and protect less")
    return options


def name_old(home: Path) -> None:
    """Names the folders that nobody has touched for a week."""
    from page.jobs import everyone, is_old

    if old := [folder.name for folder in everyone(home) if is_old(folder)]:
        print(say("terminal_old", count=len(old), folders=", ".join(old), home=home), flush=True)


def say_what_goes_on(home: Path) -> None:
    """Workers outlive the server: says so, and how to stop them."""
    from page.jobs import busy, everyone

    going = any(busy(folder) for folder in everyone(home))
    print(say("terminal_goes_on" if going else "terminal_ended"), flush=True)
