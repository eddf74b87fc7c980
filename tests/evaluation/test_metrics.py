from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from capacitor_rt.errors import InputError
from capacitor_rt.evaluation.metrics import CosineSimilarity, PsnrTable, cosine_similarity, psnr, ssim, summary


def flat(value: int, shape=(8, 8, 3)) -> np.ndarray:
    return np.full(shape, value, np.uint8)


class TestPsnr:
    def test_known_values(self):
        assert psnr(flat(10), flat(11)) == pytest.approx(48.1308, abs=1e-4)
        assert psnr(flat(0), flat(255)) == 0
        a, b = flat(100), flat(100)
        b[0, 0, 0] = 110
        # one error of 10 among 192 samples
        assert psnr(a, b) == pytest.approx(10 * math.log10(255**2 * 192 / 100))

    def test_is_symmetric_and_does_not_wrap_around(self):
        assert psnr(flat(0), flat(250)) == psnr(flat(250), flat(0)) == pytest.approx(20 * math.log10(255 / 250))

    def test_identical(self):
        assert psnr(flat(7), flat(7)) == math.inf

    def test_accepts_tensors(self):
        assert psnr(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.ones(3, 4, 4, dtype=torch.uint8)) > 48

    @pytest.mark.parametrize(
        ("a", "b"), [(flat(0), flat(0, (8, 9, 3))), (flat(0), np.zeros((8, 8, 3))), (flat(0, (0, 3)), flat(0, (0, 3)))]
    )
    def test_misfits_are_refused(self, a, b):
        with pytest.raises(InputError):
            psnr(a, b)


PHOTOS = Path(__file__).parents[2] / "capacitor_rt" / "sample" / "photos"


class TestSsim:
    # scikit-image 0.26: structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    # channel_axis=2, data_range=255)
    VALUES = (
        ("chelsea.png", 0.9182581274124079, 0.7819372002051659, 0.6977060403732622),
        ("rocket.jpg", 0.9375094776173069, 0.8503160267420586, 0.7654502393310927),
    )

    @pytest.mark.parametrize(("name", "coarse", "moved", "dark"), VALUES)
    def test_agrees_with_scikit_image(self, name, coarse, moved, dark):
        with Image.open(PHOTOS / name) as image:
            a = np.asarray(image.convert("RGB"))[:200, :240]
        assert ssim(a, (a // 16 * 16 + 8).astype(np.uint8)) == pytest.approx(coarse, abs=2e-6)
        assert ssim(a, np.roll(a, 1, 1)) == pytest.approx(moved, abs=2e-6)
        assert ssim(a, np.clip(a * 0.5, 0, 255).astype(np.uint8)) == pytest.approx(dark, abs=2e-6)

    def test_flat_images_differ_in_luminance_alone(self):
        c1 = (0.01 * 255) ** 2
        want = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
        assert ssim(flat(100, (16, 16, 3)), flat(120, (16, 16, 3))) == pytest.approx(want, abs=5e-6)

    def test_identical_and_symmetric(self):
        rng = np.random.default_rng(0)
        a, b = rng.integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
        assert ssim(a, a) == pytest.approx(1, abs=1e-6) and ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-6)

    @pytest.mark.parametrize(
        ("a", "b"),
        [
            (flat(0, (16, 16, 3)), flat(0, (16, 17, 3))),
            (flat(0, (10, 16, 3)), flat(0, (10, 16, 3))),
            (flat(0, (16, 16)), flat(0, (16, 16))),
            (np.zeros((16, 16, 3)), np.zeros((16, 16, 3))),
        ],
    )
    def test_misfits_are_refused(self, a, b):
        with pytest.raises(InputError):
            ssim(a, b)


class TestSummary:
    def test_figures(self):
        values = [30.0, 31.0, 32.0, 33.0, 39.0]
        s = summary(values)
        assert s == pytest.approx(
            {"mean": 33.0, "std": math.sqrt(10), "median": 32.0, "p5": 30.2, "p95": 37.8, "count": 5, "identical": 0}
        )
        assert all(type(v) in (float, int) for v in s.values())

    def test_infinite_values_are_counted_and_left_out(self):
        assert summary([30.0, math.inf, 32.0]) == {**summary([30.0, 32.0]), "count": 3, "identical": 1}
        s = summary([math.inf, math.inf])
        assert s["mean"] == s["p5"] == math.inf and s["std"] == 0 and s["identical"] == 2

    @pytest.mark.parametrize("values", [[], [1.0, math.nan]])
    def test_nothing_to_sum_up(self, values):
        with pytest.raises(InputError, match="at least one number"):
            summary(values)


class TestTable:
    A, B = (36.0, 30.0, 40.0), (35.0, 31.0, 37.0)

    def test_delta_is_of_the_images_not_of_the_figures(self):
        table = PsnrTable.of({"ours": self.A, "other": self.B}, ("x", "y", "z"))
        assert table.delta == summary([1.0, -1.0, 3.0])
        assert table.delta["p5"] != table.rows["ours"]["p5"] - table.rows["other"]["p5"]
        assert PsnrTable.of({"ours": (1.0,)}, ("x",)).delta is None

    def test_markdown(self):
        lines = PsnrTable.of({"ours": self.A, "other": self.B}, ("x", "y", "z")).render().splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert len({len(line) for line in lines}) == 1
        assert cells[0] == ["PSNR dB, 3 images", "mean", "std", "median", "P5", "P95"]
        assert cells[2] == ["ours", "35.33", "4.11", "36.00", "30.60", "39.60"]
        assert cells[4] == ["ours - other", "+1.00", "1.63", "+1.00", "-0.80", "+2.80"]

    def test_plain_text(self):
        text = PsnrTable.of({"ours": (36.0,)}, ("x",)).render(markdown=False)
        assert "|" not in text
        assert text.splitlines()[1].split() == ["ours", "36.00", "0.00", "36.00", "36.00", "36.00"]

    def test_identical_images_are_told(self):
        table = PsnrTable.of({"ours": (math.inf, 30.0), "other": (31.0, 30.0)}, ("x", "y"))
        assert "ours: 1 reproduced exactly" in table.render()
        assert table.delta["identical"] == 1 and table.delta["mean"] == 0
        assert json.loads(json.dumps(table.to_dict(), allow_nan=False))["values"]["ours"] == [None, 30.0]

    def test_dictionary_is_json(self):
        table = PsnrTable.of({"ours": self.A, "other": self.B}, ("x", "y", "z"))
        read = json.loads(json.dumps(table.to_dict(), allow_nan=False))
        assert read["models"]["ours"]["mean"] == pytest.approx(106 / 3)
        assert read["delta"]["count"] == 3 and read["images"] == ["x", "y", "z"]

    def test_lengths_are_checked(self):
        with pytest.raises(InputError, match="ours has 1 values for 2 images"):
            PsnrTable.of({"ours": (1.0,)}, ("x", "y"))
        with pytest.raises(InputError, match="other has 2 values for 1 images"):
            PsnrTable.of({"ours": (1.0,), "other": (1.0, 2.0)})
        with pytest.raises(InputError, match="0 values"):
            PsnrTable.of({"ours": ()})
        with pytest.raises(InputError, match="at least one model"):
            PsnrTable.of({})


class TestCosine:
    def test_directions(self):
        a = torch.randn(2, 4, 3, 5)
        same = cosine_similarity(a, 3 * a)
        assert same.overall == pytest.approx(1) and same.per_channel.shape == (4,)
        assert same.per_channel.dtype == torch.float64
        assert cosine_similarity(a, -a).overall == pytest.approx(-1)

    def test_channels_are_separate(self):
        a = torch.randn(2, 2, 4, 4, dtype=torch.float64)
        b = a.clone()
        b[:, 1] *= -1
        result = cosine_similarity(a, b)
        assert result.per_channel.tolist() == pytest.approx([1, -1])
        power = a.square().sum((0, 2, 3))
        assert result.overall == pytest.approx(float((power[0] - power[1]) / power.sum()))

    def test_sums_are_float64(self):
        # in float32 the small elements would vanish beside the large one
        a = torch.full((1, 1, 1000, 1000), 1.0)
        a[0, 0, 0, 0] = 4096.0
        b = torch.ones_like(a)
        expected = (4096 + 999_999) / math.sqrt((4096**2 + 999_999) * 1e6)
        assert cosine_similarity(a, b).overall == pytest.approx(expected, rel=1e-12)

    def test_zero_has_no_direction(self):
        a = torch.zeros(1, 2, 2, 2)
        a[:, 0] = 1
        per_channel = cosine_similarity(a, a).per_channel
        assert per_channel[0] == 1 and per_channel[1].isnan()

    def test_batches_add_up_whatever_their_sizes(self):
        batches = [(torch.randn(n, 4, h, w), torch.randn(n, 4, h, w)) for n, h, w in ((2, 3, 3), (3, 3, 3), (1, 5, 2))]
        cosine = CosineSimilarity()
        for a, b in batches:
            cosine.update(a, b)
        # the vectors written out: all that a channel ever held
        a, b = (torch.cat([pair[i].transpose(0, 1).flatten(1) for pair in batches], 1).double() for i in (0, 1))
        found = cosine.result()
        torch.testing.assert_close(found.per_channel, torch.cosine_similarity(a, b, dim=1))
        assert found.overall == pytest.approx(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item())

    def test_mixed_types_are_summed_alike(self):
        a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4).bfloat16()
        assert cosine_similarity(a, b).overall == cosine_similarity(a.double(), b.double()).overall

    def test_shapes_are_checked(self):
        with pytest.raises(InputError, match="one shape"):
            cosine_similarity(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 4, 3))
        cosine = CosineSimilarity()
        with pytest.raises(InputError, match="at least one batch"):
            cosine.result()
        cosine.update(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3))
        with pytest.raises(InputError, match="1 channels, and those before had 2"):
            cosine.update(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))
        assert cosine.result().overall == pytest.approx(1)

    def test_dictionary_is_json(self):
        a = torch.zeros(1, 2, 2, 2)
        a[:, 0] = 1
        read = json.loads(json.dumps(cosine_similarity(a, a).to_dict(), allow_nan=False))
        assert read == {"overall": 1.0, "per_channel": [1.0, None]}
