"""`make bench`: Drover's mover and the tools it replaces, on the same images and links."""
