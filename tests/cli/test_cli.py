"""The commands end to end: what they write, what they print, and how they fail."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import typer
from golden_cases import GOLDEN
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from capacitor_rt import FullCapacitor, FullCapacitorInferenceConfig
from capacitor_rt.cli.app import app, main

P16, P8 = str(GOLDEN / "p16"), str(GOLDEN / "p8")


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Call the command in a folder of its own; gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["capacitor-rt", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return exit.value.code or 0, out, err

    return run


@pytest.fixture
def photos(tmp_path):
    """A folder with two sizes, a subfolder, one stem twice, and one file that is no image."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:100, 0:150]
    picture = (np.stack([y, x, y + x], -1) + rng.integers(0, 20, (100, 150, 3))).astype(np.uint8)
    Image.fromarray(picture).save(folder / "a.png")
    Image.fromarray(picture[::-1]).save(folder / "a.bmp")
    Image.fromarray(picture[:, :70]).save(folder / "sub" / "with space.png")
    (folder / "bad.jpg").write_text("not a picture")
    return folder


def test_encode_then_decode(run, photos, tmp_path):
    code, out, err = run("encode", "photos", "-o", "enc", "--model", P16, "--posterior")
    assert code == 3 and "3 images encoded to enc, 1 failed" in out
    assert "not_an_image" in err and "bad.jpg" in err
    names = sorted(p.relative_to(tmp_path / "enc").as_posix() for p in (tmp_path / "enc").rglob("*") if p.is_file())
    assert names == ["a.bmp.safetensors", "a.png.safetensors", "sub/with space.png.safetensors"]

    # exactly what the library computes on the centre crop
    model = FullCapacitor.from_pretrained(P16)
    pixels = torch.from_numpy(np.array(Image.open(photos / "a.png"))[2:98, 11:139])[None]
    stored = load_file(tmp_path / "enc" / "a.png.safetensors")
    assert torch.equal(stored["latents"], model.encode(pixels))
    assert torch.equal(stored["mean"], model.encode_posterior(pixels).mean)
    with safe_open(tmp_path / "enc" / "a.png.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["latent_space"] == model.source.latent_space
    assert json.loads(metadata["placement"])["crop"] == {"height": 96, "width": 128}

    code, out, _ = run("decode", "enc/a.png.safetensors", "-o", "dec", "--model", P16, "--seed", 5)
    assert code == 0 and "1 image written to dec" in out
    decoded = np.array(Image.open(tmp_path / "dec" / "a.png"))
    truth = model.decode(stored["latents"], inference_config=FullCapacitorInferenceConfig(seed=5))[0]
    truth = (truth.clamp(-1, 1) * 127.5 + 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(decoded - truth).max() <= 1


def test_encode_sizes_and_dtype(run, photos, tmp_path):
    assert run("encode", "photos/a.png", "-o", "enc", "--model", P16, "--size", 64, "--dtype", "bf16")[0] == 0
    latents = load_file(tmp_path / "enc" / "a.png.safetensors")["latents"]
    assert latents.shape == (1, 16, 4, 4) and latents.dtype == torch.bfloat16
    assert run("encode", "photos/a.png", "-o", "area", "--model", P16, "--area", 128)[0] == 0
    _, _, h, w = load_file(tmp_path / "area" / "a.png.safetensors")["latents"].shape
    assert h < w and (h * 16) * (w * 16) <= 128**2


def test_decode_refuses_another_models_latents(run, photos, tmp_path):
    run("encode", "photos/a.png", "-o", "enc", "--model", P16)
    code, _, err = run("decode", "enc/a.png.safetensors", "-o", "dec", "--model", P8)
    assert code == 3 and "p16/whitened@" in err and "p8/whitened@" in err and "--any-space" in err
    code, _, err = run("decode", "enc/a.png.safetensors", "-o", "dec", "--model", P8, "--any-space")
    assert code == 3 and "expected [B,8,h,w]" in err


def test_decode_of_many_rows_and_of_foreign_files(run, tmp_path):
    save_file({"latents": torch.randn(3, 16, 2, 2)}, tmp_path / "shard.safetensors")
    save_file({"weights": torch.randn(3)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    code, out, err = run("decode", *(f"{n}.safetensors" for n in ("shard", "other", "text")), "-o", "d", "-m", P16)
    assert code == 3 and "3 images written" in out
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [f"shard-{i:06d}.png" for i in range(3)]
    assert "holds weights: expected a tensor named 'latents'" in err and "text.safetensors cannot be read" in err


def test_psnr_table_json_and_csv(run, photos, tmp_path):
    args = (
        "psnr",
        "photos",
        "--model",
        P16,
        "--size",
        64,
        "--against-dtype",
        "bf16",
        "--json",
        "t.json",
        "--csv",
        "t.csv",
    )
    code, out, err = run(*args)
    assert code == 3 and "1 of 4 images could not be decoded" in err
    assert "p16 - p16 bf16" in out and "P95" in out
    table = json.loads((tmp_path / "t.json").read_text())
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert len(rows) == 3 and rows[0].keys() == {"path", "height", "width", "p16", "p16 bf16"}
    mean = sum(float(r["p16"]) for r in rows) / 3
    assert table["models"]["p16"]["mean"] == pytest.approx(mean, abs=1e-3)

    model = FullCapacitor.from_pretrained(P16)
    pixels = Image.open(photos / "a.png").resize((96, 64), Image.Resampling.LANCZOS).crop((16, 0, 80, 64))
    image = torch.from_numpy(np.array(pixels))[None]
    back = (model.reconstruct(image, FullCapacitorInferenceConfig(seed=0)).clamp(-1, 1) * 127.5 + 127.5).round()
    mse = (back.permute(0, 2, 3, 1) - image.float()).square().mean().item()
    ours = next(float(r["p16"]) for r in rows if r["path"].endswith("a.png"))
    # other images of the batch move the seeded noise, by less than a thousandth of a decibel at this error
    assert ours == pytest.approx(10 * np.log10(255**2 / mse), abs=0.01)


def test_inspect(run, tmp_path):
    code, out, _ = run("inspect", P16)
    assert code == 0 and "461,008 parameters in 122 tensors: encoder 102,232, decoder 358,776" in out
    assert "no problems" in out and "encoder.blocks.0.layer_scale" in out
    tensors = load_file(GOLDEN / "p16" / "model.safetensors")
    tensors = {f"module.{k}": v.flatten() if ".grn." in k else v for k, v in tensors.items()}
    del tensors["module.decoder.fuse_in.bias"]
    tensors["module.decoder.out_proj.bias"][0] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    code, out, _ = run("inspect", tmp_path)
    assert code == 1 and "2 problems" in out
    assert "read as encoder.blocks.0.grn.beta [1, 224, 1, 1]" in out
    assert "problem: missing: decoder.fuse_in.bias [56]" in out and "not finite" in out
    code, out, _ = run("inspect", tmp_path, "--json")
    document = json.loads(out)
    assert code == 1 and len(document["problems"]) == 2 and len(document["tensors"]) == 121


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["encode", "gone.png", "-o", "x", "-m", P16], 2, "'gone.png' does not exist"),
        (["encode", "photos", "-o", "x", "-m", P16, "--size", "100"], 2, "not a multiple of 32: use 96 or 128"),
        (["encode", "photos", "-o", "x", "-m", P16, "--size", "64", "--area", "64"], 2, "exclude each other"),
        (["encode", "photos", "-o", "x", "-m", P16, "--background", "blue"], 2, "write it as RRGGBB"),
        (["encode", "photos", "-o", "x", "-m", "/nowhere"], 1, "'/nowhere' is neither a folder"),
        (["encode", "photos", "-o", "x", "-m", P16, "--device", "warp"], 2, "device 'warp'"),
        (["encode", "photos", "-o", "x", "-m", P16, "--backend", "magic"], 2, "backend 'magic' is unknown"),
        (["psnr", "photos/bad.jpg", "-m", P16], 2, "none of the 1 images could be decoded"),
        (["inspect", "/nowhere"], 1, "neither a folder"),
        (["encode", "photos"], 2, "Missing option"),
    ],
)
def test_failures_are_one_line_and_an_exit_code(run, photos, args, code, message):
    got, _, err = run(*args)
    assert got == code, err
    assert message in " ".join(err.split())


def test_every_command_and_option_is_explained_in_a_sentence():
    commands = typer.main.get_command(app).commands
    assert {"encode", "decode", "psnr", "inspect", "doctor"} <= set(commands)
    for name, command in commands.items():
        texts = {"": command.help} | {p.name: p.help for p in command.params}
        for what, text in texts.items():
            assert text and text[0].isupper() and text.rstrip().endswith("."), f"{name} {what}: {text!r}"


def test_help_does_not_wait_for_torch():
    code = "import sys, capacitor_rt.cli.app; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
