"""Make one HTML page of an output: what was run, what came out, and pictures.

The page is a single file that needs no network: counts by status with reasons, the share of each class and how it
spreads over the images, how sure the network was, sizes, the course and cost of each run, and a gallery of images and
their masks, least certain first. It has the same size for a thousand images and for a million.

Numbers are of the newest row of each image that is still in the collection, as in the view `current` of swath views;
while no run is finished, of all rows that are there. The gallery reads the shards in which its images lie, and the
images themselves in the version that was segmented; what is gone is shown as a mask alone.

  swath report s3://bucket/masks
  swath report /data/masks --to masks.html --price 12.40
"""

from jobs.display import Display, size
from pipeline.config import ReportSettings, absolute

SETTINGS = ReportSettings


def run(settings: ReportSettings) -> int:
    from jobs.page import make
    from pipeline.filesystems import public_url
    from pipeline.storage import Store

    url = absolute(settings.to)
    folder, _, name = url.rpartition("/")
    target = Store(folder or "/", settings)
    target.check_writable()
    with Display() as display:
        page = make(settings, display)
    target.put(name, page.encode())
    print(f"report  {public_url(url)}  ({size(len(page.encode()))})")
    return 0
