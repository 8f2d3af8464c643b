"""Peak memory sees a block that is freed before the end; sizes on disk are summed."""

import time

import pytest
import torch

from prefdistill.core.memory import PeakMemory, bytes_on_disk
from prefdistill.core.stages import run_stage


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures torch's allocator")
def test_a_block_that_is_freed_before_the_end_counts():
    with PeakMemory() as small:
        pass
    with PeakMemory() as large:
        block = torch.ones(50_000_000)  # 200 MB
        time.sleep(0.2)
        del block
    with PeakMemory() as after:
        pass
    assert large.bytes > small.bytes + 150_000_000
    assert after.bytes < large.bytes - 100_000_000


def test_sampling_ends_with_an_error():
    peak = PeakMemory()
    with pytest.raises(ZeroDivisionError), peak:
        1 / 0  # noqa: B018
    assert not peak._sampler.is_alive()


def test_a_stage_reports_memory_and_disk_also_when_reused(tmp_path):
    def make(out):
        (out / "deep").mkdir()
        (out / "deep" / "file").write_bytes(b"x" * 1234)
        (out / "checkpoints").mkdir()
        (out / "checkpoints" / "large").write_bytes(b"x" * 100_000)

    made = run_stage("one", tmp_path / "one", {"a": 1}, make)
    assert made.peak_memory > 0
    assert 1234 < made.bytes < 3000
    assert made.bytes == bytes_on_disk(tmp_path / "one")
    again = run_stage("one", tmp_path / "one", {"a": 1}, make)
    assert again.reused
    assert (again.peak_memory, again.bytes) == (made.peak_memory, made.bytes)
