import warnings

import pytest
import torch

from resnet_pruning import calibration, compression, evaluation, hardware, quantization
from resnet_pruning.deployment import timing
from resnet_pruning.model import ResNet


def test_full_float32_lasts_until_the_last_thread_leaves_it():
    def setting():
        return torch.backends.cudnn.conv.fp32_precision

    before = setting()
    first, second = hardware.full_float32(), hardware.full_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as in another thread, which is done earlier
    assert setting() == "ieee"
    second.__exit__(None, None, None)
    assert setting() == before != "ieee"


def test_a_machine_that_cannot_compile_is_told_so_once(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("No working C++ compiler found\nlong traceback")

    monkeypatch.setattr(torch, "compile", no_compiler)
    hardware.can_compile.cache_clear()
    with pytest.warns(UserWarning, match=r"training runs uncompiled \(No working C\+\+ compiler found\)"):
        assert not hardware.can_compile("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hardware.can_compile("cpu")
    hardware.can_compile.cache_clear()


def test_bfloat16_is_used_only_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False}, raising=False)
    assert not hardware.has_fast_bfloat16("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert hardware.has_fast_bfloat16("cpu")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not hardware.has_fast_bfloat16("cpu")


def test_the_machine_has_the_name_of_what_computes(monkeypatch):
    assert len(hardware.machine()) > 5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    assert hardware.machine() == hardware.machine("cuda") == hardware.machine(torch.device("cuda", 0)) == "some GPU"
    assert "threads" in hardware.machine("cpu")


def test_the_callers_autocast_changes_nothing(digits):
    torch.manual_seed(0)
    network, images = ResNet(8, (4, 6, 8)).eval(), digits[0][:240]

    def made():
        small = compression.compress(network, images, macs=0.7, n_steps=2, progress=False)
        return small.state_dict() | quantization.quantize(small, images, 4, 4, progress=False).state_dict()

    expected = made()
    with torch.autocast("cpu", torch.bfloat16):
        found = made()
        assert torch.is_autocast_enabled("cpu"), "for the caller"
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def precisions():
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.fixture(params=["default", "older setting", "newer setting"])
def chosen(request):
    """What a user may have chosen before, by PyTorch's older or newer settings."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), precisions()[2]
    if request.param == "older setting":
        torch.set_float32_matmul_precision("high")
    if request.param == "newer setting":
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield request.param
    torch.set_float32_matmul_precision(before[1])
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.fp32_precision = before[0], before[2]


def test_float32_is_computed_as_such_and_what_was_chosen_comes_back(chosen):
    before = precisions()
    with pytest.raises(KeyError), hardware.full_float32():
        assert set(precisions()) == {"ieee"}
        raise KeyError
    assert precisions() == before and "tf32" in before


def test_what_reads_pytorchs_older_setting_works_beside_it(chosen):
    """As torch.export does, and with it the evaluation mode of networks that torchao quantized."""
    with hardware.full_float32():
        torch.export.export(torch.nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 8, 8),))
        assert "tf32" not in precisions()


def test_reported_numbers_are_computed_in_float32(small_images):
    """Accuracies, statistics and timings, whatever the setting for all else."""

    class Watched(ResNet):
        def forward(self, x):
            seen.add(precisions()[0])
            return super().forward(x)

    network, seen = Watched(8, (4, 4, 4)), set()
    for compute in (
        lambda: evaluation.predict(network, small_images),
        lambda: calibration.layer_statistics(network, small_images),
        lambda: calibration.reestimate_batch_norm(network, small_images),
        lambda: timing.interleaved({"network": lambda: network(torch.zeros(1, 3, 32, 32))}, 1, progress=False, least=0.0),
    ):
        assert precisions()[0] == "tf32"
        compute()
        assert seen == {"ieee"}
        seen.clear()
