"""The road of the data, from a collection of images to a Parquet table; its files read in this order:

config, policy, storage, index, plan, decode, stages, road, segment, masks, schema, totals, commit, metrics, cluster,
run.
"""
