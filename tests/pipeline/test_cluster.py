"""Workers fit the machines that they are for."""

import pytest

from pipeline.cluster import IMAGE_MEMORY, gpu_share, image_memory


@pytest.mark.parametrize(
    ("node", "gpus", "cpus"),
    [
        ({"CPU": 16, "GPU": 1}, 1, 15),
        ({"CPU": 16, "GPU": 4}, 1, 3),
        ({"CPU": 16, "GPU": 1}, 0.5, 7),
        ({"GPU": 1}, 1, 0),
    ],
)
def test_a_gpu_worker_gets_its_share_of_a_gpu_node(node, gpus, cpus):
    assert gpu_share(node, gpus) == cpus


def test_the_memory_for_images_is_a_part_of_the_smallest_share():
    large, small = {"CPU": 16, "memory": 128 << 30}, {"CPU": 4, "memory": 8 << 30}
    assert image_memory([large], 4) == 4 << 30
    assert image_memory([large, small], 2) == 512 << 20
    assert image_memory([{"CPU": 64, "memory": 8 << 30}], 1) == IMAGE_MEMORY[0]
