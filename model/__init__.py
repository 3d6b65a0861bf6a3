"""SegFormer in plain PyTorch. Knows nothing of Ray, storage or Parquet, and imports nothing else of Swath."""
