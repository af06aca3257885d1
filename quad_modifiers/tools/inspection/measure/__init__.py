"""`results.Inspection`: the numbers of an inspection. Nothing here draws or needs matplotlib."""
