"""What people read: summaries, differences, drawings, reports, sizes, sensitivity."""
