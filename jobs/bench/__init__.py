"""Benchmarks: programs that compare with a peer in the same run and print a ratio. Their results lie beside them."""
