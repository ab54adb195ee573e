"""What is said of compiled kernels without a GPU: machine code of a known kernel, occupancy and times by hand."""

import json
import sys
from itertools import product

import pytest

from benchmarks import __main__ as command
from benchmarks import gpu_static, kernels, runner, sass
from benchmarks.cases import MODELS
from benchmarks.plot import plot_ratios
from benchmarks.report import write_results

RATIO = {"p20": 0.4, "p50": 0.5, "p80": 0.6}
CODE = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/              @!P0 LDG.E.U16 R8, desc[UR4][R6.64] ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   FFMA R0, R4, R4, R0 ;
        /*0050*/              @!P2 BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   STG.E desc[UR4][R2.64], R0 ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
        /*0080*/              @!P1 BRA `(.L_x_3) ;
.L_x_4:
        /*0090*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   MUFU.EX2 R0, R0 ;
        /*00c0*/                   BRA `(.L_x_4) ;
"""


def training(name: str) -> kernels.Form:
    return next(form for form in kernels.forms() if form.kernel.__name__ == name and form.trains)


def test_only_outermost_loops_that_read_are_found():
    names, loops = sass.instructions(CODE)
    assert len(names) == 13 and names[2] == "LDG.E.U16"
    assert loops == [(1, 6)]  # not the one in it, not the one that only writes, not the slow path behind the end


def test_machine_code_of_a_kernel():
    form = training("logits_grad_kernel")
    compiled = form.compile(90)
    _, code = sass.machine_code(compiled)
    names, [(first, end)] = sass.instructions(code)
    loop = names[first:end]
    elements = form.constants["BLOCK"] // (32 * form.num_warps)  # of a thread in a turn: 16, in 16 bits each
    for kind in ("LDG", "STG"):
        assert [name for name in loop if name.startswith(kind)] == [f"{kind}.E.128"] * (elements * 16 // 128)
    used = sass.resources(compiled)
    assert loop.count("MUFU.EX2") == elements <= used["mix"]["special"]
    assert used["loops"] == [len(loop)] and sum(used["mix"].values()) == used["instructions"] >= len(loop)
    assert "tensor" not in used["mix"] and used["mix"]["store"] > used["mix"]["load"] > 2  # zeros are written unrolled
    per_element = gpu_static.instructions_per_element(gpu_static.WORK["logits_grad_kernel"], form, used)
    assert per_element == len(loop) / elements


@pytest.mark.parametrize(
    ("arguments", "warps"),
    [
        ((90, 4, 32, 0), 64),  # 64 warps of 1,024 registers
        ((90, 4, 64, 0), 32),  # 16,384 / 2,048 = 8 warps per scheduler
        ((90, 4, 33, 0), 48),  # 1,056 registers are 1,280: 12 per scheduler
        ((80, 16, 56, 0), 32),  # 9 per scheduler are 36 warps, 2 programs of 16
        ((90, 1, 32, 0), 32),  # 32 programs, whatever their size
        ((80, 4, 32, 40 << 10), 16),  # 164 / (40 + 1) KiB = 4 programs
        ((100, 4, 32, 40 << 10), 20),  # 228 / 41 = 5
    ],
)
def test_occupancy(arguments, warps):
    assert sass.occupancy(*arguments) == warps


def test_least_times_by_hand():
    def least(operations: int, instructions: int, programs: int, board: str):
        return gpu_static.least_time(10**9, 2, operations, instructions, programs, board)

    assert least(1, 1, 1000, "h100") == (pytest.approx(2e9 / 3.35e12 * 1e6), "memory")
    assert least(100, 1, 1000, "h100") == (pytest.approx(1e11 / 67e12 * 1e6), "float32")
    # 108 multiprocessors of 4 schedulers at 1.41 GHz issue 128 x 108 x 1.41e9 threads' instructions a second.
    assert least(1, 100, 1000, "a100") == (pytest.approx(1e11 / (128 * 108 * 1.41e9) * 1e6, rel=2e-3), "issue")
    assert least(1, 100, 54, "a100")[0] == pytest.approx(2 * least(1, 100, 1000, "a100")[0])
    # 132 multiprocessors at 1.98 GHz, where two operations of 128 lanes a clock are the peak.
    assert least(1, 100, 1000, "h100")[0] == pytest.approx(1e11 / (128 * 132 * 1.98e9) * 1e6, rel=2e-3)


def test_time_of_a_kernel_that_memory_binds():
    found = gpu_static.predicted(training("logits_stats_kernel"), 90, {"loops": [16, 10**6]})
    assert found["bytes_per_element"] == 2 and found["instructions_per_element"] == 1
    us, limit = found["least_us"]["Qwen2.5-VL-7B"]["h200"]
    assert us == pytest.approx(8192 * 152_064 * 2 / 4.8e12 * 1e6) and limit == "memory"
    assert set(found["least_us"]) == set(MODELS) and set(found["least_us"]["small"]) == {"h100", "h200"}
    us, limit = gpu_static.gemms(80)["least_us"]["Qwen2.5-VL-3B"]["a100"]
    assert us == pytest.approx(3 * 2 * 8192 * 2048 * 151_936 / 312e12 * 1e6) and limit == "tensor"


def test_report_without_a_gpu(tmp_path, monkeypatch, capsys):
    liger = {form.kernel.__name__: form for form in kernels.liger_forms()}
    assert set(liger) == {name for name in gpu_static.WORK if "liger" in name or name.startswith("_")}
    form = training("logits_grad_kernel")
    monkeypatch.setattr(gpu_static, "forms", lambda: [form])
    output = tmp_path / "kernels.jsonl"
    monkeypatch.setattr(sys, "argv", ["x", "run", "gpu-static", "--allow-dirty", "--output", str(output)])
    for _ in range(2):  # the second report takes the place of the first
        assert command.main() == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": 24, "output": str(output)}
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    names = [form.kernel.__name__, *liger, "the head's three GEMMs"]
    assert [(row["kernel"], row["target"]) for row in rows] == list(product(names, ("sm_80", "sm_90", "sm_100")))
    for row in rows[:-3]:
        assert row["spill_bytes"] == 0 and 16 <= row["registers"] <= 255 and row["instructions"] > 100
        assert 8 <= row["resident_warps"] <= 64 and row["mix"]["load"] and row["instructions_per_element"] > 5
        assert len(row["commit"]) == 40 and row["versions"]["triton"] and "device" not in row
    case = {"case": "sampling filtered", "candidate": "ril_kernels", "pass": "no-grad", "ratio": RATIO, "rounds": 1}
    case |= {"device_name": "A CPU, 2", "device": "cpu", "dtype": "float32", "floor": "", "threads": 1}
    runner.append(tmp_path / "cpu.jsonl", [case | runner.provenance("cpu", "a" * 40, False) | {"device_name": "A CPU"}])
    text = write_results(tmp_path, tmp_path / "RESULTS.md").read_text()
    registers = " / ".join(str(row["registers"]) for row in rows[:3])
    line = next(line for line in text.splitlines() if line.startswith("| ril_kernels: logits_grad_kernel |"))
    assert line.startswith(f"| ril_kernels: logits_grad_kernel | {registers} | 0 | 0 |") and "special " in line
    us = 8192 * 151_936 * 4 / 2.039e12 * 1e6
    assert f"3B\n\n{rows[0]['sizes']}; by" in text and f"| ril_kernels: logits_grad_kernel | {us:.0f} memory |" in text
    assert "In all 3 of ours" in text and "![ratios of the main cases](ratios_a_cpu.svg)" in text


def test_picture_of_the_main_cases(tmp_path):
    row = {"case": "policy_loss small T=4", "device_name": "A CPU", "ratio": RATIO}
    rows = [row | {"candidate": name, "pass": each} for name in ("ril_kernels", "peer") for each in ("forward", "both")]
    first = plot_ratios(rows, tmp_path).read_bytes()
    assert b"policy_loss small T=4" in first and first.count(b"0.50") == 1  # ours has a number, and one pass is drawn
    assert plot_ratios(rows, tmp_path).read_bytes() == first
    assert plot_ratios([row | {"case": "another", "candidate": "peer", "pass": "both"}], tmp_path) is None
