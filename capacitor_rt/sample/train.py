"""Train the sample checkpoint: `python -m capacitor_rt.sample.train --minutes 40 --out FOLDER`.

Starts from an exact PCA (`initial.from_pca`) and learns what PCA cannot: content-dependent use of the 128 channels
and the neighbourhood of a patch. Nothing is downloaded; the photographs come with scikit-image and scikit-learn.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, convert_conv2d_weight_memory_format
from tqdm import tqdm

from ..config import ModelConfig
from ..diffusion import noise_level
from ..errors import CapacitorError, InputError
from ..evaluation.metrics import psnr
from ..reference import Autoencoder, posterior_mode, posterior_sample
from . import photos
from .augment import CropSampler, crop_pca
from .initial import blocks, from_pca
from .report import print_table, reconstruct

STATE = "training.pt"
# wider than the bottleneck (see `initial`), and then as deep as 3 MB in float16 allow
CONFIG = ModelConfig(
    model_dim=192,
    mlp_ratio=2.0,
    encoder_depth=1,
    decoder_depth=3,
    decoder_start_blocks=1,
    decoder_end_blocks=1,
    adaln_low_rank_rank=8,
)
# the layers that carry the PCA
LINEAR_LAYERS = re.compile(r"patchify|to_bottleneck|latent_up|fuse_in|fuse_skip|out_proj")
# tensors that a float16 file still stores in float32: a few hundred bytes that everything else depends on
FLOAT32_TENSORS = ("latent_norm_running_mean", "latent_norm_running_var", "decoder.time_embed.freqs")


@dataclass(frozen=True)
class Recipe:
    """Everything about the optimisation that is not the model or the length of the run.

    Attributes:
        batch, crop: crops per step, their side in pixels.
        pca_crops: crops that the PCA of the start is fitted on.
        lr, betas, weight_decay, clip: AdamW on the blocks, cosine decay to a hundredth; gradient norm limit.
        linear_lr: of the layers outside the blocks, which start as the PCA: larger steps mix its components faster than
            they can be told apart again.
        kl_weight: of the posterior's KL to the unit normal per patch, against the mean squared error in [-1,1].
        random_time_share: share of crops at a uniform t; the others are at t = 1, which is the one-step model.
        drop_path_every: every so many steps the middle blocks are replaced by the mask feature (path-drop guidance).
        leak: weight of the squared error before clamping: a pixel beyond black or white needs some gradient.
        floor: added to a crop's mean squared error inside the logarithm: very smooth crops shall not rule the rest.
        ema: decay of the averaged weights, which are the result.
    """

    batch: int = 6
    crop: int = 160
    pca_crops: int = 1500
    lr: float = 1.5e-3
    linear_lr: float = 1.5e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup_steps: int = 100
    kl_weight: float = 2.5e-8
    random_time_share: float = 0.125
    drop_path_every: int = 20
    leak: float = 0.1
    floor: float = 2e-3
    ema: float = 0.998


@dataclass
class TrainingRun:
    """State of a training run. `progress` in [0,1] drives the learning rate."""

    model: Autoencoder
    ema: Autoencoder
    optimizer: torch.optim.Optimizer
    sampler: CropSampler
    step: int = 0
    skipped: int = 0
    seconds: float = 0.0

    @property
    def generator(self) -> torch.Generator:
        return self.sampler.generator

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        state |= {"generator": self.generator.get_state(), "step": self.step, "seconds": self.seconds}
        partial = path.with_suffix(".tmp")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]


def start(
    chosen: Sequence[photos.Photo], pixels: list[np.ndarray], seed: int, recipe: Recipe, config: ModelConfig = CONFIG
) -> TrainingRun:
    """A run at step 0 on the photographs `chosen`, uint8 `[H,W,3]` each: the model is the PCA of random crops."""
    torch.manual_seed(seed)
    sampler = CropSampler(chosen, pixels, torch.Generator().manual_seed(seed))
    model = from_pca(config, crop_pca(sampler, recipe.pca_crops, recipe.crop, config.patch_size))
    convert_conv2d_weight_memory_format(model, torch.channels_last)
    for grn in (block.grn for block in blocks(model)):
        grn.register_forward_pre_hook(_stop_undefined_gradients)
    optimizer = torch.optim.AdamW(_parameter_groups(model, recipe), betas=recipe.betas)
    return TrainingRun(model, copy.deepcopy(model), optimizer, sampler)


def _stop_undefined_gradients(grn: nn.Module, args: tuple[Tensor, ...]) -> None:
    """GRN's square root has no slope where a channel is zero in a whole crop: let its gradient be 0, not NaN."""
    if args[0].requires_grad:
        args[0].register_hook(lambda grad: torch.where(grad.isnan(), 0.0, grad))


def _parameter_groups(model: Autoencoder, recipe: Recipe) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {
        "linear": {"params": [], "peak": recipe.linear_lr, "weight_decay": 0.0},
        "matrices": {"params": [], "peak": recipe.lr, "weight_decay": recipe.weight_decay},
        "vectors": {"params": [], "peak": recipe.lr, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and parameter.shape[0] > 1
        kind = "linear" if LINEAR_LAYERS.search(name) else "matrices" if is_matrix else "vectors"
        groups[kind]["params"].append(parameter)
    return list(groups.values())


def objective(
    model: Autoencoder, image: Tensor, generator: torch.Generator, recipe: Recipe, drop_path: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss of one batch `[B,3,H,W]` in [-1,1], and its error in dB (mean over crops, peak 2).

    The logarithm of each crop's error is what PSNR measures: a smooth crop counts nearly as much as a busy one.
    """
    config = model.config
    mean, logsnr = model.encode_posterior(image)
    assert logsnr is not None, "CONFIG has a Gaussian posterior"
    latents = posterior_sample(mean, logsnr, _normal(mean, generator))
    draws = torch.rand(2, len(image), generator=generator)
    times = torch.where(draws[0] < recipe.random_time_share, draws[1], 1.0)
    levels = [noise_level(t, config.logsnr_min, config.logsnr_max) for t in times.tolist()]
    alpha, sigma = (
        torch.tensor([getattr(level, name) for level in levels])[:, None, None, None] for name in ("alpha", "sigma")
    )
    noised = alpha * image + sigma * config.pixel_noise_std * _normal(image, generator)
    restored = model.decoder(noised, times, latents, drop_path=drop_path)
    clamped = (restored.clamp(-1, 1) - image).square().mean((1, 2, 3))
    error = clamped + recipe.leak * (restored - image).square().mean((1, 2, 3))
    kl = _kl_to_unit_normal(mean, logsnr)
    # the KL is set against the slope of the logarithm at a typical crop, about 34 dB
    loss = (error + recipe.floor).log().mean() + recipe.kl_weight / (1.5e-3 + recipe.floor) * kl
    return loss, 10 * torch.log10(4.0 / clamped.detach()).mean()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).contiguous(memory_format=torch.channels_last)


def _kl_to_unit_normal(mean: Tensor, logsnr: Tensor) -> Tensor:
    """KL of `N(alpha mean, sigma^2)` to `N(0, 1)`, summed over channels, mean over positions."""
    alpha2 = torch.sigmoid(logsnr)
    kl = 0.5 * (alpha2 * mean.square() - alpha2 - F.logsigmoid(-logsnr))
    return kl.sum(1).mean()


def train_step(run: TrainingRun, recipe: Recipe, progress: float) -> float:
    """One optimiser step; returns the batch's PSNR in dB, or NaN: no finite gradient, the step was skipped."""
    warm = min(1.0, (run.step + 1) / recipe.warmup_steps)
    cosine = 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * warm * cosine
    image = run.sampler.batch(recipe.batch, recipe.crop).contiguous(memory_format=torch.channels_last)
    drop_path = run.step % recipe.drop_path_every == recipe.drop_path_every - 1
    loss, decibels = objective(run.model, image, run.generator, recipe, drop_path)
    run.optimizer.zero_grad()
    loss.backward()
    norm = clip_grad_norm_(run.model.parameters(), recipe.clip)
    run.step += 1
    if not math.isfinite(norm):
        run.skipped += 1
        return math.nan
    run.optimizer.step()
    decay = min(recipe.ema, (1 + run.step) / (10 + run.step))
    with torch.no_grad():
        torch._foreach_lerp_(list(run.ema.parameters()), list(run.model.parameters()), 1.0 - decay)
    return decibels.item()


@torch.no_grad()
def running_statistics(model: Autoencoder, images: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Per-channel mean and variance `[Z]` of the posterior mode over uint8 `[H,W,3]` images, cropped to legal sizes."""
    modes = []
    for pixels in images:
        image = torch.from_numpy(np.ascontiguousarray(photos.centre_crop(pixels)))[None]
        mode = posterior_mode(*model.encode_posterior(image))
        modes.append(mode[0].flatten(1).double())
    rows = torch.cat(modes, 1)
    return rows.mean(1).float(), rows.var(1, unbiased=False).float()


def export(model: Autoencoder, images: list[np.ndarray], folder: Path, about: dict[str, str]) -> Autoencoder:
    """Write `config.json` and a float16 `model.safetensors`; returns the model as that file holds it, in float32.

    The statistics are those of the rounded weights.
    """
    rounded = Autoencoder(model.config)
    state = {name: t.half().float() if name not in FLOAT32_TENSORS else t for name, t in model.state_dict().items()}
    rounded.load_state_dict(state)
    mean, var = running_statistics(rounded, images)
    rounded.load_state_dict(state | {"latent_norm_running_mean": mean, "latent_norm_running_var": var})
    tensors = {
        name: (t if name in FLOAT32_TENSORS else t.half()).contiguous() for name, t in rounded.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **about})
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return rounded


def fit(
    run: TrainingRun,
    recipe: Recipe,
    folder: Path,
    *,
    steps: int | None,
    minutes: float,
    save_every: float = 120.0,
) -> None:
    """Train until `steps`, or else for `minutes`; the state is saved every `save_every` seconds and at the end."""
    began, saved = time.monotonic() - run.seconds, time.monotonic()
    check = [photos.centre_crop(photos.load(p)) for p in photos.VALIDATION if photos.find(p)]
    recent: list[float] = []
    progress = run.step / steps if steps else run.seconds / (60 * minutes)
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}") as bar:
        while progress < 1.0:
            recent = [*recent[-199:], train_step(run, recipe, progress)]
            run.seconds = time.monotonic() - began
            progress = run.step / steps if steps else run.seconds / (60 * minutes)
            bar.update(min(100.0, 100.0 * progress) - bar.n)
            bar.set_postfix_str(
                f"step {run.step}, {run.step / run.seconds:.2f} steps/s, train {np.nanmean(recent):.2f} dB"
            )
            if time.monotonic() - saved > save_every:
                run.save(folder / STATE)
                saved = time.monotonic()
                values = [psnr(p, reconstruct(run.ema, p)) for p in check]
                bar.write(f"step {run.step}: " + ", ".join(f"validation {v:.2f} dB" for v in values))
    run.save(folder / STATE)


def main(
    out: Annotated[Path, typer.Option(help="Folder for config.json, model.safetensors and the state of the run.")],
    minutes: Annotated[float, typer.Option(help="Length in minutes, where --steps is not given.")] = 40.0,
    steps: Annotated[int | None, typer.Option(help="Length in steps: the same seed gives the same weights.")] = None,
    threads: Annotated[int, typer.Option(help="Number of CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of all crops and noise.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the state that lies in --out.")] = False,
) -> None:
    """Train the sample checkpoint on the bundled photographs, then print its held-out PSNR beside PCA's."""
    try:
        torch.set_num_threads(threads)
        recipe = Recipe()
        pixels = [photos.load(photo) for photo in photos.TRAINING]
        run = start(photos.TRAINING, pixels, seed, recipe)
        state = out / STATE
        if resume and not state.is_file():
            raise InputError(f"--resume: {state} does not exist; leave --resume out to start anew")
        if resume:
            run.load(state)
        out.mkdir(parents=True, exist_ok=True)
        fit(run, recipe, out, steps=steps, minutes=minutes)
        about = {
            "seed": str(seed),
            "steps": str(run.step),
            "minutes": f"{run.seconds / 60:.1f}",
            "threads": str(threads),
            "torch": torch.__version__,
            "recipe": json.dumps(dataclasses.asdict(recipe)),
        }
        print_table(export(run.ema, pixels, out, about))
    except CapacitorError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
