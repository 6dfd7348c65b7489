import pytest

from resnet_pruning.files import ROOT, fingerprint, required, results_folder, written_whole


def test_an_error_while_writing_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "table.csv"
    with written_whole(path) as partial:
        partial.write_text("old")
    with pytest.raises(RuntimeError), written_whole(path) as partial:
        partial.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_only_the_real_thing_writes_into_the_repository():
    assert results_folder("cifar10", "full") == ROOT
    for run in [("digits", "full"), ("digits", "quick"), ("cifar10", "quick")]:
        assert results_folder(*run).parent == ROOT / "build"
    with pytest.raises(ValueError, match=r"'fast', expected one of quick, full"):
        results_folder("digits", "fast")


def test_fingerprints_tell_contents_apart(tmp_path):
    path = tmp_path / "resnet20.pt"
    path.write_bytes(b"abc")
    assert fingerprint(path) == "resnet20 ba7816bf"  # SHA-256's own test vector
    path.write_bytes(b"abd")
    assert fingerprint(path) != "resnet20 ba7816bf"


def test_a_missing_extra_is_named():
    with pytest.raises(ImportError, match=r"no_such_module is not installed, expected it here: pip install -e '.\[export\]' brings it"):
        required("no_such_module", "export")
    assert required("math", "export").pi > 3
