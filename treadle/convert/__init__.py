"""Other trainers' configurations as recipes: `treadle convert FILE`. Scripts are read, never run."""
