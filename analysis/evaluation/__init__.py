"""What compression costs: tasks, and the runs that measure them."""
