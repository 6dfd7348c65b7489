import re

import pytest

from resnet_pruning import cost, evaluation, model, quantization
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
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert re.search(r"accuracy 92\.\d\d → 8[89]\.\d\d %", capsys.readouterr().out)
    small, facts = model.load_checkpoint("build/small.pt")
    tiny, tiny_facts = quantization.load_quantized("build/tiny.pt")
    assert 0.49 < cost.macs(small) / 40_551_040 <= 0.5
    assert facts["test_accuracy"] == pytest.approx(tiny_facts["test_accuracy"], abs=0.5)
    assert quantization.stored_bytes(tiny) < 0.3 * cost.size_in_bytes(small)
    assert evaluation.accuracy(tiny, cifar10[1][:1000]) > 85


@pytest.mark.parametrize("name", [*readme.FILES, "docs/guide.md"])
def test_links_and_pictures_lead_somewhere(name):
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), f"{name}: {target}"


def test_the_guides_python_is_python():
    for lines in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), re.DOTALL):
        compile(lines, "docs/guide.md", "exec")
