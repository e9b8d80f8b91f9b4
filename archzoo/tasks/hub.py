"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

SECONDS = 3.0  # that the hub has to answer, where one is asked


def go_offline() -> bool:
    """Where the hub does not answer, use what is in its cache alone; whether that is so.

    Its library tries for half a minute otherwise.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return False  # which is asked instead
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), SECONDS).close()
        return False
    except OSError:
        import datasets.config
        import huggingface_hub.constants

        # Both read the environment when they are imported, which is long ago.
        os.environ["HF_HUB_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        return True
