"""What serves an app in its worker: the only part of `fal_agent` that imports web libraries."""
