"""What user code names, in the notebook and in workers: defined here, re-exported by `fal_notebook`."""
