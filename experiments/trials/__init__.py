"""Files and folders as people have them, and what must come of each: the cases of the two experiments ``odd_*``."""
