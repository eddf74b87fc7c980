"""Models from checkpoints and back: what `FullCapacitor` is made of, and where it came from."""

from __future__ import annotations

import dataclasses
import math
import warnings
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checkpoint
from .checks import check_device, check_model_dtype, check_multiple
from .config import ModelConfig
from .errors import InputError, UnverifiedModelWarning
from .fp8_encoding import Fp8Encoding, check_precision, encoding_name, find_calibration
from .reference import Posterior
from .runtime.backend import ServedAutoencoder
from .sizes import SIZE_MULTIPLE as SIZE_MULTIPLE

if TYPE_CHECKING:
    from typing_extensions import Self


class PretrainedAutoencoder(ServedAutoencoder):
    """A served autoencoder that is loaded and saved as the hub's models are; `source` says where it came from.

    Arguments: see `FullCapacitor`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backend: str = "auto",
        strict_size: bool = True,
        low_latency: bool = False,
        cuda_graphs: bool = True,
        overlap: bool = False,
        memory_budget: int | None = None,
        narrow_tiles: bool = True,
        dependent_launch: bool = False,
    ):
        super().__init__(
            config,
            backend=backend,
            low_latency=low_latency,
            cuda_graphs=cuda_graphs,
            overlap=overlap,
            memory_budget=memory_budget,
            narrow_tiles=narrow_tiles,
            dependent_launch=dependent_launch,
        )
        self.strict_size = strict_size
        self.source: checkpoint.CheckpointSource | None = None
        self._fp8: Fp8Encoding | None = None

    @property
    def encode_precision(self) -> str | None:
        """ "fp8" where images are encoded in e4m3; None where they are in the weights' dtype."""
        return None if self._fp8 is None else "fp8"

    def _check_fp8(self, image: Tensor) -> None:
        """Refuse what an encoder in e4m3 cannot take, where this is one."""
        if self._fp8 is None or torch.compiler.is_compiling():
            return
        if not self.is_as_loaded:
            raise InputError(
                "these weights are not those that the scales for fp8 were measured on, since they were changed: load "
                "them anew, or save and calibrate what they are now"
            )
        if torch.is_grad_enabled() and image.requires_grad:
            raise InputError("encoding in fp8 has no gradient: load the model without encode_precision for that")

    def _emulated_fp8(self, image: Tensor) -> Posterior:
        """Raw posterior of a checked image in e4m3, by plain torch."""
        if self._fp8 is None:
            raise InputError("this model was not loaded with encode_precision='fp8'")
        if "emulated" not in self._said:
            self._said.add("emulated")
            warnings.warn(
                "encoding in fp8 is emulated in plain torch here, slower than in 16 bits: its launches need a GPU of "
                "compute capability 8.9 or later and a model in bfloat16 or float16 (or backend='triton')",
                stacklevel=4,
            )
        return self._fp8.posterior(self.to_fold(), image, self.dtype)

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        cache_dir: str | PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str | None = None,
        strict: bool = True,
        backend: str = "auto",
        strict_size: bool = True,
        low_latency: bool = False,
        cuda_graphs: bool = True,
        overlap: bool = False,
        memory_budget: int | None = None,
        narrow_tiles: bool = True,
        dependent_launch: bool = False,
        encode_precision: str | None = None,
        fp8_calibration: str | PathLike[str] | None = None,
    ) -> Self:
        """Load a model, frozen and in eval mode.

        Args:
            id_or_path: hub id, folder, `.safetensors` file, or "sample" for the bundled one.
            device: default CPU.
            dtype, torch_dtype: of the convolutions' weights, default float32 whatever the file holds. Statistics, time
                embedding and AdaLN stay in float32.
            revision, cache_dir, token, local_files_only, force_download, subfolder: as in `huggingface_hub`;
                HF_HUB_OFFLINE is honoured.
            strict: False only warns of tensors that belong to no part of the model. Missing tensors are always an
                error.
            backend, strict_size, low_latency, cuda_graphs, overlap, memory_budget, narrow_tiles,
                dependent_launch: see the class.
            encode_precision: "fp8" encodes in e4m3 by the scales of `capacitor-rt calibrate-fp8`; refused without them.
                Its launches are for GPUs of compute capability 8.9 or later; elsewhere backend="torch", and a model
                on the CPU, emulate their arithmetic, slower than in 16 bits.
            fp8_calibration: file of the scales, where it is neither beside the weights nor in the user's cache folder.

        irdiffae and mdiffae load with an `UnverifiedModelWarning` until their inferred readings (`DicoConfig`) are
        settled by `capacitor-rt probe`.

        Raises:
            CheckpointError: not found, not readable, or its tensors do not fit; all of them are listed.
            InputError: `device` is not there, or `dtype` is none of float32, bfloat16 and float16 (or their names).
        """
        asked = {check_model_dtype(given) for given in (dtype, torch_dtype) if given is not None}
        if len(asked) > 1:
            raise InputError(f"dtype {dtype} and torch_dtype {torch_dtype} differ: pass one of them")
        check_precision(encode_precision)
        target = check_device(device)
        source = checkpoint.resolve(
            id_or_path,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            force_download=force_download,
            subfolder=subfolder,
        )
        calibration = find_calibration(source, fp8_calibration) if encode_precision == "fp8" else None
        read = checkpoint.read(source, strict=strict)
        _warn_unverified(read.config, source)
        with torch.device("meta"):
            model = cls(
                read.config,
                backend=backend,
                strict_size=strict_size,
                low_latency=low_latency,
                cuda_graphs=cuda_graphs,
                overlap=overlap,
                memory_budget=memory_budget,
                narrow_tiles=narrow_tiles,
                dependent_launch=dependent_launch,
            )
        model.load_checkpoint(read.tensors)
        model.source = source
        if calibration is not None:
            model.source = dataclasses.replace(source, encoding=encoding_name(calibration))
            model._fp8 = Fp8Encoding(calibration, read.config)
            model._fp8_ranges = model._fp8.ranges
        return model.to(device=target, dtype=asked.pop() if asked else torch.float32)

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, each whole or not at all.

        Tensors keep their dtype; `from_pretrained(folder)` gives the same model back.
        """
        checkpoint.save(folder, self.config, self.state_dict())

    @property
    def size_multiple(self) -> int:
        """H and W of an image must be multiples of this."""
        # the card of full_capacitor asks for more than the stride, those of the siblings do not
        if not self.strict_size or self.config.dico is not None:
            return self.latent_stride
        return math.lcm(SIZE_MULTIPLE, self.latent_stride)

    def check_size(self, height: int, width: int) -> None:
        """Raise InputError, naming the nearest legal sizes, unless `height` x `width` pixels can be encoded."""
        check_multiple(height, width, self.size_multiple, self.latent_stride)


def _warn_unverified(config: ModelConfig, source: checkpoint.CheckpointSource) -> None:
    if config.dico is None or config.dico.settled:
        return
    reading = ", ".join(f"{name} {config.dico.reading[name]}" for name in config.dico.open_readings)
    warnings.warn(
        f"{source.id} is a {config.dico.sibling}, of whose architecture parts are inferred and unverified ({reading}): "
        "a wrong guess loads and gives a bad picture. capacitor-rt probe MODEL IMAGE tells which reading is right",
        UnverifiedModelWarning,
        stacklevel=3,
    )
