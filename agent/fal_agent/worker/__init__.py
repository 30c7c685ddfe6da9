"""The process of the user's code: one environment, warm between calls."""
