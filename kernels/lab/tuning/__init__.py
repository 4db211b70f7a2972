"""The search for the fastest schedules."""
