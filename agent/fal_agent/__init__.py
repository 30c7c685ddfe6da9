"""The half of fal_notebook that runs on a host: agent, workers and what user code names.

Standard library only (and cloudpickle inside workers), so that a bare host needs nothing
installed. It never imports `fal_notebook`.
"""
