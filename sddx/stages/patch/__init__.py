"""patch: what stands in for the removed parts, fitted on calibration text."""
