"""Print SQL that makes views of an output: current (the newest row of each image), segments, runs, deletions, returns.

duckdb -c "$(swath views /data/masks) SELECT status, count(*) FROM current GROUP BY 1"
"""

from pipeline.config import ViewsSettings

SETTINGS = ViewsSettings


def run(settings: ViewsSettings) -> int:
    from pipeline.storage import Store
    from pipeline.views import run_folders, views

    output = Store(settings.output, settings)
    run_folders(output)
    print(views(output))
    return 0
