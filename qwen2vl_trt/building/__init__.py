"""From a model's name to built engines: what to build and where, FP8 calibration, the build itself."""
