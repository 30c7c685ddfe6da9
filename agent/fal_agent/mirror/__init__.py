"""Keep a folder of a host's data root as a manifest says: what `sync_dir` does over there.

Runs where the data root is: in the agent, or in the notebook's process for the host that is this one.
The notebook also makes manifests with it.
"""
