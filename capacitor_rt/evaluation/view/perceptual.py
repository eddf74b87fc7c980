"""LPIPS, where its package and the weights of its network are here."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch

from ...extras import is_installed

Distance = Callable[[np.ndarray, np.ndarray], float]


def lpips_distance() -> tuple[Distance | None, str]:
    """LPIPS (Zhang et al. 2018, AlexNet, version 0.1) of two uint8 images `[H,W,3]`, or None and the reason.

    Lower is closer. The package is `lpips`; it reads AlexNet's weights through torchvision, which downloads them once.
    """
    if not is_installed("lpips"):
        return None, "LPIPS is left out: pip install lpips torchvision"
    try:
        import lpips

        network = lpips.LPIPS(net="alex", verbose=False).eval().requires_grad_(False)
    except Exception as error:
        # a package that is broken, or weights that cannot be fetched, fail in their own ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, f"LPIPS is left out: its network cannot be loaded ({reason})"
    lock = threading.Lock()

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        x, y = (torch.tensor(t).permute(2, 0, 1)[None] / 127.5 - 1 for t in (a, b))
        with lock, torch.no_grad():
            return float(network(x, y))

    return distance, ""
