"""What is said of compiled kernels without a GPU: machine code of a known kernel, occupancy and times by hand."""

import json
import sys
from itertools import product

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import gpu_static, kernels, runner, sass
from benchmarks.cases import MODELS
from benchmarks.plot import plot_ratios
from benchmarks.report import write_results

RATIO = {"p20": 0.4, "p50": 0.5, "p80": 0.6}
CASE = {"case": "sampling filtered", "candidate": "ril_kernels", "pass": "no-grad", "ratio": RATIO, "rounds": 1}
CASE |= {"device": "cpu", "dtype": "float32", "floor": "", "threads": 1}
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


CCE = ("_cce_lse_forward_kernel", "_cce_backward_kernel", "_indexed_neg_dot_forward_kernel")
needs_cce = pytest.mark.skipif(
    kernels.tl_autotune is None, reason="cut-cross-entropy (requirements.peers.txt) is not installed"
)


def training(name: str) -> kernels.Form:
    return next(form for form in kernels.forms() if form.kernel.__name__ == name and form.trains)


def test_only_outermost_loops_that_read_are_found():
    names, loops = sass.instructions(CODE)
    assert len(names) == 13 and names[2] == "LDG.E.U16"
    assert loops == [(1, 6)]  # not the one in it, not the one that only writes, not the slow path behind the end
    into_shared_memory = CODE.replace("LDG.E.128", "LDGSTS.E.BYPASS.LTC128B.128").replace("LDG.E.U16", "LDS.U16")
    assert sass.instructions(into_shared_memory)[1] == [(1, 6)]
    assert sass._widths(sass.instructions(into_shared_memory)[0], *sass.READS) == [32, 128]


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
    per_element = gpu_static.instructions_per_element(gpu_static.WORK["logits_grad_kernel"], form, used, 2048)
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
        ((100, 4, 32, 0, 128), 16),  # 512 / 128 columns = 4
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
    found = gpu_static.least_time(10**9, 2, 1, 1, 1000, "h100", tensor_flops=4096)
    assert found == (pytest.approx(4096e9 / 989e12 * 1e6), "tensor")
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


@needs_cce
def test_time_of_kernels_that_make_logits():
    forward, backward, indexed = kernels.cce_forms()
    found = gpu_static.predicted(forward, 80, {"loops": [100]})
    num_bytes = 2 * 2048 * (8192 + 151_936)  # of both matrices
    assert found["bytes_per_element"] == pytest.approx(num_bytes / (8192 * 151_936))
    # 64 turns of the loop over H by 256 threads make 256 x 128 logits.
    assert found["instructions_per_element"] == 100 * 64 * 256 / (256 * 128)
    assert (found["flops_per_element"], found["tensor_flops_per_element"]) == (5, 2 * 2048)
    us, limit = found["least_us"]["Qwen2.5-VL-7B"]["a100"]
    assert us == pytest.approx(2 * 8192 * 3584 * 152_064 / 312e12 * 1e6) and limit == "tensor"
    found = gpu_static.predicted(backward, 90, {"loops": [100, 300, 500]})
    assert found["bytes_per_element"] == pytest.approx(2 * num_bytes / (8192 * 151_936))  # and of both gradients
    assert found["instructions_per_element"] == (100 * 64 + (300 + 500) * 32) * 128 / (128 * 128)
    gemms = gpu_static.gemms(90)["least_us"]["Qwen2.5-VL-3B"]["h100"]
    assert found["least_us"]["Qwen2.5-VL-3B"]["h100"] == (pytest.approx(gemms[0]), "tensor")
    with pytest.raises(ValueError, match="zip"):  # a loop that was not found is not counted as none
        gpu_static.predicted(backward, 90, {"loops": [300, 500]})
    found = gpu_static.predicted(indexed, 100, {"instructions": 640, "loops": []})
    assert (found["bytes_per_element"], found["instructions_per_element"]) == (4, 640 * 512 / (128 * 256))
    us, limit = found["least_us"]["small"]["b200"]  # 64 tiles of 128 tokens, on 148 multiprocessors
    assert us == pytest.approx(8192 * 128 * 10 / (80e12 / 2 * 64 / 148) * 1e6) and limit == "issue"


@needs_cce
def test_cut_cross_entropy_is_compiled_as_it_is_launched(monkeypatch):
    """Its launchers on tensors without data, with the arguments that its autograd function passes."""
    launched = {}

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *arguments, **named):
            wrapper = self.kernel
            values = {**dict(zip(wrapper.arg_names, arguments, strict=False)), **named}
            while hasattr(wrapper, "values"):  # as triton.heuristics runs them
                for name, choose in wrapper.values.items():
                    values[name] = choose(values)
                wrapper = wrapper.fn
            launched[wrapper.__name__] = values

    modules = (kernels.cce_lse_forward, kernels.cce_backward, kernels.indexed_dot)
    for module, name in zip(modules, CCE, strict=True):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    hidden_size, vocab = MODELS[kernels.HEAD]
    tokens = kernels.TOKENS
    with torch.device("meta"):
        hidden = torch.empty(tokens, hidden_size, dtype=torch.bfloat16)
        lm_head = torch.empty(vocab, hidden_size, dtype=torch.bfloat16, requires_grad=True)
        target, grad = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens)
        ordering = torch.empty(vocab, dtype=torch.int32)
    eps = torch.finfo(torch.bfloat16).eps / 32
    lse, _ = kernels.cce_lse_forward.cce_lse_forward_kernel(hidden, lm_head, return_logit_avg=True)
    kernels.indexed_dot.indexed_neg_dot_forward_kernel(hidden, lm_head, target, out_dtype=lse.dtype)
    kernels.cce_backward.cce_backward_kernel(
        grad, hidden, lm_head, lse, None, None, eps, target, vocab_ordering=ordering
    )
    monkeypatch.undo()
    dtypes = {"bfloat16": kernels.VALUES, "float32": "*fp32", "int64": "*i64", "int32": "*i32", "uint32": "*u32"}
    forms = list(kernels.cce_forms())
    assert [form.kernel.__name__ for form in forms] == list(CCE)
    for form in forms:
        values = launched[form.kernel.__name__]
        assert (form.num_warps, form.num_stages) == (values["num_warps"], values["num_stages"])
        for name in form.kernel.arg_names:
            value = values[name]
            if name in form.constants:  # Triton makes constants of None and 1, too
                assert form.constants[name] == value, name
            elif isinstance(value, torch.Tensor):
                assert form.arguments[name] == dtypes[str(value.dtype).removeprefix("torch.")], name
            elif isinstance(value, int):
                assert form.arguments[name] == "i32" and value > 1, name
                assert (name in kernels.CCE_WHOLE) == (value % 16 == 0), name
            else:
                assert form.arguments[name] == "fp32" and isinstance(value, float), name


@needs_cce
def test_report_of_cut_cross_entropy(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_static, "forms", lambda: [training("logits_stats_kernel")])
    monkeypatch.setattr(kernels, "cross_entropy", None)  # as where Liger is not installed
    monkeypatch.setattr(gpu_static, "TARGETS", (90,))
    rows = list(gpu_static.rows({"command": "", **runner.provenance("cpu", "a" * 40, False)}))
    assert [row["kernel"] for row in rows] == ["logits_stats_kernel", *CCE, "the head's three GEMMs"]
    # The loops that were found are those of the GEMMs: four warps at a time multiply m x k by k x n.
    for form, row in zip(kernels.cce_forms(), rows[1:3], strict=False):
        names, loops = sass.instructions(sass.machine_code(form.compile(90))[1])
        parts = gpu_static.WORK[row["kernel"]].parts
        assert row["loops"] == [end - first for first, end in loops] and len(loops) == len(parts)
        for (first, end), part in zip(loops, parts, strict=True):
            shapes = [name.split(".")[1].split("x") for name in names[first:end] if name.startswith("HGMMA")]
            products = sum(int(m) * int(n) * int(k) for m, n, k in shapes) * form.num_warps // 4
            assert products == form.constants["BLOCK_B"] * form.constants["BLOCK_V"] * form.constants[part]
        assert row["mix"]["tensor"] and 128 in row["load_bits"] and row["resident_warps"] == 8
    runner.append(tmp_path / "kernels.jsonl", rows)
    runner.append(tmp_path / "cpu.jsonl", [CASE | runner.provenance("cpu", "a" * 40, False)])
    text = write_results(tmp_path, tmp_path / "RESULTS.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| cut-cross-entropy: _cce_backward_kernel |"))
    resources = [str(rows[2][key]) for key in ("registers", "spill_bytes", "shared_bytes", "resident_warps")]
    assert line.split(" | ")[1:7] == [*resources, "1.05", "5 + 12288 of GEMMs"]
    assert f"are with the H and V of {kernels.HEAD}," in text and "cut-cross-entropy 25.1.1.\n" in text
    us = 2 * 8192 * 2048 * 151_936 / 989e12 * 1e6
    assert f"| cut-cross-entropy: _cce_lse_forward_kernel | {us:.0f} tensor | {us:.0f} tensor |" in text
    assert "\nNot installed where this was made: liger-kernel.\n" in text


def test_report_without_a_gpu(tmp_path, monkeypatch, capsys):
    liger = {form.kernel.__name__: form for form in kernels.liger_forms()}
    assert {*liger, *CCE} == {name for name in gpu_static.WORK if "liger" in name or name.startswith("_")}
    monkeypatch.setattr(kernels, "tl_autotune", None)  # as where cut-cross-entropy is not installed
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
    runner.append(tmp_path / "cpu.jsonl", [CASE | runner.provenance("cpu", "a" * 40, False) | {"device_name": "A CPU"}])
    text = write_results(tmp_path, tmp_path / "RESULTS.md").read_text()
    registers = " / ".join(str(row["registers"]) for row in rows[:3])
    line = next(line for line in text.splitlines() if line.startswith("| ril_kernels: logits_grad_kernel |"))
    assert line.startswith(f"| ril_kernels: logits_grad_kernel | {registers} | 0 | 0 |") and "special " in line
    us = 8192 * 151_936 * 4 / 2.039e12 * 1e6
    assert f"3B\n\n{rows[0]['sizes']}; by" in text and f"| ril_kernels: logits_grad_kernel | {us:.0f} memory |" in text
    assert "In all 3 of ours" in text and "\nNot installed where this was made: cut-cross-entropy.\n" in text
    assert "GEMMs stand apart" not in text and "![ratios of the main cases](ratios_a_cpu.svg)" in text


def test_picture_of_the_main_cases(tmp_path):
    row = {"case": "policy_loss small T=4", "device_name": "A CPU", "ratio": RATIO}
    rows = [row | {"candidate": name, "pass": each} for name in ("ril_kernels", "peer") for each in ("forward", "both")]
    first = plot_ratios(rows, tmp_path).read_bytes()
    assert b"policy_loss small T=4" in first and first.count(b"0.50") == 1  # ours has a number, and one pass is drawn
    assert plot_ratios(rows, tmp_path).read_bytes() == first
    assert plot_ratios([row | {"case": "another", "candidate": "peer", "pass": "both"}], tmp_path) is None
