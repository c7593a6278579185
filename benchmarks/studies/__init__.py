"""Studies that answer one question each: calibration, thresholds, fixed trees."""
