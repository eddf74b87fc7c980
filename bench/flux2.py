"""The FLUX.2 VAE as its users run it, beside this model: encode and decode, time and memory.

    python -m bench flux2                  on the GPU: the published rows, then all sizes and batches
    python -m bench flux2 --device cpu     a tiny VAE of the same class, to test the benchmark itself

`AutoencoderKLFlux2` of diffusers in its published configuration; its random weights change neither time nor memory.
encode is the mode of the posterior, 2x2 patchified and normalised as the FLUX.2 pipeline does; decode is the inverse.
Its attention is torch's as its users have it, and in one contender this project's kernel, which holds no matrix of
scores. This model runs interleaved with it, so that the speed-up comes from one run. The options are those of
`python -m bench model`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .model import arguments, check_device, run


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0 also where diffusers is absent, which is said in one line."""
    args = arguments("flux2", __doc__, argv)
    if not check_device(args):
        return 2
    from capacitor_rt.evaluation.flux2 import missing

    reason = missing()
    if reason:
        print(f"FLUX.2 not measured: {reason}")
        return 0
    import diffusers

    from ._contenders import FLUX2S

    return run("flux2", FLUX2S, args, {"diffusers": diffusers.__version__})


if __name__ == "__main__":
    sys.exit(main())
