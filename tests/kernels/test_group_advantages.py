import math
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from ril_kernels import _native, group_advantages
from ril_kernels.policy_loss.reference import ADVANTAGE_KINDS, group_advantages_reference

BOTH = pytest.mark.parametrize("backend", ["reference", "cpu"])
KINDS = pytest.mark.parametrize("kind", ADVANTAGE_KINDS)


def ragged(num_responses: int, num_groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of uneven sizes (at least 2), sparse ids, in random order."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(10 * num_groups, generator=generator)[:num_groups] * 1_000_003
    picked = torch.randint(num_groups, (num_responses - 2 * num_groups,), generator=generator)
    groups = torch.cat([ids, ids, ids[picked]])[torch.randperm(num_responses, generator=generator)]
    return torch.randn(num_responses, generator=generator), groups


@BOTH
def test_hand_computed(backend):
    # Group 9: rewards 2, 0, 1, mean 1, squared distances 1 + 1 + 0 over n - 1 = 2: std 1.
    # Group 0: rewards 1, 2, mean 3/2, std sqrt(2 * 1/4 / 1) = sqrt(1/2).
    rewards, groups = torch.tensor([2.0, 1.0, 0.0, 2.0, 1.0]), torch.tensor([9, 0, 9, 0, 9])
    root = math.sqrt(0.5) + 1e-4
    expected = {
        "dr_grpo": [1.0, -0.5, -1.0, 0.5, 0.0],
        "grpo": [1 / 1.0001, -0.5 / root, -1 / 1.0001, 0.5 / root, 0.0],
        # the others of 9: (0+1)/2, (2+1)/2, (2+0)/2; of 0: the one other
        "rloo": [1.5, -1.0, -1.5, 1.0, 0.0],
    }
    for kind in ADVANTAGE_KINDS:
        actual = group_advantages(rewards, groups, kind=kind, backend=backend)
        torch.testing.assert_close(actual, torch.tensor(expected[kind]), rtol=1e-6, atol=1e-7)


@BOTH
@KINDS
def test_equal_rewards_give_zero(kind, backend):
    advantages = group_advantages(torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int64), kind=kind, backend=backend)
    assert (advantages == 0).all()  # tokens of advantage 0 are left out of everything


@KINDS
@pytest.mark.parametrize(("num_responses", "num_groups"), [(2, 1), (3, 1), (7, 2), (101, 17), (200_003, 40_001)])
def test_cpu_equals_reference(kind, num_responses, num_groups, assert_accurate):
    rewards, groups = ragged(num_responses, num_groups)
    actual = group_advantages(rewards, groups, kind=kind, backend="cpu")
    truth = group_advantages_reference(rewards.double(), groups, kind)
    assert_accurate(actual, truth, group_advantages_reference(rewards, groups, kind))


@KINDS
def test_every_element_is_written(kind, assert_accurate):
    # The native function itself, on an output poisoned with NaN and with guards on both sides.
    rewards, groups = ragged(70_001, 501)
    output = torch.full((70_001 + 2,), math.nan)
    _native.call(
        "ril_group_advantages_f32",
        rewards.data_ptr(),
        groups.data_ptr(),
        rewards.numel(),
        ADVANTAGE_KINDS.index(kind),
        output.data_ptr() + output.element_size(),
    )
    assert output[0].isnan() and output[-1].isnan()
    assert_accurate(output[1:-1], group_advantages_reference(rewards.double(), groups, kind))


def test_a_wrong_result_fails_the_tolerance(assert_accurate):
    rewards, groups = ragged(101, 17)
    truth = group_advantages_reference(rewards.double(), groups, "grpo")
    _, slot, count = torch.unique(groups, return_inverse=True, return_counts=True)
    biased = truth * ((count - 1) / count).rsqrt()[slot]  # the std over n in place of n - 1
    with pytest.raises(AssertionError, match="above the allowed"):
        assert_accurate(biased.float(), truth)


@KINDS
def test_repeated_runs_are_bitwise_equal(kind):
    rewards, groups = ragged(100_003, 1_001)
    runs = [group_advantages(rewards, groups, kind=kind, backend="cpu") for _ in range(3)]
    assert all(torch.equal(runs[0], run) for run in runs[1:])


def test_order_and_strides_do_not_matter():
    rewards, groups = ragged(101, 17)
    expected = group_advantages(rewards, groups, backend="cpu")
    strided = group_advantages(rewards.repeat_interleave(2)[::2], groups.repeat_interleave(3)[::3], backend="cpu")
    assert torch.equal(strided, expected)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(1))
    shuffled = group_advantages(rewards[order], groups[order], backend="cpu")
    torch.testing.assert_close(shuffled, expected[order], rtol=1e-6, atol=1e-6)


def test_auto_is_a_function_of_device_and_dtype(native_calls):
    rewards, groups = ragged(7, 2)
    group_advantages(rewards, groups)
    assert native_calls == ["ril_group_advantages_f32"]
    assert group_advantages(rewards.double(), groups).dtype == torch.float64
    group_advantages(rewards, groups, backend="reference")
    assert len(native_calls) == 1


@KINDS
def test_a_gpu_is_not_waited_for(kind):
    # Fake tensors have a device and no values: reading one raises, as torch.unique in the reference does.
    with FakeTensorMode():
        rewards, groups = torch.rand(8, device="cuda"), torch.arange(8, device="cuda") // 4
        for backend in ("auto", "triton"):
            advantages = group_advantages(rewards, groups, kind=kind, backend=backend)
            assert advantages.shape == (8,) and advantages.dtype == torch.float32 and advantages.is_cuda
        for values, backend in ((rewards, "reference"), (rewards.double(), "auto")):
            with pytest.raises(DynamicOutputShapeException):
                group_advantages(values, groups, kind=kind, backend=backend)


@KINDS
def test_opcheck(kind):
    rewards, groups = ragged(7, 2)
    torch.library.opcheck(torch.ops.ril_kernels.group_advantages.default, (rewards, groups, kind))
    torch.library.opcheck(torch.ops.ril_kernels.group_advantages.default, (rewards[::2], groups[::2] * 0, kind))


def test_against_trl_scaling():
    pytest.importorskip("trl", reason="TRL is not installed")
    from trl.trainer.utils import nanstd

    # As GRPOTrainer._generate_and_score_completions does it, for groups of 4 in order.
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0))
    mean = torch.nanmean(rewards.view(-1, 4), dim=1).repeat_interleave(4)
    std = nanstd(rewards.view(-1, 4), dim=1).repeat_interleave(4)
    groups = torch.arange(3).repeat_interleave(4)
    torch.testing.assert_close(
        group_advantages(rewards, groups, kind="grpo"), (rewards - mean) / (std + 1e-4), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(group_advantages(rewards, groups), rewards - mean, rtol=0, atol=1e-6)


def error_cases() -> list:
    rewards, groups = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([3, 3, 3])
    base = {"rewards": rewards, "groups": groups}
    single = r"groups: got a single response in group 8, expected at least 2 responses in each group\. A lone"
    return [
        ({**base, "groups": torch.tensor([3, 8, 3])}, ValueError, single),
        ({**base, "groups": torch.tensor([3, 8, 3]), "kind": "grpo"}, ValueError, single),
        ({**base, "groups": torch.tensor([3, 8, 3]), "kind": "rloo"}, ValueError, single),
        (
            {**base, "groups": torch.tensor([3, -1, 3])},
            ValueError,
            r"groups: got the id -1, expected ids of at least",
        ),
        ({**base, "groups": groups.int()}, TypeError, r"groups: got dtype int32, expected int64"),
        (
            {**base, "groups": groups[:2]},
            ValueError,
            r"groups: got shape \(2,\), expected \(N,\) with N = 3 as in rew",
        ),
        (
            {**base, "groups": groups.to("meta")},
            ValueError,
            r"groups: got device meta, expected cpu, where rewards is",
        ),
        (
            {**base, "rewards": rewards.half()},
            TypeError,
            r"rewards: got dtype float16, expected float32 or float64",
        ),
        ({**base, "rewards": rewards[None]}, ValueError, r"rewards: got shape \(1, 3\), expected \(N,\)"),
        (
            {**base, "rewards": rewards[:0]},
            ValueError,
            r"rewards: got shape \(0,\), .* no size of 0\. An empty batch",
        ),
        (
            {**base, "rewards": rewards / 0},
            ValueError,
            r"rewards: got inf at index 0, expected finite values",
        ),
        (
            {**base, "rewards": rewards.log() * 0},
            ValueError,
            r"rewards: got nan at index 1, expected finite values",
        ),
        ({**base, "rewards": [1.0]}, TypeError, r"rewards: got list, expected a torch\.Tensor"),
        ({**base, "kind": "ppo"}, ValueError, r"kind: got 'ppo', expected one of 'dr_grpo', 'grpo', 'rloo'"),
        ({**base, "backend": "gpu"}, ValueError, r"backend: got 'gpu', expected one of 'auto', 'reference', 'cpu', "),
        (
            {**base, "backend": "triton"},
            ValueError,
            r"backend: got 'triton' for rewards of float32 on cpu, expected float32 rewards on a CUDA device\. Use",
        ),
        (
            {**base, "rewards": rewards.double(), "backend": "cpu"},
            ValueError,
            r"backend: got 'cpu' for rewards of float64 on cpu, expected float32 rewards on a CPU\. Use",
        ),
    ]


@pytest.mark.parametrize(("inputs", "error", "message"), error_cases())
def test_errors(inputs, error, message, native_calls):
    with pytest.raises(error, match=message):
        group_advantages(**inputs)
    assert native_calls == []


@pytest.mark.parametrize("arguments", [(0, 8, 3, 0, 8), (8, 8, 0, 0, 8), (8, 8, 3, 3, 8), (8, 8, -1, 0, 8)])
def test_the_native_function_refuses_before_it_reads(arguments):
    with pytest.raises(RuntimeError, match=r"ril_group_advantages_f32: .* status 1 \(bad argument\)"):
        _native.call("ril_group_advantages_f32", *arguments)


def test_native_single_response_is_a_status():
    rewards, groups, output = torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    with pytest.raises(RuntimeError, match="bad argument"):
        _native.call("ril_group_advantages_f32", rewards.data_ptr(), groups.data_ptr(), 1, 0, output.data_ptr())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime_in_the_process():
    script = """
from ril_kernels import _native
_native.library()
with open("/proc/self/maps") as maps:
    runtimes = {path for line in maps if "libgomp" in (path := line.split()[-1])}
assert len(runtimes) == 1, runtimes
"""  # a process of its own: scikit-learn, where another test imports it, brings a second libgomp
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
