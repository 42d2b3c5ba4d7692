"""One figure a file, named after its experiment; plots read finished runs and never train."""
