"""Asking the Hugging Face hub for files: whether it can be reached at all, and what its failures are called here."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from .errors import CheckpointError

CONNECT_SECONDS = 5.0
"""Given to the hub to answer at all."""


def unreachable() -> str | None:
    """Why no connection to the hub can be opened, found out in seconds; None where it can, or is not to be tried.

    With a proxy only the proxy knows.
    """
    from huggingface_hub import constants

    address, proxies = urlsplit(constants.ENDPOINT), getproxies()
    if constants.HF_HUB_OFFLINE or not address.hostname:
        return None
    if (address.scheme in proxies or "all" in proxies) and not proxy_bypass(address.hostname):
        return None
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return f"{address.hostname} cannot be reached ({error.strerror or error})"
    return None


@contextmanager
def explained(id: str, revision: str | None, why: str | None) -> Iterator[None]:
    """What goes wrong at the hub, as a CheckpointError. `why`: the hub was not asked."""
    from huggingface_hub import errors as hub_errors

    try:
        yield
    except hub_errors.GatedRepoError:
        raise CheckpointError(f"{id} is gated: accept its terms on the hub and pass token=") from None
    except hub_errors.RepositoryNotFoundError:
        raise CheckpointError(f"{id} is not on the hub, or is private: check the name, or pass token=") from None
    except hub_errors.RevisionNotFoundError:
        raise CheckpointError(f"{id} has no revision {revision!r}: name a branch, a tag or a commit") from None
    except hub_errors.LocalEntryNotFoundError:
        asked = why or "the hub was not asked or not reached"
        raise CheckpointError(
            f"{id} is not in the local cache, and {asked}: connect, unset HF_HUB_OFFLINE / local_files_only, or pass "
            "a folder"
        ) from None
    except hub_errors.HFValidationError as error:
        raise CheckpointError(f"{id!r} is not a hub id: {error}") from None
    except (hub_errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{id} could not be downloaded: {error}") from None
