"""What serves an app: runs in its worker, and may import fastapi, starlette, uvicorn and the like."""
