"""How an `App` is served: FastAPI under uvicorn, in the process of the user's code."""
