"""`push_to_hub` against a local server that speaks the hub's upload protocol."""

from __future__ import annotations

import shutil

import pytest
import torch
from cache_cases import flip_byte, snapshot, write_images
from hub_server import TOKEN, running_hub
from huggingface_hub import constants, snapshot_download
from models import random_model
from typer.testing import CliRunner

from capacitor_rt import CacheError, CheckpointError, FullCapacitor, InputError, LatentDataset
from capacitor_rt.adapters import CapacitorFlux2VAE, CapacitorVAE
from capacitor_rt.cache import CacheRequest, cache_images
from capacitor_rt.cache.options import RunOptions
from capacitor_rt.cache.sources import ColumnsRequest
from capacitor_rt.cache.verify import verify
from capacitor_rt.cli.app import app
from capacitor_rt.hub import HubError, push, push_to_hub

ME = "me/latents"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as hub:
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished cache of two buckets, one input quarantined, and the model that made it."""
    folder = tmp_path_factory.mktemp("made")
    write_images(folder / "photos", 7, ((128, 256), (256, 128), (160, 160)))
    (folder / "photos" / "bad.png").write_text("no picture")
    random_model().save_pretrained(folder / "model")
    model = FullCapacitor.from_pretrained(folder / "model")
    cache_images(folder / "photos", folder / "cache", model, CacheRequest(128, area=True, shard_rows=2), progress=False)
    return folder


@pytest.fixture
def cache(made, tmp_path):
    shutil.copytree(made / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def download(hub, tmp_path, revision=None, repo_id=ME):
    options = {"repo_type": "dataset", "endpoint": hub.url, "revision": revision, "token": TOKEN}
    return snapshot_download(repo_id, cache_dir=tmp_path / "hub", **options)


def test_a_cache_goes_there_and_back(hub, cache, tmp_path):
    before = snapshot(cache)
    seen = []
    pushed = push_to_hub(cache, ME, token=TOKEN, private=True, advance=lambda *at: seen.append(at))
    assert snapshot(cache) == before, "the cache was touched"
    repo = hub.repos["dataset", ME]
    assert pushed.url == f"{hub.url}/datasets/{ME}" and pushed.kind == "dataset" and repo.private
    files = repo.branches["main"]
    own = {name: data for name, data in before.items() if name != ".lock"}
    assert {name: data for name, data in files.items() if name != "README.md"} == own
    assert set(pushed.uploaded) == set(files) and pushed.unchanged == ()
    assert seen[-1] == ("upload", len(files), len(files)) and ("verify", 1) in {(what, n) for what, n, _ in seen}
    # the plan came last: without it a folder is no cache
    assert "plan.json" in repo.commits[-1][2] and all("/" not in path for path in repo.commits[-1][2])
    back = download(hub, tmp_path)
    assert verify(back).problems == []
    here, there = LatentDataset(cache), LatentDataset(back, verify=True)
    assert len(there) == len(here) == 7 and there.latent_space == here.latent_space
    assert all(torch.equal(a["latents"], b["latents"]) and a["id"] == b["id"] for a, b in zip(here, there, strict=True))


def test_the_card(hub, cache):
    push_to_hub(cache, ME, token=TOKEN, revision="v1")
    dataset, card = LatentDataset(cache), hub.repos["dataset", ME].branches["v1"]["README.md"].decode()
    assert card.startswith("---\ntags:\n- latents\n")
    for text in (
        "# me/latents",
        "| rows | 7 of 8 images |",
        f"`{dataset.latent_space}`",
        f"`{dataset.plan.id}`",
        f"`{dataset.plan.fields['model']['sha256']}`",
        "| model | model |",
        "`latents`, bfloat16",
        'LatentDataset(snapshot_download("me/latents", repo_type="dataset", revision="v1"))',
    ):
        assert text in card, text
    # buckets with their rows, all of them
    rows = [line for line in card.splitlines() if " | 8 x " in line]
    assert len(rows) == len(dataset.buckets) == 3
    assert sum(int(line.split("|")[3]) for line in rows) == 7
    assert str(cache.parent) not in card, "a path of this machine"


def test_the_example_on_the_card_runs(hub, cache, tmp_path, monkeypatch):
    push_to_hub(cache, ME, token=TOKEN)
    card = hub.repos["dataset", ME].branches["main"]["README.md"].decode()
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda id, **_: download(hub, tmp_path, repo_id=id))
    names: dict = {}
    exec(code, names)
    assert len(names["dataset"]) == 7


def test_an_updated_cache_goes_there_with_the_latents_that_it_shares(hub, cache, made, tmp_path):
    photos = tmp_path / "photos"
    shutil.copytree(made / "photos", photos)
    (photos / "000.png").unlink()
    write_images(photos / "more", 2, ((128, 256),))
    model = FullCapacitor.from_pretrained(made / "model")
    options = RunOptions(workers=0, progress=False, update=True)
    cache_images(photos, cache, model, CacheRequest(128, area=True), options=options)
    push_to_hub(cache, ME, token=TOKEN)
    there = LatentDataset(download(hub, tmp_path), verify=True)
    here = LatentDataset(cache)
    assert [*there.ids] == [*here.ids] and len(here) == 8
    assert all(torch.equal(there.tensors(i)["latents"], here.tensors(i)["latents"]) for i in range(8))
    assert verify(download(hub, tmp_path)).problems == []
    # and nothing of the earlier generation but the files that rows lie in
    assert not [
        name for name in hub.repos["dataset", ME].branches["main"] if name in ("commits.jsonl", "source.parquet")
    ]


def test_a_push_that_was_cut_short_goes_on(hub, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(push, "GROUP_FILES", 2)
    hub.commits_left = 2
    with pytest.raises(HubError, match="what arrived is kept, the same push goes on from there"):
        push_to_hub(cache, ME, token=TOKEN)
    repo = hub.repos["dataset", ME]
    arrived = set(repo.branches["main"])
    assert len(arrived) == 4 and "plan.json" not in arrived
    with pytest.raises(CacheError, match=r"no latent cache: it has no plan\.json"):
        LatentDataset(download(hub, tmp_path))
    hub.commits_left = -1
    puts = sum(r.startswith("PUT") for r in hub.requests)
    pushed = push_to_hub(cache, ME, token=TOKEN)
    assert set(pushed.unchanged) == arrived
    large = [name for name in pushed.uploaded if name.endswith((".safetensors", ".parquet"))]
    assert sum(r.startswith("PUT") for r in hub.requests) - puts <= len(large)
    # and once more there is nothing to do
    commits = len(repo.commits)
    again = push_to_hub(cache, ME, token=TOKEN)
    assert again.uploaded == () and len(again.unchanged) == len(repo.branches["main"]) - 1
    assert len(repo.commits) == commits


def test_damaged_and_unfinished_caches_are_refused(hub, cache):
    shard = next((cache / "tasks").iterdir())
    flip_byte(shard, -1)
    with pytest.raises(CacheError, match="is damaged, and is not pushed"):
        push_to_hub(cache, ME, token=TOKEN)
    flip_byte(shard, -1)
    log = cache / "commits.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(CacheError, match="is not finished, and is not pushed: 1 parts are missing"):
        push_to_hub(cache, ME, token=TOKEN)
    assert hub.requests == [], "nothing was asked of the hub"


def test_only_its_own_files_go_up(hub, cache):
    (cache / "notes.txt").write_text("mine")
    (cache / "tasks" / "x.safetensors.tmp-1").write_text("torn")
    push_to_hub(cache, ME, token=TOKEN)
    files = hub.repos["dataset", ME].branches["main"]
    assert not {"notes.txt", "tasks/x.safetensors.tmp-1", ".lock"} & set(files)


def test_nothing_is_overwritten_unasked(hub, cache, tmp_path, made):
    push_to_hub(cache, ME, token=TOKEN)
    repo = hub.repos["dataset", ME]
    before = dict(repo.branches["main"])
    other = random_model(seed=5)
    cache_images(made / "photos", tmp_path / "other", other, CacheRequest(64, shard_rows=2), progress=False)
    with pytest.raises(InputError, match=r"me/latents holds other files by the same names .*--overwrite"):
        push_to_hub(tmp_path / "other", ME, token=TOKEN)
    assert repo.branches["main"] == before
    push_to_hub(tmp_path / "other", "me/other", token=TOKEN)
    push_to_hub(tmp_path / "other", ME, token=TOKEN, overwrite=True)
    assert repo.branches["main"]["plan.json"] == (tmp_path / "other" / "plan.json").read_bytes()


def test_cards_of_their_owner_stay(hub, cache):
    push_to_hub(cache, ME, token=TOKEN)
    repo = hub.repos["dataset", ME]
    repo.branches["main"]["README.md"] = b"written on the hub"
    push_to_hub(cache, ME, token=TOKEN)
    assert repo.branches["main"]["README.md"] == b"written on the hub"
    (cache / "README.md").write_text("written here")
    with pytest.raises(InputError, match=r"README\.md"):
        push_to_hub(cache, ME, token=TOKEN)
    push_to_hub(cache, "me/another", token=TOKEN)
    assert hub.repos["dataset", "me/another"].branches["main"]["README.md"] == b"written here"


def test_a_model_goes_there_and_back(hub, made, tmp_path, monkeypatch):
    pushed = push_to_hub(made / "model", "me/small", token=TOKEN)
    repo = hub.repos["model", "me/small"]
    assert pushed.kind == "model" and set(repo.branches["main"]) == {"config.json", "model.safetensors", "README.md"}
    folder = snapshot_download("me/small", cache_dir=tmp_path / "hub", endpoint=hub.url)
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    here, there = (FullCapacitor.from_pretrained(f).encode(image) for f in (made / "model", folder))
    assert torch.equal(here, there)
    card = repo.branches["main"]["README.md"].decode()
    assert "latents\n`[8, H/16, W/16]`" in card and 'FullCapacitor.from_pretrained("me/small")' in card
    assert "| `bottleneck_dim` | 8 |" in card
    broken = tmp_path / "broken"
    shutil.copytree(made / "model", broken)
    data = (
        (broken / "model.safetensors")
        .read_bytes()
        .replace(b"encoder.to_bottleneck.bias", b"encoder.to_bottleneck.b1as")
    )
    (broken / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="does not fit together, and is not pushed"):
        push_to_hub(broken, "me/broken", token=TOKEN)
    assert ("model", "me/broken") not in hub.repos


def test_an_adapter_goes_there_and_back(hub, tmp_path, caplog):
    vae = CapacitorFlux2VAE(random_model(), inference_config={"seed": 7}, output_dtype=torch.float16)
    vae.save_pretrained(tmp_path / "vae")
    push_to_hub(tmp_path / "vae", "me/vae", token=TOKEN)
    files = hub.repos["model", "me/vae"].branches["main"]
    assert set(files) == {"config.json", "adapter.json", "model.safetensors", "README.md"}
    assert 'CapacitorFlux2VAE.from_pretrained("me/vae")' in files["README.md"].decode()
    options = {"cache_dir": tmp_path / "hub", "token": TOKEN}
    # the model alone was downloaded before
    FullCapacitor.from_pretrained("me/vae", **options)
    unknown = CapacitorFlux2VAE.from_pretrained("me/vae", **options, local_files_only=True)
    assert unknown.inference_config.seed == 0
    assert "me/vae: adapter.json is not in the local cache: taken for absent" in caplog.text
    caplog.clear()
    for offline in (False, True):
        back = CapacitorFlux2VAE.from_pretrained("me/vae", **options, local_files_only=offline)
        assert back.inference_config.seed == 7 and back.output_dtype == torch.float16
        image = torch.rand(1, 3, 64, 64) * 2 - 1
        assert torch.equal(*(v.encode(image).latent_dist.mode() for v in (vae, back)))
    # another class than it was saved by has its own arguments
    assert CapacitorVAE.from_pretrained("me/vae", **options).inference_config.seed == 0
    (tmp_path / "vae" / "adapter.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter\.json cannot be read"):
        push_to_hub(tmp_path / "vae", "me/broken", token=TOKEN)
    # and a model without the file is asked for it once
    (tmp_path / "vae" / "adapter.json").unlink()
    push_to_hub(tmp_path / "vae", "me/plain", token=TOKEN)
    for offline in (False, True):
        plain = CapacitorFlux2VAE.from_pretrained("me/plain", **options, local_files_only=offline)
        assert plain.inference_config.seed == 0
    assert not caplog.text


def test_the_card_names_labels_captions_and_columns(hub, tmp_path):
    for folder in ("ant", "bee|fly"):
        write_images(tmp_path / "photos" / folder, 2)
    (tmp_path / "photos" / "ant" / "000.txt").write_text("an ant")
    names = [p.relative_to(tmp_path / "photos").as_posix() for p in sorted((tmp_path / "photos").rglob("*.png"))]
    (tmp_path / "table.csv").write_text("file_name,label,score\n" + "".join(f"{n},{n[:3]},1.5\n" for n in names))
    columns = ColumnsRequest(str(tmp_path / "table.csv"), "txt", ("score",))
    run = RunOptions(workers=0, progress=False, columns=columns)
    cache_images(tmp_path / "photos", tmp_path / "cache", random_model(), CacheRequest(64), options=run)
    push_to_hub(tmp_path / "cache", ME, token=TOKEN)
    card = hub.repos["dataset", ME].branches["main"]["README.md"].decode()
    assert "| labels | 2 classes: ant, bee |" in card
    assert "| captions | 1 of 4 rows |" in card and "| columns | `score` (string) |" in card


def test_what_the_hub_refuses(hub, made, tmp_path, monkeypatch):
    with pytest.raises(HubError, match="does not let you write to me/small: log in by `hf auth login`"):
        push_to_hub(made / "model", "me/small", token=False)
    with pytest.raises(HubError, match="does not let you write to others/small"):
        push_to_hub(made / "model", "others/small", token=TOKEN)
    with pytest.raises(InputError, match="is no name of a repository"):
        push_to_hub(made / "model", "a/b/c", token=TOKEN)
    for folder, message in ((tmp_path / "nowhere", "is no folder"), (tmp_path, "holds neither plan.json nor")):
        with pytest.raises(InputError, match=message):
            push_to_hub(folder, ME, token=TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"me/small could not be pushed to: 127.0.0.1 cannot be reached"):
        push_to_hub(made / "model", "me/small", token=TOKEN)


def test_the_command(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(*args):
        return CliRunner().invoke(app, ["push", *map(str, args)])

    result = run(cache, ME, "--private", "--revision", "v1")
    assert result.exit_code == 0, result.output
    count = len(hub.repos["dataset", ME].branches["v1"])
    assert f"{count} files pushed to {hub.url}/datasets/{ME} (v1)" in result.stdout
    assert hub.repos["dataset", ME].private and hub.repos["dataset", ME].branches["main"] == {}
    result = run(cache, ME, "--revision", "v1")
    assert f"there already: {count - 1} files" in result.stderr and "0 files pushed" in result.stdout
    assert isinstance(run(cache, "nobody").exception, InputError)


def test_views_are_pushed_one_by_one(hub, cache, tmp_path):
    (tmp_path / "views").mkdir()
    cache.rename(tmp_path / "views" / "128")
    with pytest.raises(InputError, match="holds the caches 128: push each by itself"):
        push_to_hub(tmp_path / "views", ME, token=TOKEN)
    assert not hub.repos
