"""`upwell bench NAME`: one file a benchmark, each `run(Options) -> Result`; docs/performance.md holds the figures."""
