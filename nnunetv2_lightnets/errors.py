"""The errors that a user can cause."""

from __future__ import annotations


class LightNetsError(Exception):
    """Root of every error that a user can cause.

    Its text is one line that names the thing, its value and the remedy; commands print it and exit with code 2.
    """
