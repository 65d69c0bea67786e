"""What people hold while they train: the scheduler and its curves, calibration, telemetry, guards, sharding."""
