import warnings

import pytest
import torch

from resnet_pruning import hardware


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


def test_the_machine_has_a_name():
    assert len(hardware.machine()) > 5
