"""Scripts that do the same job with other tools, as their documentation teaches: JPEGs in, PNG masks in Parquet out.

Each is run as `python -m jobs.bench.peers.NAME INPUT OUTPUT CHECKPOINT THREADS`; INPUT is a folder or an s3:// prefix.
"""
