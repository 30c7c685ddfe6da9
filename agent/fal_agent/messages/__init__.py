"""Every message that the notebook, the agent and its workers exchange, as frozen dataclasses.

Runs everywhere; the only place where a message is defined. `fal_agent.wire` turns them into frames and back.
"""
