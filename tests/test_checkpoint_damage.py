"""Damaged and hostile checkpoints: refused with the reason, before anything is allocated; `tests.fuzz` makes more."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from capacitor_rt import CheckpointError, ConfigError, FullCapacitor, ModelConfig
from capacitor_rt.checkpoint_schema import STATISTICS, expected_shapes
from capacitor_rt.config import KNOWN_MODELS
from capacitor_rt.reference import Autoencoder

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "fuzz" / "corpus" / "checkpoints" / "taken-undamaged"


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint to damage: its folder, its header and its data."""
    weights = (TINY / "model.safetensors").read_bytes()
    (n,) = struct.unpack("<Q", weights[:8])
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    return tmp_path, json.loads(weights[8 : 8 + n]), weights[8 + n :]


def write(folder, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    n = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", n) + text + data)


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        FullCapacitor.from_pretrained(folder, strict_size=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "F33"}, "has dtype 'F33', which is unknown"),
        ({"dtype": 7}, "has dtype 'int', which is unknown"),
        ({"dtype": "F64"}, "does not take the 8 bytes"),
        ({"shape": [2, 2]}, "does not take the 8 bytes"),
        ({"shape": [-2]}, "is not a list of at most 16 sizes"),
        ({"shape": [True, 2]}, "is not a list of at most 16 sizes"),
        ({"shape": [2] + [1] * 16}, "is not a list of at most 16 sizes"),
        ({"shape": [2**62, 2**62, 0]}, "overflows 64 bits"),
        ({"data_offsets": [8, 0]}, "are not a begin and an end"),
        ({"data_offsets": [0]}, "are not a begin and an end"),
        ({"data_offsets": [0, 2**64]}, "are not a begin and an end"),
        ({"data_offsets": [16, 24]}, "overlaps what is before it|leaves a hole before it"),
    ],
)
def test_an_entry_of_the_header(checkpoint, changes, reason):
    folder, header, data = checkpoint
    header["encoder.blocks.0.layer_scale"] |= changes
    write(folder, header, data)
    message = refusal(folder)
    assert any(text in message for text in reason.split("|")), message
    assert "damaged or cut short; download it again" in message


def test_the_header_as_a_whole(checkpoint):
    folder, header, data = checkpoint
    write(folder, header, data + b"\0")
    assert f"take {len(data)} bytes and the file has {len(data) + 1}" in refusal(folder)
    write(folder, b"[]", b"")
    assert "a JSON list, not an object" in refusal(folder)
    write(folder, b"{}", data, length=2**63)
    assert f"said to take {2**63} bytes of a file of" in refusal(folder)
    write(folder, b"[" * 100_000, b"")
    assert "nested too deep" in refusal(folder)
    write(folder, b'{"a": {"dtype": "\xff"}}', b"")
    assert "not valid JSON" in refusal(folder)
    write(folder, {**header, "__metadata__": {"format": 1}}, data)
    assert "__metadata__ is no object of strings" in refusal(folder)
    text = json.dumps(header).encode()
    write(folder, text[:-1] + b', "__metadata__": {}, "__metadata__": {}}', data)
    assert "key '__metadata__' is there twice" in refusal(folder)
    write(folder, {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(5000)}, b"")
    assert "lists 5000 tensors, more than 4096" in refusal(folder)


def test_a_header_larger_than_any_is_not_read(checkpoint):
    folder, _, _ = checkpoint
    write(folder, b"{", b"", length=1 << 30)
    os.truncate(folder / "model.safetensors", 1 << 40)
    assert f"said to take {1 << 30} bytes, more than" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "dangling", "loop"])
def test_no_regular_file(checkpoint, name, kind):
    path = checkpoint[0] / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "dangling": path.with_name("gone"), "loop": path}[kind])
    assert name in refusal(path.parent)


@pytest.mark.parametrize(
    ("key", "text", "reason"),
    [
        ("model_dim", "9" * 5000, "has 5000 digits"),
        ("model_dim", "1e999", "too large for a number"),
        ("model_dim", "1000000000", "model_dim 1000000000 is too large: it is at most 65536"),
        ("encoder_depth", "10000000", "encoder_depth 10000000 is too large: it is at most 1024"),
        ("model_dim", "true", "model_dim is True, which is not an int"),
        ("model_dim", "[" * 500 + "]" * 500, "model_dim is [[[[[["),
        ("mlp_ratio", "NaN", "NaN is no JSON number"),
        ("mlp_ratio", "Infinity", "Infinity is no JSON number"),
        ("mlp_ratio", "1e300", "not finite, or too large for any model"),
        ("logsnr_max", "100000.0", "logsnr_max 100000.0 is not from -80 to 80"),
        ("latent_running_stats_eps", "-1.0", "latent_running_stats_eps -1.0 is not from 0"),
        ("bottleneck_norm_mode", "[" * 5000, "nested too deep"),
        ("bottleneck_norm_mode", '"\\ud800"', "half of a surrogate pair"),
        ("bottleneck_norm_mode", '"disabled", "bottleneck_norm_mode": "disabled"', "is there twice"),
    ],
)
def test_a_value_of_config(checkpoint, key, text, reason):
    folder, _, _ = checkpoint
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, key: "HERE"}).replace('"HERE"', text))
    assert reason in refusal(folder)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_json(folder / "config.json")
    assert reason in str(caught.value)


def test_a_large_config_is_not_read(checkpoint):
    folder, _, _ = checkpoint
    os.truncate(folder / "config.json", 1 << 40)
    assert "larger than" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_config_holds_finite_numbers(value):
    for name in ("mlp_ratio", "logsnr_max", "pixel_noise_std"):
        with pytest.raises(ConfigError, match=f"{name} {value} is not finite"):
            ModelConfig(**{name: value})
        with pytest.raises(ConfigError, match=name):
            ModelConfig.from_dict({name: value})
    with pytest.raises(ConfigError, match="model_dim"):
        ModelConfig.from_dict({"model_dim": 10**5000})


@pytest.mark.parametrize("index", ["10000000", "9" * 900, "\u0661\u0660", "01"])
def test_a_block_that_cannot_be_is_left_over(checkpoint, index):
    folder, header, data = checkpoint
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
    write(folder, {**header, f"encoder.blocks.{index}.dwconv.bias": entry}, data + bytes(4))
    assert f"1 problem):\n  left over: encoder.blocks.{index}.dwconv.bias" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.bool, torch.complex64])
def test_types_that_weights_have_not(checkpoint, dtype):
    folder, _, _ = checkpoint
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.fuse_in.bias"] = tensors["decoder.fuse_in.bias"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    assert "1 problem):\n  wrong type: decoder.fuse_in.bias is stored as" in refusal(folder)


def test_float64_beyond_float32_is_not_finite_there(checkpoint):
    folder, _, _ = checkpoint
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.fuse_in.bias"] = torch.tensor([1e300, 1.0], dtype=torch.float64)
    save_file(tensors, folder / "model.safetensors")
    assert "not finite: decoder.fuse_in.bias has 1 NaN or Inf among 2 values" in refusal(folder)


@pytest.mark.parametrize("config", [*KNOWN_MODELS.values(), ModelConfig(decoder_depth=4, model_dim=8)])
@pytest.mark.parametrize("has_statistics", [True, False])
def test_expected_shapes_are_those_of_the_whole_model(config, has_statistics):
    with torch.device("meta"):
        model = Autoencoder(config)
    whole = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in STATISTICS}
    statistics = dict.fromkeys(STATISTICS, (config.latent_channels,)) if has_statistics else {}
    assert expected_shapes(config, has_statistics) == whole | statistics


def test_names_that_no_file_can_have(tmp_path):
    for name in ("x" * 5000, "a\0b", "~nobody-of-that-name/model"):
        with pytest.raises(CheckpointError):
            FullCapacitor.from_pretrained(name)


def fuzz(*args):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--surface", "checkpoints", *args],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_what_once_was_a_finding():
    done = fuzz("--replay")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_few_mutants():
    done = fuzz("--mutants", "50", "--seed", "14")
    assert done.returncode == 0 and "50 mutants" in done.stdout, done.stdout + done.stderr


def test_the_judge_sees_crashes_hangs_and_raw_errors(monkeypatch):
    from fuzz import forked

    def spin():
        while True:
            pass

    def refuse():
        raise CheckpointError("no")

    acts = {
        0: lambda: None,
        1: lambda: os.kill(os.getpid(), signal.SIGKILL),
        2: spin,
        3: lambda: [].pop(),
        4: refuse,
        5: lambda: os._exit(0),
    }

    class Acts:
        name = "acts"
        corpus = Path()

        def warm(self):
            pass

        def write(self, seed, number, folder):
            (folder / "number").write_text(str(number))
            return str(number)

        def read(self, folder):
            acts[int((folder / "number").read_text())]()

    monkeypatch.setattr(forked, "SECONDS", 0.2)
    outcomes = [v.outcome for v in forked.judge(Acts(), 0, range(6))]
    assert outcomes[0] == "taken" and outcomes[4] == "refused"
    assert outcomes[1] == "killed by SIGKILL" and outcomes[2] == "took over 0.2 s"
    assert outcomes[3].startswith("IndexError at") and outcomes[5] == "ended with 0"
