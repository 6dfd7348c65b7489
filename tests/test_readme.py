import pytest

from resnet_pruning import readme
from resnet_pruning.files import ROOT


def test_every_block_says_what_the_csvs_say():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text, ROOT / "figures") == text, "README and figures/*.csv differ: run `make readme`"
    assert all(f"<!-- begin:{name} -->" in text for name in readme.BLOCKS)


def test_old_numbers_are_replaced_and_the_rest_is_kept():
    text = "before\n<!-- begin:trials -->\n99.99 %\n<!-- end:trials -->\nafter\n"
    new = readme.filled(text, ROOT / "figures")
    assert "99.99" not in new and new.startswith("before\n<!--") and new.endswith("-->\nafter\n")


@pytest.mark.parametrize("text", ["<!-- begin:nothing -->\n<!-- end:nothing -->", "<!-- begin:trials -->\n"])
def test_unknown_and_unclosed_blocks_are_refused(text):
    with pytest.raises(ValueError, match="README block"):
        readme.filled(text, ROOT / "figures")
