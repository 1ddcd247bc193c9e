"""The command ``app``: serves a page on which photographs are explained; returns the text to print at its end."""

from __future__ import annotations

from typing import Any

from attrib_zoo.cli import page
from attrib_zoo.cli.studio import studio_of
from attrib_zoo.errors import DataError


def app(options: Any) -> str:
    """Serve the page until it is interrupted."""
    page.check_installed()
    studio = studio_of(options)
    try:
        page.serve(studio, title=options.model, host=options.host, port=options.port)
    except OSError as error:
        raise DataError(
            f"port: cannot listen on {options.host}:{options.port} ({error}); choose another --port"
        ) from error
    return "stopped"
