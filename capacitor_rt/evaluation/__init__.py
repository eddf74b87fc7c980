"""How well images and latents are reproduced: metrics, their run over files, FLUX.2 as the yardstick."""
