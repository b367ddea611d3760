"""Paths, objectives, guidance and samplers. t = 0 is data and t = 1 is noise, everywhere."""
