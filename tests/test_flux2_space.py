"""FLUX.2's space through a calibration: against the formulas written out, there and back, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from calibrations import SPACE, document
from torch import nn

from capacitor_rt import InputError
from capacitor_rt.flux2_space import Flux2Calibration, PoorCalibrationError, from_flux2, to_flux2


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def test_the_formulas_written_out():
    values = document(channels=[2, 0, 3, 1])
    calibration = Flux2Calibration.from_dict(values)
    latents, logsnr = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6) * 3
    white, norm = values["whitening"], values["batch_norm"]
    mode = latents.double() * column(white["std"]) + column(white["mean"])
    mean = mode / torch.sigmoid(logsnr.double()).sqrt()
    for raw, lines, given in ((mode, "mode", None), (mean, "mean", logsnr)):
        want = column(values[lines]["a"]) * raw[:, [2, 0, 3, 1]] + column(values[lines]["b"])
        got = to_flux2(latents, calibration, logsnr=given, normalised=False)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        want = (want - column(norm["running_mean"])) / (column(norm["running_var"]) + 1e-4).sqrt()
        got = to_flux2(latents, calibration, logsnr=given)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        # a row alone
        row = to_flux2(latents[1], calibration, logsnr=None if given is None else given[1])
        torch.testing.assert_close(row, got[1])


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("whitening", [True, False])
def test_there_and_back(normalised, whitening):
    values = document(channels=[2, 0, 3, 1])
    calibration = Flux2Calibration.from_dict(values if whitening else values | {"whitening": None})
    latents = torch.randn(2, 4, 3, 3)
    there = to_flux2(latents, calibration, normalised=normalised)
    torch.testing.assert_close(from_flux2(there, calibration, normalised=normalised), latents, rtol=1e-5, atol=1e-5)
    assert (there - latents).abs().max() > 0.1


def test_the_batch_norm_of_another_autoencoder():
    calibration = Flux2Calibration.from_dict(document())
    bn = nn.BatchNorm2d(4, eps=1e-4, affine=False).eval()
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2.0)
    latents = torch.randn(2, 4, 3, 3)
    want = bn(to_flux2(latents, calibration, normalised=False))
    torch.testing.assert_close(to_flux2(latents, calibration, bn), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(from_flux2(want, calibration, bn), latents, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="3 channels"):
        to_flux2(latents, calibration, nn.BatchNorm2d(3))


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(document()))
    calibration = Flux2Calibration.read(path)
    assert json.loads(json.dumps(calibration.to_dict())) == document()
    calibration.check_space(SPACE)
    with pytest.raises(InputError, match="are of other/whitened@x: calibrate"):
        calibration.check_space("other/whitened@x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "capacitor-latents/1"}, "no capacitor-flux2-calibration/1"),
        ({"channels": [0, 0, 1, 2]}, "no order of 0 to 3"),
        ({"side": "left"}, "side is 'left', not one of 'before', 'after'"),
        ({"mean": document()["mean"] | {"a": [1.0] * 3}}, "mean.a is no list of 4"),
        ({"mean": document()["mean"] | {"a": [0.0] * 4}}, "mean.a holds 0"),
        ({"mean": document()["mean"] | {"b": [None] * 4}}, r"mean.b\[0\] is None, not a number"),
        ({"mean": document()["mean"] | {"b": [1e39] * 4}}, r"mean.b\[0\] is 1e\+39, not a number of -1e\+06 to 1e\+06"),
        ({"batch_norm": document()["batch_norm"] | {"running_var": [-1.0] * 4}}, "running_var"),
        ({"whitening": {"mean": [0.0] * 4}}, "damaged"),
    ],
)
def test_bad_files_are_refused(tmp_path, changes, message):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(document(**changes)))
    with pytest.raises(InputError, match=message):
        Flux2Calibration.read(path)


def test_poor_lines_are_refused_where_they_would_be_used():
    poor = {"mean_cosine": 0.89}
    with pytest.raises(PoorCalibrationError, match=r"cosine 0.890 of the mean .* below 0.9.*: keep to the model's own"):
        Flux2Calibration.from_dict(document(mean=document()["mean"] | poor))
    calibration = Flux2Calibration.from_dict(document(mode=document()["mode"] | poor))
    latents = torch.zeros(1, 4, 2, 2)
    assert to_flux2(latents, calibration, logsnr=latents).isfinite().all()
    for call in (to_flux2, from_flux2):
        with pytest.raises(PoorCalibrationError, match=r"cosine 0.890 of the mode .*: pass logsnr"):
            call(latents, calibration)


def test_bad_texts_and_tensors_are_refused(tmp_path):
    path = tmp_path / "calibration.json"
    with pytest.raises(InputError, match="cannot be read"):
        Flux2Calibration.read(path)
    path.write_text('{"format": NaN}')
    with pytest.raises(InputError, match="not valid JSON"):
        Flux2Calibration.read(path)
    values = document()
    del values["side"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="lacks 'side'"):
        Flux2Calibration.read(path)
    calibration = Flux2Calibration.from_dict(document())
    with pytest.raises(InputError, match=r"\[2, 5, 3, 3\]: the calibration is of \[4,h,w\]"):
        to_flux2(torch.zeros(2, 5, 3, 3), calibration)
    with pytest.raises(InputError, match="logsnr has shape"):
        to_flux2(torch.zeros(2, 4, 3, 3), calibration, logsnr=torch.zeros(4, 3, 3))
