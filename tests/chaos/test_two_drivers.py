"""Two drivers that are started at once on one output do its work once."""

import shutil
from pathlib import Path

import pytest

from tests.chaos.collection import FULL, Collection, Driver, options, outcomes

TIMES = 20 if FULL else 1
FEW = 12  # images
REFUSED = 3


@pytest.mark.parametrize("run_id", ["", "night"], ids=["without a run id", "with a run id"])
@pytest.mark.parametrize("time", range(TIMES))
def test_of_two_drivers_at_once_one_works_and_one_is_refused(
    photos: Collection, tmp_path: Path, run_id: str, time: int
):
    few, output = tmp_path / "few", f"{photos.bucket}/two-drivers-{run_id}-{time}"
    few.mkdir()
    for path in sorted(photos.folder.iterdir())[:FEW]:
        shutil.copy(path, few)
    command = ["segment", str(few), output, *options(photos.on_cluster() | ({"run_id": run_id} if run_id else {}))]
    with Driver(tmp_path / "one", *command) as one, Driver(tmp_path / "other", *command) as other:
        ended = {driver: driver.wait() for driver in (one, other)}
    said = one.said() + other.said()
    assert sorted(ended.values()) in ([0, 0], [0, REFUSED]), said
    for driver, code in ended.items():
        if code == REFUSED:
            assert driver.complaint()
    if REFUSED not in ended.values():  # one came so late that all was done, and says so
        assert said.count("nothing to do") + said.count("nothing new") == 1, said
    assert outcomes(output) == {path.name: photos.expected[path.name] for path in few.iterdir()}
