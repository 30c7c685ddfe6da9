"""Virtual environments: resolved once, built once, found at once.

Runs in the agent, in threads beside its event loop. `cache` knows what is there; `uv` is the only
file that runs uv.
"""
