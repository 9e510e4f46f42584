import builtins

import pytest
import torch

from kan_basis import kernels
from run_scripts import doctor


def test_every_line_starts_with_a_verdict(capsys):
    code = doctor.main()
    lines = capsys.readouterr().out.splitlines()
    assert all(line[:4] in ("ok  ", "!!  ", "--  ") for line in lines) and code == (
        1 if any(line.startswith("!!") for line in lines) else 0
    )
    assert lines[0].startswith("ok  torch: torch ") and len(lines) == 5
    if not torch.cuda.is_available():
        assert lines[1].startswith("!!  GPU: torch sees no GPU") and lines[4].startswith("--  kernels: not tried")


@pytest.mark.gpu
def test_a_healthy_machine(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_choice", "auto")  # the doctor chooses the kernels for the whole process
    assert doctor.main() == 0 and "largest relative error" in capsys.readouterr().out


def test_faults_come_with_a_remedy(monkeypatch, tmp_path):
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: 12050)
    with pytest.raises(
        RuntimeError,
        match="for CUDA 12, but torch is for CUDA 13: pip uninstall cupy-cuda12x, pip install cupy-cuda13x",
    ):
        doctor.cupy_build()
    monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: 13000)
    assert doctor.cupy_build().endswith("for CUDA 13")
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match="is not writable .*set CUPY_CACHE_DIR"):
        doctor.cache()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    assert str(tmp_path / "cache") in doctor.cache()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpus = [("H100", (9, 0)), ("Tesla V100", (7, 0))]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][1])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_90a", "compute_120"])
    with pytest.raises(RuntimeError, match="V100 .compute capability 7.0. cannot run the kernels, which need 8.0"):
        doctor.gpu()
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    with pytest.raises(RuntimeError, match="is not built for Tesla V100 .*: install a build that is"):
        doctor.gpu()
    gpus.pop()
    assert doctor.gpu() == "H100 (compute capability 9.0)"
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="build without CUDA"):
        doctor.torch_build()
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *rest: (_ for _ in ()).throw(ImportError("no CuPy")) if name == "cupy" else real(name, *rest),
    )
    with pytest.raises(RuntimeError, match="pip install cupy-cuda13x"):
        doctor.cupy_build()
