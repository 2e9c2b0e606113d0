"""Structure-aware fuzz targets, one file each, and the runner that feeds them with damaged copies of valid inputs."""
