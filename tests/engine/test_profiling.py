"""The memory of phases out of a trace made by hand, and a run that is too short; a real profile: test_survival.py."""

from ril_engine import runlog
from ril_engine.profiling import Profile, peak_bytes
from ril_engine.runlog import PhaseTimer


def memory(moment: float, total: int, device: int = 0) -> dict:
    return {"name": "[memory]", "ts": moment, "args": {"Device Type": device, "Total Allocated": total}}


def phase(name: str, start: float, end: float, kind: str = "user_annotation") -> dict:
    return {"name": name, "cat": kind, "ts": start, "dur": end - start}


def test_a_phase_has_what_it_found_and_what_is_allocated_in_it():
    events = [phase("policy", 10, 50), phase("reference", 20, 30), phase("rollout", 60, 70)]
    events += [phase("rollout", 0, 90, "gpu_user_annotation"), phase("Optimizer.step", 41, 45)]
    events += [memory(*each) for each in ((5, 3), (12, 7), (15, 2), (22, 20), (28, 1), (42, 6), (55, 9), (65, 4))]
    found = peak_bytes(events, {"policy", "reference", "rollout"})
    assert found == {"policy": 7, "reference": 20, "rollout": 9, "other": 9}


def test_of_a_job_with_a_gpu_only_its_memory_counts():
    events = [phase("policy", 10, 50), memory(12, 100), memory(13, 5, device=1), memory(20, 200)]
    assert peak_bytes(events, {"policy"})["policy"] == 5


def test_a_run_of_one_step_has_no_profile(tmp_path, capfd):
    runlog.warn.cache_clear()
    with Profile(tmp_path, PhaseTimer(), enabled=True):
        pass
    err = capfd.readouterr().err
    assert err == "warning: --profile: no step was watched, since the first one of a run is left out; raise rl.steps\n"
    assert not list(tmp_path.iterdir())
