"""The GPU benchmark's grid, its resumable record and its table; its calls on the CPU, where torch has one fused attention."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attention.benchmarks import gpu_attention, gpu_calls, gpu_libraries, gpu_timing
from fused_attention.benchmarks.exact import Inputs, largest_error, one_head
from fused_attention.benchmarks.gpu_attention import GPU_LOST, OURS_FAILED, GpuLost, cells, measure
from fused_attention.benchmarks.gpu_calls import FEATURES, PROVIDERS, Cell, make_calls, make_inputs
from fused_attention.benchmarks.gpu_libraries import LIBRARIES
from fused_attention.benchmarks.gpu_table import state_line, table
from fused_attention.benchmarks.journal import Journal

TINY = 128  # tokens


def both(forward: float, backward: float) -> dict:
    """A provider's result, of two times on the GPU."""
    return {"error": 0.0, "forward": [forward, 0.02, "graph"], "backward": [backward, 0.04, "graph"]}


def test_the_grid_holds_every_length_head_dim_and_mask() -> None:
    grid = cells()
    assert len(set(grid)) == len(grid)
    for feature in ("full", "causal"):
        wanted = {Cell(feature, length, head_dim) for length in gpu_attention.LENGTHS for head_dim in gpu_attention.HEAD_DIMS}
        assert wanted <= set(grid)
    assert {cell.feature for cell in grid} == set(FEATURES)
    assert grid[0] == Cell("full", 2048, 64)


def test_flops() -> None:
    """4 B H L^2 D in the forward."""
    cell = Cell("full", 4096, 128)
    assert cell.heads == 16
    assert cell.flops("forward") == 4 * 4 * 16 * 4096**2 * 128
    assert cell._replace(feature="causal").flops("backward") == 2.5 / 2 * cell.flops("forward")


@pytest.mark.parametrize("feature", FEATURES)
def test_calls_of_every_feature_agree_with_float64_math(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference stands in for our kernels; torch's flash attention is the only peer that a CPU has."""
    attention = gpu_calls.attention
    monkeypatch.setattr(gpu_calls, "attention", lambda *inputs, **options: attention(*inputs, **options | {"backend": "reference"}))
    results = measure(Cell(feature, 64, 64), ("cuda", "triton", "flash", "efficient"), "cpu", 0.0, tokens=TINY)
    assert set(results) == {"cuda", "triton", "flash", "efficient"}
    for ours in ("cuda", "triton"):
        assert results[ours]["forward"].kernel_ms > 0
        assert results[ours]["backward"].call_ms > 0
        assert results[ours]["error"] < 0.02
    assert isinstance(results["efficient"], str)
    if feature in ("full", "causal", "bool mask", "key padding", "short, padded"):
        assert results["flash"]["backward"].kernel_ms > 0, results["flash"]


@pytest.mark.parametrize("feature", ["causal", "bias gradient", "key padding"])
def test_the_reference_is_torchs_math_in_float64(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks of rows, the last of them not whole."""
    monkeypatch.setattr("fused_attention.benchmarks.exact.ROWS", 24)
    inputs = make_inputs(Cell(feature, 64, 64), "cpu", TINY)
    leaves = [tensor.double().requires_grad_() for tensor in inputs[:3]]
    bias = None if inputs.bias is None else inputs.bias.double().requires_grad_()
    mask = bias if bias is not None else inputs.mask
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=inputs.is_causal)
    gradients = torch.autograd.grad(out, [*leaves, *([] if bias is None else [bias])], inputs.dout.double())
    for ours, wanted in zip(one_head(inputs, 1, 3), (out, *gradients[:3]), strict=True):
        torch.testing.assert_close(ours, wanted[1, 3], rtol=1e-5, atol=1e-5)
    assert largest_error(inputs, (out, *gradients)) < 1e-5
    assert len(gradients) == 3 + (feature == "bias gradient")


def test_an_error_in_any_result_is_seen() -> None:
    inputs: Inputs = make_inputs(Cell("bias gradient", 64, 64), "cpu", TINY)
    leaves = [tensor.float().requires_grad_() for tensor in (*inputs[:3], inputs.bias)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves[:3], attn_mask=leaves[3])
    results = (out, *torch.autograd.grad(out, leaves, inputs.dout.float()))
    for place in range(5):
        wrong = [tensor.detach().clone() for tensor in results]
        wrong[place][-1, -1, 17] *= 0.5
        assert largest_error(inputs, tuple(wrong)) > gpu_attention.ERROR_LIMIT, place


def test_a_wrong_result_is_not_timed_and_strikes_out_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_calls, "attention", lambda query, key, value, **options: value + 0.0 * (query + key))
    results = measure(Cell("full", 64, 64), ("cuda", "flash"), "cpu", 0.0, tokens=TINY)
    assert "differs from float64 math" in results["cuda"]
    assert results["flash"]["forward"].kernel_ms > 0


@pytest.mark.parametrize("feature", ["full", "dropout"])
def test_what_is_not_finite_is_not_timed(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        out = value + 0.0 * (query + key)
        return out.index_fill(2, torch.tensor([40]), torch.nan)

    monkeypatch.setattr(gpu_calls, "attention", attention)
    assert "is not finite everywhere" in measure(Cell(feature, 64, 64), ("cuda",), "cpu", 0.0, tokens=TINY)["cuda"]


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> list:
    """What was measured: (cell, providers), of two cells."""
    measured = []

    def fake_measure(cell: Cell, providers: tuple[str, ...], device: str, seconds: float, attempt: object) -> dict:
        measured.append((cell, providers))
        return {name: both(1.0, 2.0) for name in providers if name != "flex"} | {
            name: "no compiler" for name in providers if name == "flex"
        }

    monkeypatch.setattr(gpu_attention, "measure", fake_measure)
    monkeypatch.setattr(gpu_attention, "compile_ahead", lambda *arguments: None)
    monkeypatch.setattr(gpu_attention, "timing_stream", lambda device: gpu_timing.timing_stream("cpu"))
    monkeypatch.setattr(gpu_attention, "ceilings", lambda: {"copy TB/s": 4.0})
    monkeypatch.setattr(gpu_attention, "gpu_state", lambda: {"unknown": "there is no nvidia-smi"})
    monkeypatch.setattr(gpu_attention, "cells", lambda: [Cell("full", 128, 64), Cell("bias", 512, 64)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return measured


def test_a_run_goes_on_where_it_was(no_gpu_needed: list, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "results.jsonl"
    assert gpu_attention.main([str(file), "--minutes", "0"]) == 0
    assert no_gpu_needed == []
    assert "not run" in capsys.readouterr().out
    assert gpu_attention.main([str(file)]) == 0
    assert no_gpu_needed == [(Cell("full", 128, 64), PROVIDERS), (Cell("bias", 512, 64), PROVIDERS)]
    assert '{"key": ["machine"], "result": {"gpu": "a GPU"' in file.read_text()
    assert gpu_attention.main([str(file)]) == 0
    assert len(no_gpu_needed) == 2
    lines = file.read_text().splitlines()
    last = max(place for place, line in enumerate(lines) if '"triton"' in line)
    file.write_text("\n".join([*lines[:last], lines[last][:30]]))  # a run that was killed while it wrote
    assert gpu_attention.main([str(file)]) == 0
    assert no_gpu_needed[2:] == [(Cell("bias", 512, 64), PROVIDERS[1:])]
    printed = capsys.readouterr().out
    assert "| full | 128 | 64 | 1.0000 (20) | 1.0000 (20) | 1.0000 (20) | 1.0000 (20) | 1.0000 (20) | - |" in printed
    assert "- flex: no compiler (full 128 64, bias 512 64)" in printed
    assert "clocks and power: there is no nvidia-smi" in printed
    assert "not run" not in printed


def test_the_program_with_real_calls(
    no_gpu_needed: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """On the CPU, the reference in place of our kernels."""
    attention = gpu_calls.attention
    monkeypatch.setattr(gpu_calls, "attention", lambda *inputs, **options: attention(*inputs, **options | {"backend": "reference"}))
    monkeypatch.setattr(
        gpu_attention, "measure", lambda cell, names, device, seconds, attempt: measure(cell, names, "cpu", seconds, TINY, attempt)
    )
    monkeypatch.setattr(gpu_attention, "cells", lambda: [Cell("causal", 64, 64)])
    file = tmp_path / "results.jsonl"
    assert gpu_attention.main([str(file), "--seconds", "0", "--providers", "cuda", "flash", "efficient"]) == 0
    results = Journal(file).results
    assert set(results) == {("machine",)} | {("causal", 64, 64, name) for name in ("cuda", "flash", "efficient", "state")}
    assert results["causal", 64, 64, "cuda"]["backward"][0] > 0
    printed = capsys.readouterr().out
    assert "| causal | 64 | 64 | " in printed
    assert "- efficient: RuntimeError: " in printed
    monkeypatch.setattr(gpu_calls, "attention", lambda query, key, value, **options: value)
    assert gpu_attention.main([str(file), "--seconds", "0", "--providers", "triton"]) == OURS_FAILED


def test_after_the_gpu_was_lost_the_next_process_goes_on(
    no_gpu_needed: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def lost(*arguments: object, **options: object) -> dict:
        raise GpuLost("triton", "AcceleratorError: an illegal memory access was encountered")

    def end(status: int) -> None:
        raise SystemExit(status)

    file, measure = str(tmp_path / "results.jsonl"), gpu_attention.measure
    monkeypatch.setattr(gpu_attention, "measure", lost)
    monkeypatch.setattr(gpu_attention.os, "_exit", end)
    with pytest.raises(SystemExit, match=str(GPU_LOST)):
        gpu_attention.main([file])
    monkeypatch.setattr(gpu_attention, "measure", measure)
    assert gpu_attention.main([file, "--compiled"]) == OURS_FAILED
    assert no_gpu_needed[0] == (Cell("full", 128, 64), tuple(name for name in PROVIDERS if name != "triton"))
    assert "- triton: AcceleratorError: an illegal memory access was encountered (full 128 64)" in capsys.readouterr().out


def test_only_the_provider_that_loses_the_gpu_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(*inputs: Tensor, backend: str, **options: object) -> Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_calls, "attention", attention)
    monkeypatch.setattr(gpu_attention, "make_inputs", lambda cell, device, tokens: make_inputs(cell, "cpu", tokens))
    monkeypatch.setattr(gpu_attention, "is_lost", lambda: True)
    with pytest.raises(GpuLost) as lost:
        measure(Cell("full", 64, 64), ("triton", "cuda"), "cuda", 0.0, tokens=TINY)
    assert lost.value.args == ("triton", "RuntimeError: CUDA error: an illegal memory access was encountered")


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu_attention.main([str(tmp_path / "results.jsonl")]) == 1
    assert "no GPU" in capsys.readouterr().err


def test_the_ratio_is_to_the_best_peer() -> None:
    cell = Cell("causal", 2048, 128)
    times = {"cuda": 2.0, "triton": 2.5, "flash": 3.0, "efficient": 9.0, "cudnn": 1.0}
    text = table({(*cell, name): both(time, time) for name, time in times.items()} | {(*cell, "flex"): "no compiler"}, [cell])
    assert "| 0.50; 1.50 of flash (>= 1) | 0.40; 0.40 of cudnn (below 0.75) |" in text
    assert "| 0.50; 1.50 of flash (>= 1) | 0.40; 0.40 of cudnn (below 0.5) |" in text


def test_a_time_by_events_is_marked() -> None:
    cell = Cell("causal", 2048, 128)
    result = both(1.0, 2.0) | {"backward": [2.0, 0.04, "events: RuntimeError: operation not permitted when stream is capturing"]}
    text = table({(*cell, "cudnn"): result}, [cell])
    assert "| not run | not run | not run | not run | 1.0000 (20) | not run |" in text
    assert "| not run | not run | not run | not run | 2.0000e (40) | not run |" in text


def test_a_baseline_of_the_peers_does_not_stand_for_ours(no_gpu_needed: list, tmp_path: Path) -> None:
    file = str(tmp_path / "results.jsonl")
    gpu_attention.main([file, "--peers-only"])
    gpu_attention.main([file])
    gpu_attention.main([file, "--peers-only"])
    assert [providers for cell, providers in no_gpu_needed if cell.feature == "full"] == [PROVIDERS[2:], PROVIDERS[:2]]


def test_bars() -> None:
    full, dropout, deterministic = (Cell(feature, 2048, 64) for feature in ("full", "dropout", "deterministic"))
    results = {
        (*full, "triton"): both(2.0, 2.0),
        (*full, "cuda"): both(1.0, 2.0),
        (*full, "flash"): both(1.0, 1.0),
        (*dropout, "triton"): both(4.0, 2.5),
        (*deterministic, "cuda"): both(9.0, 2.4),
    }
    forward, backward = table(results, [full, dropout, deterministic]).split("## backward")
    assert "1.00; 1.00 of flash (>= 1) | 0.50; 0.50 of flash (below 0.75) |" in forward
    assert "0.50; 0.50 of flash (below 1) | 0.50; 0.50 of flash (>= 0.5) |" in backward
    assert "no peer; 0.50 of its own full (below 0.7) |" in forward
    assert "no peer; 0.80 of its own full (>= 0.7) |" in backward
    assert "own full" not in forward.split("deterministic")[1]
    assert "no peer; 0.83 of its own full (>= 0.82) |" in backward


def test_clocks_and_power_in_a_line() -> None:
    state = {"SM MHz": "1980", "memory MHz": "3201", "W": "412.50", "C": "44", "throttled": "0x0000000000000000"}
    slower = state | {"SM MHz": "1410", "W": "[N/A]", "throttled": "0x0000000000000004"}
    line = state_line({("full", 128, 64, "state"): state, ("full", 256, 64, "state"): slower})
    assert "1410 to 1980 SM MHz" in line
    assert "412.5 to 412.5 W" in line
    assert "clocks held down in 1 of 2 cells (0x0000000000000004)" in line


def test_what_kills_its_process_twice_is_not_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    for _ in range(2):
        journal = Journal(file)
        assert ("full", 64, "cuda") not in journal.results
        journal._append({"begun": [("full", 64, "cuda"), ("full", 64, "flash")]})
        journal._append({"over": [("full", 64, "flash")]})
    journal = Journal(file)
    assert list(journal.results) == [("full", 64, "cuda")]
    assert "did not come back" in journal.results["full", 64, "cuda"]
    with pytest.raises(KeyboardInterrupt), journal.attempt(("full", 64, "flash")):
        raise KeyboardInterrupt
    journal.keep(("full", 64, "flash"), 1.0)
    assert Journal(file).results["full", 64, "flash"] == 1.0
    assert json.loads(file.read_text().splitlines()[-2]) == {"over": [["full", 64, "flash"]]}


def test_an_attempt_that_hangs_ends_its_process(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from fused_attention.benchmarks.journal import Journal\n"
        "with Journal(Path(sys.argv[1]), limit_seconds=0.2).attempt(('a', 1)): time.sleep(60)"
    )
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", script, tmp_path / "journal"], capture_output=True, text=True, timeout=50)
        assert run.returncode == 1
        assert "Timeout" in run.stderr
    assert ("a", 1) in Journal(tmp_path / "journal").results


def library(function: Callable[..., Any]) -> SimpleNamespace:
    return SimpleNamespace(flash_attn_func=function, memory_efficient_attention=function, ffpa_attn_func=function, LowerTriangularMask=str)


@pytest.mark.parametrize("name", LIBRARIES)
def test_other_libraries_are_called_as_they_are_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins that have their signatures and layouts; one that is not installed says so."""
    assert "not installed" in str(make_calls(Cell("full", 64, 64), make_inputs(Cell("full", 64, 64), "cpu", TINY), (name,))[name]) or (
        importlib.util.find_spec(name.partition(" ")[0].replace("-", "_"))
    )

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask=None, attn_bias=None, is_causal=False, causal=False, **options: Any
    ) -> Any:
        assert set(options) <= {"dropout_p", "p", "deterministic"}
        sequence_first = name != "ffpa-attn"
        tensors = [tensor.transpose(1, 2) for tensor in (query, key, value)] if sequence_first else [query, key, value]
        bias = attn_mask if attn_bias is None or isinstance(attn_bias, str) else attn_bias
        is_causal = is_causal or causal or isinstance(attn_bias, str)
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=bias, is_causal=is_causal)
        out = out.transpose(1, 2) if sequence_first else out
        return (out, None) if name == "flash-attn 4" else out

    monkeypatch.setattr(gpu_libraries, "library_of", lambda wanted: library(attend))
    for feature in ("full", "causal", "bias", "bool mask"):
        found = measure(Cell(feature, 64, 64), (name,), "cpu", 0.0, tokens=TINY)[name]
        if isinstance(found, str):
            assert found in ("takes no mask and no bias", "takes no bool mask")
            assert feature in ("bias", "bool mask")
        else:
            assert found["error"] < 0.02


def test_a_library_that_attends_to_something_else_is_listed_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_libraries, "library_of", lambda wanted: library(lambda query, key, value, **options: value + 0.0 * (query + key))
    )
    results = measure(Cell("full", 64, 64), tuple(LIBRARIES), "cpu", 0.0, tokens=TINY)
    assert all("differs from float64 math" in result for result in results.values())
