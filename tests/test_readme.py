import dataclasses
import functools
import re

import pytest
import torch
from distributed import LocalCluster

from resnet_pruning import checkpoints, compression, cost, data, model, quantization, training
from resnet_pruning.files import ROOT
from resnet_pruning.report import readme


def test_every_block_says_what_the_csvs_say():
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in readme.FILES}
    for name, text in texts.items():
        assert readme.filled(text, ROOT / "figures") == text, f"{name} and figures/*.csv differ: run `make readme`"
    assert all(f"<!-- begin:{name} -->" in "".join(texts.values()) for name in readme.BLOCKS)


def test_old_numbers_are_replaced_and_the_rest_is_kept():
    text = "before\n<!-- begin:trials -->\n99.99 %\n<!-- end:trials -->\nafter\n"
    new = readme.filled(text, ROOT / "figures")
    assert "99.99" not in new and new.startswith("before\n<!--") and new.endswith("-->\nafter\n")


@pytest.mark.parametrize("text", ["<!-- begin:nothing -->\n<!-- end:nothing -->", "<!-- begin:trials -->\n"])
def test_unknown_and_unclosed_blocks_are_refused(text):
    with pytest.raises(ValueError, match="block"):
        readme.filled(text, ROOT / "figures")


def test_the_readmes_lines_run_as_written(cifar10, tmp_path, monkeypatch, capsys):
    """On a part of the images, and with few steps of reconstruction: what compress reaches is measured by the sweeps."""
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_images", lambda name: (cifar10[0][:200], cifar10[1][:1000]))
    monkeypatch.setattr(compression, "compress", functools.partial(compression.compress, n_steps=10))
    exec(lines, {})
    assert re.search(r"accuracy 9\d\.\d\d → \d\d\.\d\d %", capsys.readouterr().out)
    small, facts = checkpoints.load_checkpoint("build/small.pt")
    tiny, tiny_facts = quantization.load_quantized("build/tiny.pt")
    assert 0.49 < cost.macs(small) / 40_551_040 <= 0.5
    assert facts["test_accuracy"] == pytest.approx(tiny_facts["test_accuracy"], abs=1)
    assert cost.size_in_bytes(tiny) < 0.3 * cost.size_in_bytes(small)


@pytest.mark.parametrize("name", [*readme.FILES, "docs/guide.md", "docs/method.md"])
def test_links_and_pictures_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), f"{name}: {target}"


def test_the_guides_lines_run_in_order(digits, tmp_path, monkeypatch):
    """As written, but on digits, and with a training of an epoch wherever it says more."""
    train_images, test_images = digits
    base_train = training.train
    quick = {"epochs": 1, "batch_size": 64, "warmup_epochs": 0, "small_share": 0.0, "ema": 0}
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    checkpoints.save_checkpoint(tmp_path / "checkpoints" / "resnet20.pt", model.ResNet(8, (4, 8, 16)), {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_images", lambda name, **settings: (train_images[:600], test_images[:100]))
    monkeypatch.setattr(
        training, "train", lambda net, images, recipe, **how: base_train(net, images, dataclasses.replace(recipe, **quick), **how)
    )
    monkeypatch.setattr(compression, "compress", functools.partial(compression.compress, n_steps=5))
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    with LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster:
        lines = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
        lines = lines.replace('Client("scheduler:8786")', f'Client("{cluster.scheduler_address}")').replace('"cifar10"', '"digits"')
        lines = lines.replace("n_steps=200", "n_steps=5")
        results: dict = {}
        exec(compile(lines, "docs/guide.md", "exec"), results)
    assert len(results["table"]) == 3 and results["logits"].shape == (100, 10)
    assert cost.macs(results["theirs"]) <= 0.5 * cost.macs(results["network"])
